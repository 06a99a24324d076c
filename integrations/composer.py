"""MosaicML Composer.

trainer = Trainer(..., callbacks=[PDiffRecorder()])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._adapter import DEFAULT_FOLDER, Adapter, hookable

try:
    from composer.core import Callback, TimeUnit
except ImportError:
    Callback = object


class PDiffRecorder(Adapter, Callback):
    """Records snapshots while a ``Trainer`` fits; see :class:`pdiff_plugin.PDiffRecorder` for the settings.

    The end is known when ``max_duration`` counts epochs or batches; else the newest snapshots are kept. The store is
    below the folder that Composer runs in, unless given.
    """

    _package, _extra, _is_missing = "mosaicml", "composer", Callback is object

    def fit_start(self, state: Any, logger: Any) -> None:
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

    def batch_end(self, state: Any, logger: Any) -> None:
        # One batch is one step: microbatches, and batches tried again after running out of memory, end inside it.
        batch, per_epoch = state.timestamp.batch.value, state.dataloader_len
        epoch = batch / per_epoch.value if per_epoch is not None else None
        self.recorder.observe(state.model, step=batch, epoch=epoch)

    def fit_end(self, state: Any, logger: Any) -> None:
        self.recorder.close()

    def close(self, state: Any = None, logger: Any = None) -> None:
        """Write what is left. Composer calls this when the trainer is closed, after exceptions too."""
        self.recorder.close()
