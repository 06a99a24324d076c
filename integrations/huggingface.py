"""Hugging Face transformers: the ``Trainer`` and those built on it (TRL, PEFT models).

trainer = Trainer(..., callbacks=[PDiffRecorder()])
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pdiff_plugin.recording.recorder import DEFAULT_FOLDER

from ._adapter import Adapter, Requires, hookable, looked_up

problem: ImportError | None = None
try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    TrainerCallback, ExportableState, problem = object, type("ExportableState", (), {}), error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class PDiffRecorder(Adapter, ExportableState, TrainerCallback):
    """Records snapshots while a ``Trainer`` trains; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    Snapshots go below ``args.output_dir``. A resumed training continues the recording of its checkpoint. The trainer
    has no event for an exception: what is not yet written then follows within seconds, or on ``close()``.

    With ``condition="hparams"`` the condition of the run is what a hyperparameter search has chosen for its trial; a
    list of names picks some of these, or fields of ``args``: ``condition=["learning_rate"]``.
    """

    requires = Requires("transformers", problem, extra="huggingface")
    _metrics: Mapping[str, Any] = MappingProxyType({})  # the newest value of each that was logged

    @property
    def counters(self) -> Mapping[str, Any]:
        """The recorder's counters; the trainer sets them when it rebuilds callbacks from a checkpoint."""
        return self.recorder.state_dict()

    @counters.setter
    def counters(self, counters: Mapping[str, Any]) -> None:
        self.recorder.load_state_dict(counters)

    def state(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps: from ``args`` it can build this callback anew."""
        return {"args": self.recorder.settings(), "attributes": {"counters": self.counters}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Unless told to restore callbacks, a resumed trainer leaves their states in its own.
        if state.global_step:
            saved = state.stateful_callbacks.get(type(self).__name__, [])
            for one in saved if isinstance(saved, list) else [saved]:
                settings = {name: value for name, value in one["args"].items() if name != "condition"}
                if settings == self.recorder.identity():
                    self.counters = one["attributes"]["counters"]
        num_epochs = state.num_train_epochs
        self.recorder.start(
            kwargs["model"],
            total_steps=state.max_steps if state.max_steps > 0 else None,
            # max_steps without a length of the data comes with a huge number of epochs
            steps_per_epoch=round(state.max_steps / num_epochs) if 0 < num_epochs <= state.max_steps else None,
            default_store=Path(args.output_dir) / DEFAULT_FOLDER,
            watch=hookable(kwargs.get("optimizer")),
            condition=looked_up(
                self.recorder.config.condition, state.trial_params or {}, "a trial of a search (and args)", vars(args)
            ),
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder.observe(kwargs["model"], step=state.global_step, epoch=state.epoch, metrics=self._metrics)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._metrics = {**self._metrics, **(logs or {})}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
