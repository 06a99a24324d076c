"""A function that Ray Tune trains a trial with (``ray.tune.Tuner(train)``).

def train(config):
    with PDiffRecorder(condition="hparams").attach(model, optimizer, config=config, total_steps=9000):
        train_and_report()
"""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff_plugin.config import RecorderConfig
from pdiff_plugin.errors import (
    ConditionError,
    FormatError,
    FormatVersionError,
    LayoutMismatchError,
    StoreNotFoundError,
    TrajectoryExistsError,
)
from pdiff_plugin.recording.recorder import DEFAULT_FOLDER
from pdiff_plugin.recording.recorder import PDiffRecorder as Recorder
from pdiff_plugin.recording.session import finished_at
from pdiff_plugin.snapshots.conditions import parse_condition, read_conditions
from pdiff_plugin.snapshots.ownership import holder

from ._adapter import Adapter, Requires, looked_up

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

# What a store that is there already may be the matter of: it costs the recording of a trial, not the trial.
_OF_THE_STORE = (
    ConditionError,
    FormatError,
    FormatVersionError,
    LayoutMismatchError,
    StoreNotFoundError,
    TrajectoryExistsError,
    OSError,
)


class PDiffRecorder(Adapter):
    """Records a trial as a trajectory that has its id; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    Snapshots go into the trial's own folder in the storage path, if that is a file system of this machine; a relative
    ``store`` is below that folder. With ``condition="hparams"`` the condition is what of the trial's configuration can
    be in one; a list of names picks some.

    What was recorded is on disk before each ``tune.report``, where a scheduler may end the trial. To go on after a
    pause or a failure, keep ``state_dict()`` in the trial's checkpoint and give it to ``load_state_dict()`` before
    ``attach()``. A trial that goes on from another's checkpoint or with another condition begins a new trajectory, and
    a store that cannot be used is a warning: the trial goes on without it.
    """

    requires = Requires("ray")  # a dependency of ours

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        config: RecorderConfig | None = None,
        *,
        recorder: Recorder | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(store, config, recorder=recorder, **changes)
        self._prefix = self.recorder.config.trajectory
        self._counters: dict[str, Any] | None = None  # from a checkpoint

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's counters; to be called before :meth:`attach`."""
        self._counters = dict(state_dict)

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        config: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> PDiffRecorder:
        """Follow ``optimizer``; outside of a trial as a recorder of a loop of your own.

        Args:
            config: the trial's, as Tune gives it to the function; needed where ``condition`` names what is in it.
            total_steps: optimizer steps of the whole trial, should no scheduler end it; with it the end of the trial is
                recorded, else the newest snapshots are kept.
            steps_per_epoch: optimizer steps in an epoch.

        Raises:
            ConfigError: settings that cannot work, in any trial.
            SelectionError: ``layers`` picks nothing that is trained.
        """
        condition = looked_up(self.recorder.config.condition, config or {}, "the trial's config, attach(config=config)")
        trial = _Trial.of_this_thread()
        default_store = (trial.folder if trial else Path.cwd()) / DEFAULT_FOLDER
        try:
            if condition is not None:
                condition = parse_condition(condition, "this trial")
            if trial is not None:
                self._find_place(trial, default_store, condition or self.recorder.config.condition)
                _flush_before_reports(self.recorder)
            elif self._counters is not None:
                self.recorder.load_state_dict(self._counters)
            self.recorder.attach(
                model,
                optimizer,
                total_steps=total_steps,
                steps_per_epoch=steps_per_epoch,
                default_store=default_store,
                condition=condition,
            )
        except _OF_THE_STORE as error:
            logger.warning("this trial is not recorded, and goes on: %s", error)
        self._counters = None
        return self

    def _find_place(self, trial: _Trial, default_store: Path, condition: Any) -> None:
        """Have the recorder go on in the trial's trajectory, or begin one that has its id."""
        recorder, counters = self.recorder, self._counters
        if recorder.store is not None:
            recorder.store = str(trial.folder / recorder.store)
        store = Path(recorder.store or default_store)
        name = f"{self._prefix}-{trial.id}" if self._prefix else trial.id
        if counters is None and not trial.has_checkpoint:
            recorder.config = replace(recorder.config, trajectory=_free(store, name, replace_unfinished=True))
            return
        reason: str | None
        if counters is None:
            counters = {"step": 0, "trajectory": None}
            reason = "steps are counted from here on, since the recorder's state_dict() is not kept in it"
        else:
            reason = _reason_to_begin_anew(store, name, counters, condition)
        if reason is not None:
            counters["trajectory"] = _free(store, name)
            logger.warning(
                "trial %s goes on from a checkpoint in a new trajectory, %s: %s",
                *(trial.id, counters["trajectory"], reason),
            )
        recorder.config = replace(recorder.config, trajectory=None)
        recorder.load_state_dict({**counters, "store": str(store)})


@dataclass(frozen=True)
class _Trial:
    """The trial that this thread trains.

    Attributes:
        id: of Tune.
        folder: of its own, where its checkpoints are, too.
        has_checkpoint: whether it goes on from one.
    """

    id: str
    folder: Path
    has_checkpoint: bool

    @classmethod
    def of_this_thread(cls) -> _Trial | None:
        """None outside of Tune, of which it warns."""
        from ray import tune  # takes seconds, and only trials need it

        context = tune.get_context()
        trial_id, storage = context.get_trial_id(), context.get_storage()
        if trial_id is None:
            return None
        folder = Path(storage.trial_fs_path)
        if storage.storage_filesystem.type_name != "local":
            # The context's own get_trial_dir() is a folder of the driver's.
            folder = Path(storage.trial_working_directory)
            logger.warning(
                "the storage path of trial %s is no file system of this machine: its snapshots are in %s, "
                "to be copied there after the run",
                trial_id,
                folder,
            )
        return cls(trial_id, folder, tune.get_checkpoint() is not None)


def _reason_to_begin_anew(store: Path, name: str, counters: Mapping[str, Any], condition: Any) -> str | None:
    """Why a trial cannot go on in the trajectory that its checkpoint names; None if it can.

    Args:
        store: of the trial.
        name: of its first trajectory.
        counters: from the checkpoint.
        condition: that it goes on at.
    """
    found, step = counters["trajectory"] or "a trial without snapshots", int(counters["step"])
    if not re.fullmatch(rf"{re.escape(name)}(-\d+)?", found):
        return f"it is of step {step} of {found}"
    recorded = read_conditions(store)[0].get(found)
    if recorded is not None and recorded != condition:
        return f"the condition is now {condition}, and that of {found} is {recorded}"
    if (end := finished_at(store, found)) > step:
        return f"{found} has since been recorded to its end at step {end}"
    return None


def _free(store: Path, name: str, *, replace_unfinished: bool = False) -> str:
    """``name``, or the first of ``name-2``, ``name-3``, ... that is no trajectory of ``store`` yet.

    Args:
        replace_unfinished: one that has no rows of its window will do, too: the recorder replaces it.
    """
    number, found = 1, name
    while (folder := store / "trajectories" / found).exists():
        if replace_unfinished and not any(folder.glob("chunk-*")) and holder(folder) is None:
            break
        number += 1
        found = f"{name}-{number}"
    return found


_attached: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _flush_before_reports(recorder: Recorder) -> None:
    """Have every snapshot of ``recorder`` on disk when this trial reports.

    A scheduler ends a trial by an exception out of its report, and its process about a tenth of a second later: too
    soon for what is still in memory. Ray has no event for it.
    """
    from ray.train._internal.session import get_session

    session = get_session()
    assert session is not None
    _attached.add(recorder)
    if "report" in vars(session):  # done for another recorder, or for another trial in the same process
        return
    report = session.report

    def flush_and_report(*args: Any, **kwargs: Any) -> None:
        for one in list(_attached):
            one.flush()
        report(*args, **kwargs)

    session.report = flush_and_report  # type: ignore[method-assign]  # of this one object, which has no event for it
