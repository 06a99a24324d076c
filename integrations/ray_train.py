"""A training loop inside Ray Train (``ray.train.torch.TorchTrainer``).

def train_loop_per_worker(config):
    with PDiffRecorder().attach(model, optimizer, total_steps=9000):
        train()
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pdiff_plugin.recording.recorder import DEFAULT_FOLDER

from ._adapter import Adapter, Requires, looked_up

if TYPE_CHECKING:
    from ray.train import TrainContext
    from torch import nn
    from torch.optim import Optimizer


class PDiffRecorder(Adapter):
    """Records on rank 0 (a sharded model on all ranks); see :class:`pdiff_plugin.RecorderConfig` for the settings.

    Snapshots go into the run's own folder in its storage path, if that is a file system of this machine. To resume,
    keep ``state_dict()`` in the loop's checkpoint. With ``condition="hparams"`` the condition is what of the loop's
    configuration can be in one; a list of names picks some.
    """

    requires = Requires("ray")  # a dependency of ours

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        config: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> PDiffRecorder:
        """Follow ``optimizer``; to be called on every worker.

        Args:
            config: the loop's, as Ray gives it to the function; needed where ``condition`` names what is in it.
            total_steps: optimizer steps of the whole run; with it the end of the run is recorded, else the newest
                snapshots are kept.
            steps_per_epoch: optimizer steps in an epoch.
        """
        import ray.train  # takes seconds, and only workers need it

        condition = looked_up(self.recorder.config.condition, config or {}, "the loop's config, attach(config=config)")
        context = ray.train.get_context()
        # With a process group the core knows its rank, and all ranks of a sharded model record.
        if context.get_world_rank() == 0 or torch.distributed.is_initialized():
            self.recorder.attach(
                model,
                optimizer,
                total_steps=total_steps,
                steps_per_epoch=steps_per_epoch,
                default_store=_run_folder(context) / DEFAULT_FOLDER,
                condition=condition,
            )
        return self


def _run_folder(context: TrainContext) -> Path:
    try:
        storage = context.get_storage()
    except NotImplementedError:  # Ray's local mode (num_workers=0) has none
        return Path.cwd()
    is_local = storage.storage_filesystem.type_name == "local"
    return Path(storage.experiment_fs_path) if is_local else Path.cwd()
