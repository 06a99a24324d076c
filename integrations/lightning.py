"""Lightning 2.x, as ``lightning`` or ``pytorch_lightning``.

trainer = Trainer(callbacks=[PDiffRecorder()])
"""

from __future__ import annotations

import os
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff_plugin.config import RecorderConfig
from pdiff_plugin.recording.recorder import DEFAULT_FOLDER
from pdiff_plugin.recording.recorder import PDiffRecorder as Recorder

from ._adapter import Adapter, Requires, hookable, looked_up, with_settings_named

problem: ImportError | None = None
try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError:
        Callback, problem = object, error

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class PDiffRecorder(Adapter, Callback):
    """Records snapshots while a ``Trainer`` fits; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    In a file of ``LightningCLI`` its settings are ``init_args``; one that is null is as if it were not there.

    With manual optimization the number of steps cannot be known, so the newest snapshots are kept.

    With ``condition="hparams"`` the condition of the run is what the module has saved by ``save_hyperparameters()``, as
    far as it is numbers, text, true or false, or lists of numbers; a list of names picks some of these.
    """

    requires = Requires("lightning", problem)

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        config: RecorderConfig | None = None,
        *,
        recorder: Recorder | None = None,
        **changes: Any,
    ) -> None:
        # LightningCLI gives all settings, None where its file has none.
        given = {name: value for name, value in changes.items() if value is not None}
        super().__init__(store, config, recorder=recorder, **given)

    @property
    def state_key(self) -> str:
        """Tells several recorders of one trainer apart in its checkpoints."""
        return f"pdiff_plugin.PDiffRecorder{self.recorder.identity()}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total_steps, per_epoch = trainer.estimated_stepping_batches, trainer.num_training_batches
        is_known = pl_module.automatic_optimization and isfinite(total_steps) and total_steps > 0
        self.recorder.start(
            pl_module,
            total_steps=int(total_steps) if is_known else None,
            steps_per_epoch=ceil(per_epoch / trainer.accumulate_grad_batches)
            if is_known and isfinite(per_epoch)
            else None,
            default_store=Path(trainer.log_dir or trainer.default_root_dir) / DEFAULT_FOLDER,
            default_store_changes=bool(trainer.loggers),  # each has a folder of its own, version_0, version_1, ...
            watch=hookable(trainer.optimizers[0]) if len(trainer.optimizers) == 1 else None,
            condition=looked_up(self.recorder.config.condition, pl_module.hparams, "hparams of the module"),
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Batches also end in the middle of gradient accumulation; observe() skips a step it has seen.
        per_epoch = trainer.num_training_batches
        self.recorder.observe(
            pl_module,
            step=trainer.global_step,
            epoch=trainer.current_epoch + (batch_idx + 1) / per_epoch if isfinite(per_epoch) else None,
            metrics=trainer.callback_metrics,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls neither on_train_end nor teardown after an exception.
        self.close()


# LightningCLI looks there for the names and types of what a file may set.
PDiffRecorder.__init__.__signature__ = with_settings_named(PDiffRecorder.__init__)  # type: ignore[attr-defined]
