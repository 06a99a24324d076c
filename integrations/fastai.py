"""fastai.

learn.fit_one_cycle(5, cbs=PDiffRecorder())
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

from pdiff_plugin.recording.recorder import DEFAULT_FOLDER

from ._adapter import Adapter, Requires

problem: ImportError | None = None
try:
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientAccumulation
except ImportError as error:
    Callback, problem = object, error


class PDiffRecorder(Adapter, Callback):
    """Records snapshots while a ``Learner`` fits; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    Snapshots go below ``learn.path``. To resume with ``start_epoch``, keep ``state_dict()`` beside the saved model.
    fastai has no event for an exception: what is not yet written then follows within seconds, or on ``close()``.
    """

    requires = Requires("fastai", problem)
    run_valid = False

    def before_fit(self) -> None:
        # The learning rate finder and get_preds run a fit of their own.
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds")
        if not self.run:
            return
        self._was_skipped = False
        batches = len(self.learn.dls.train)
        accumulating = [cb for cb in self.learn.cbs if isinstance(cb, GradientAccumulation)]
        self._every = ceil(accumulating[0].n_acc / self.learn.dls.train.bs) if accumulating else 1
        self.recorder.start(
            self.learn.model,
            total_steps=self.learn.n_epoch * batches // self._every or None,
            steps_per_epoch=max(1, batches // self._every),
            default_store=Path(self.learn.path) / DEFAULT_FOLDER,
        )

    def after_cancel_step(self) -> None:
        self._was_skipped = True  # by the gradient scaler

    def after_step(self) -> None:
        was_skipped, self._was_skipped = self._was_skipped, False
        if was_skipped:
            return
        learn = self.learn
        batches = learn.epoch * len(learn.dls.train) + learn.iter + 1
        metrics: dict[str, Any] = {"train_loss": learn.loss.item()}
        if learn.epoch and hasattr(learn, "recorder") and learn.recorder.values:
            metrics |= dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1], strict=False))
        self.recorder.observe(
            learn.model, step=batches // self._every, epoch=batches / len(learn.dls.train), metrics=metrics
        )

    def after_fit(self) -> None:
        self.close()
