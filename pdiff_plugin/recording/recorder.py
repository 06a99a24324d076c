"""`PDiffRecorder`: takes snapshots of chosen layers while a model trains, and disturbs nothing.

With the recorder attached a run ends in the same weights, optimizer state and random state as without it, bit for bit
(``freeze_rest=True`` is the one setting that changes training, and says so). A step pays for one copy of the chosen
tensors; files are written by a background thread.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pdiff_plugin.config import RecorderConfig, configured
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.recording.hooks import StepHook, unwrap_optimizer
from pdiff_plugin.recording.session import Outcome, Session, world_size
from pdiff_plugin.recording.termination import close_on_sigterm, forget
from pdiff_plugin.recording.window import Window
from pdiff_plugin.snapshots.conditions import parse_condition
from pdiff_plugin.snapshots.remote import is_remote

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = "pdiff-snapshots"


class PDiffRecorder:
    """Records snapshots of chosen layers into a store.

        with PDiffRecorder("runs/a").attach(model, optimizer, total_steps=9000):
            train()

    Args:
        store: the store's folder, made when the first snapshot is written; ``./pdiff-snapshots`` unless given (or
            ``./pdiff-snapshots-2`` and so on, where that is for other tensors: of a second network, say).
        config: what is recorded and when; for ``layers`` see :func:`~pdiff_plugin.recording.selection.select`.
        changes: single fields of :class:`~pdiff_plugin.config.RecorderConfig`: ``PDiffRecorder(layers="head")``.

    Raises:
        ConfigError: a setting that cannot work.
        ConditionError: a ``condition`` that is none.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        config: RecorderConfig | None = None,
        **changes: Any,
    ) -> None:
        if store is not None and is_remote(store):
            raise ConfigError("store", store, "must be a folder of this machine; copy it to the bucket after the run")
        self.store = None if store is None else os.fspath(store)
        self.config = configured(RecorderConfig, config, changes)
        condition = self.config.condition
        if condition is not None and not is_by_name(condition):
            # Plain values, which a checkpoint can hold, whatever becomes of the user's own.
            self.config = replace(self.config, condition=parse_condition(condition, "this run"))
        self._outcome = Outcome()
        self._session: Session | None = None
        self._lock = threading.RLock()  # several threads may train one model
        self._hook: StepHook | None = None
        self._is_watching = False  # whether the hook only tells observe() that a step was really taken
        self._took_step = False
        self._found_inf: Tensor | None = None
        self._state: dict[str, Any] = {"step": 0, "trajectory": self.config.trajectory, "store": self.store}
        self._is_restored = False  # whether _state came from a checkpoint and waits for start()

    @property
    def error(self) -> Exception | None:
        """Why recording stopped early, if it did."""
        return self._outcome.error

    @property
    def rest_drift(self) -> float | None:
        """Relative L2 change of the trained tensors that were not recorded, over the window; None until known."""
        return self._outcome.rest_drift

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        averaged: bool = False,
        default_store: str | os.PathLike[str] = DEFAULT_FOLDER,
        condition: Mapping[str, Any] | None = None,
    ) -> PDiffRecorder:
        """Record ``model`` after each step of ``optimizer``; leave the optimizer out to call :meth:`step` yourself.

        Args:
            model: wrapped or not (DistributedDataParallel, ``torch.compile``).
            optimizer: any torch optimizer; of several, the last that trains a chosen tensor is followed.
            total_steps: optimizer steps of the whole run, resumed part included.
            steps_per_epoch: optimizer steps in an epoch, for ``last_epochs``.
            averaged: ``model`` is an averaged copy (EMA, SWA), whose parameters need no gradient.
            default_store: folder to use when the recorder was built without one.
            condition: for trainer adapters; see :meth:`start`.

        Raises:
            SelectionError: ``layers`` picks nothing that is trained.
            NotHookableError: ``optimizer`` has no step hooks.
            LayoutMismatchError: the store holds snapshots of other tensors.
            ConditionError: ``condition`` does not fit those of the other runs in the store.
            UnsupportedTensorError: the model is sharded, and not by ``fully_shard``.
        """
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer] if optimizer is not None else []
        optimizers = [unwrap_optimizer(one) for one in given]
        self.start(
            model,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            averaged=averaged,
            default_store=default_store,
            condition=condition,
        )
        assert self._session is not None
        if optimizers:
            chosen = {id(tensor) for tensor in self._session.selection().tensors.values()}
            owners = [
                o for o in optimizers if any(id(p) in chosen for group in o.param_groups for p in group["params"])
            ]
            self._hook = StepHook((owners or optimizers)[-1], self._on_optimizer_step)
        return self

    def start(
        self,
        model: nn.Module,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        averaged: bool = False,
        default_store: str | os.PathLike[str] = DEFAULT_FOLDER,
        default_store_changes: bool = False,
        watch: Any = None,
        condition: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a run that :meth:`observe` or :meth:`step` will follow. For trainer adapters; see :meth:`attach`.

        Args:
            default_store_changes: whether ``default_store`` is another one each time a run is resumed (Lightning's
                ``version_N``); it then goes on in the store of its checkpoint.
            watch: the optimizer, if torch's; :meth:`observe` then records nothing unless it has taken a step (not in
                the middle of gradient accumulation, not a step that the gradient scaler skipped).
            condition: what the trainer has under the names that ``condition`` of the settings asks for.
        """
        self.close()
        config = self.config
        if is_by_name(config.condition):
            if condition is None:
                raise ConfigError(
                    "condition",
                    config.condition,
                    "must be a dict of names to values here: only Lightning, transformers and Ray have values to look "
                    "up",
                )
            config = replace(config, condition=parse_condition(condition, "this run"))
        window = Window.plan(self.config, total_steps, steps_per_epoch)
        if self.config.freeze_rest and total_steps is None:
            raise ConfigError("freeze_rest", True, "needs to know where the window begins: pass total_steps")
        if self.config.freeze_rest and world_size() > 1:
            raise ConfigError(
                "freeze_rest", True, "cannot be used in distributed training, which expects all gradients"
            )
        restored_store = self._state.get("store") if self._is_restored and default_store_changes else None
        if restored_store is not None and not Path(restored_store).is_dir():
            restored_store = None  # the checkpoint was moved to another machine
        # The training may change its working folder (Hydra does), the store must not move with it.
        store = Path(os.path.abspath(self.store or restored_store or default_store))
        self._session = Session(
            model,
            config,
            window,
            store,
            is_default_store=self.store is None,
            steps_per_epoch=steps_per_epoch,
            averaged=averaged,
        )
        self._outcome = self._session.outcome
        if self._is_restored:
            self._session.restore(self._state)
            self._is_restored = False
        self._is_watching = watch is not None
        if watch is not None:
            self._hook = StepHook(unwrap_optimizer(watch), self._on_watched_step)
        atexit.register(_close_at_exit, weakref.ref(self))
        close_on_sigterm(self)

    def step(self, epoch: float | None = None, metrics: Mapping[str, Any] | None = None) -> None:
        """Say that an optimizer step has been taken. Not needed when :meth:`attach` was given the optimizer."""
        if self._session is None:
            raise ConfigError("model", None, "must be given with attach(model) before step() is called")
        with self._lock:
            self._session.observe(self._session.step + 1, epoch, metrics)

    def observe(
        self,
        model: nn.Module,
        *,
        step: int | None = None,
        epoch: float | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Say that ``model`` has taken optimizer step number ``step``; a step that was seen before is skipped.

        Without :meth:`start` the run's length counts as unknown. Without a number it is the next step.
        """
        if self._session is None:
            self.start(model)
        assert self._session is not None
        with self._lock:
            took_step, found_inf = self._took_step or not self._is_watching, self._found_inf
            self._took_step, self._found_inf = False, None
            if took_step and (step is None or step > self._session.step):
                self._session.observe(self._session.step + 1 if step is None else step, epoch, metrics, found_inf)

    def close(self) -> None:
        """Write what is left and let go of the model. May be called again."""
        with self._lock:
            hook, session, self._hook, self._session = self._hook, self._session, None, None
            if hook is not None:
                hook.remove()
            if session is not None:
                forget(self)
                session.close()
                self._state = session.counters()

    def flush(self) -> None:
        """Return when every snapshot so far is on disk, or writing has failed."""
        with self._lock:
            if self._session is not None:
                self._session.flush()

    def state_dict(self) -> dict[str, Any]:
        """Counters for a checkpoint, as plain JSON. Every snapshot so far is on disk when this returns."""
        with self._lock:
            return self._session.state() if self._session is not None else dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run from its checkpoint: snapshots past its step are dropped, none is taken twice.

        A run that was recorded to its end, or in another store, is left alone: another trajectory is begun.
        """
        self._state, self._is_restored = dict(state), True
        if self._session is not None:
            self._session.restore(self._state)
            self._is_restored = False

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON; of a function as ``layers`` only its name."""
        return {"store": self.store, **self.config.to_json()}

    def identity(self) -> dict[str, Any]:
        """The settings without ``condition``, by which a checkpoint knows its recorder again: one that goes on with
        another condition is to be told so, not taken for a stranger.
        """
        return {name: value for name, value in self.settings().items() if name != "condition"}

    def __getstate__(self) -> dict[str, Any]:
        """The settings, and what was restored: a copy takes no part in the run that is being recorded."""
        if self._session is not None:
            logger.warning(
                "a running recorder was copied or pickled: the copy has its settings, not its run. To go on from a "
                "checkpoint, keep state_dict() in it."
            )
        state = self._state if self._session is None else PDiffRecorder(self.store, self.config)._state
        return {"store": self.store, "config": self.config, "state": state, "is_restored": self._is_restored}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(PDiffRecorder(state["store"], state["config"])))
        self._state, self._is_restored = dict(state["state"]), state["is_restored"]

    def __enter__(self) -> PDiffRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _on_optimizer_step(self, optimizer: Optimizer) -> None:
        self._on_watched_step(optimizer)
        if self._session is not None and self._took_step:
            self._session.observe(self._session.step + 1, None, None, self._found_inf)
        self._took_step, self._found_inf = False, None

    def _on_watched_step(self, optimizer: Optimizer) -> None:
        # Fused optimizers run their hooks for steps that the gradient scaler made them skip, too.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            self._took_step = True
        elif found_inf.is_cuda:  # reading it would wait for the device; the writer drops the row
            self._took_step, self._found_inf = True, found_inf.clone()
        else:
            self._took_step = not found_inf.item()


def is_by_name(condition: Any) -> bool:
    """Whether values are to be looked up in the trainer: ``"hparams"``, or a list of names."""
    return isinstance(condition, str) or (
        isinstance(condition, list | tuple) and all(isinstance(name, str) for name in condition)
    )


def _close_at_exit(recorder: weakref.ref[PDiffRecorder]) -> None:
    alive = recorder()
    if alive is not None:
        alive.close()
