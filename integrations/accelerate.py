"""Hugging Face Accelerate: a loop of your own around an ``Accelerator``.

with PDiffRecorder().attach(accelerator, model, optimizer, total_steps=9000):
    train()
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff_plugin.recording.recorder import DEFAULT_FOLDER

from ._adapter import Adapter, Requires

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

problem = None if find_spec("accelerate") else ModuleNotFoundError("No module named 'accelerate'", name="accelerate")


class PDiffRecorder(Adapter):
    """Records after each real step of a prepared optimizer; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    Steps in the middle of ``accelerator.accumulate`` and those that the gradient scaler skips are not recorded, and
    only the main process writes. ``accelerator.save_state`` and ``load_state`` carry the counters.
    """

    requires = Requires("accelerate", problem)

    def attach(
        self,
        accelerator: Any,  # accelerate ships no type information
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> PDiffRecorder:
        """Follow ``optimizer``, before or after ``accelerator.prepare``.

        Args:
            total_steps: optimizer steps of the whole run; with it the end of the run is recorded, else the newest
                snapshots are kept.
            steps_per_epoch: optimizer steps in an epoch.
        """
        self.recorder.attach(
            accelerator.unwrap_model(model),
            optimizer,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            default_store=Path(accelerator.project_dir or ".") / DEFAULT_FOLDER,
        )
        accelerator.register_for_checkpointing(self)
        return self
