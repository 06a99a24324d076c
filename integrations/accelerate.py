"""Hugging Face Accelerate: a loop of your own around an ``Accelerator``.

with PDiffRecorder().attach(accelerator, model, optimizer, total_steps=9000):
    train()
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._adapter import DEFAULT_FOLDER, Adapter


class PDiffRecorder(Adapter):
    """Records after each real step of a prepared optimizer; see :class:`pdiff_plugin.PDiffRecorder` for the settings.

    Steps in the middle of ``accelerator.accumulate`` and those that the gradient scaler skips are not recorded, and
    only the main process writes. ``accelerator.save_state`` and ``load_state`` carry the counters.
    """

    _package, _extra, _is_missing = "accelerate", "accelerate", find_spec("accelerate") is None

    def attach(
        self,
        accelerator: Any,
        model: Any,
        optimizer: Any,
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
