"""MosaicML Composer.

trainer = Trainer(..., callbacks=[PDiffRecorder()])
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdiff_plugin.recording.recorder import DEFAULT_FOLDER

from ._adapter import Adapter, Requires, hookable

problem: ImportError | None = None
try:
    from composer.core import Callback, TimeUnit
except ImportError as error:
    Callback, problem = object, error

if TYPE_CHECKING:
    from composer.core import State
    from composer.loggers import Logger


class PDiffRecorder(Adapter, Callback):
    """Records snapshots while a ``Trainer`` fits; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    The end is known when ``max_duration`` counts epochs or batches; else the newest snapshots are kept. The store is
    below the folder that Composer runs in, unless given.
    """

    requires = Requires("composer", problem, package="mosaicml")

    def fit_start(self, state: State, logger: Logger) -> None:
        per_epoch, end = state.dataloader_len, state.max_duration
        total_steps = None
        if end is not None and end.unit == TimeUnit.BATCH:
            total_steps = int(end.value)
        elif end is not None and end.unit == TimeUnit.EPOCH and per_epoch is not None:
            total_steps = int(end.value) * int(per_epoch.value)
        self.recorder.start(
            state.model,
            total_steps=total_steps,
            steps_per_epoch=int(per_epoch.value) if per_epoch is not None else None,
            default_store=Path(DEFAULT_FOLDER),
            watch=hookable(state.optimizers[0]) if len(state.optimizers) == 1 else None,
        )

    def batch_end(self, state: State, logger: Logger) -> None:
        # One batch is one step: microbatches, and batches tried again after running out of memory, end inside it.
        batch, per_epoch = state.timestamp.batch.value, state.dataloader_len
        epoch = batch / per_epoch.value if per_epoch is not None else None
        self.recorder.observe(state.model, step=batch, epoch=epoch)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.recorder.close()

    def close(self, state: State | None = None, logger: Logger | None = None) -> None:
        """Write what is left. Composer calls this when the trainer is closed, after exceptions too."""
        self.recorder.close()
