"""Which conditions of a sweep are still to be recorded: what an interrupted call has finished is not done again."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdiff_plugin.config import CollectConfig, Reinit
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.recording.selection import Selection
from pdiff_plugin.recording.session import finished_at
from pdiff_plugin.snapshots.conditions import (
    Condition,
    check_fits,
    check_same_kind,
    describe_condition,
    parse_condition,
    read_conditions,
)
from pdiff_plugin.snapshots.layout import LAYOUT_NAME
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

DEFAULT_NAME = "sweep"


@dataclass(frozen=True)
class Run:
    """One condition of a sweep.

    Attributes:
        trajectory: its name in the store.
        condition: as it is recorded.
        load: makes its loader.
        is_begun: whether an interrupted call has left rows, which are to be dropped.
        is_complete: whether all its rows are there.
    """

    trajectory: str
    condition: Condition
    load: Callable[[], Any]
    is_begun: bool = False
    is_complete: bool = False

    @property
    def text(self) -> str:
        return describe_condition(self.condition)


def plan_sweep(
    store: Path, conditions: Sequence[Mapping[str, Any]], data: Callable[..., Any] | None, config: CollectConfig
) -> list[Run]:
    """A run for each condition, in their order.

    Runs are named NAME-001, NAME-002, ... . One that the store has is found again among these by its condition, so that
    conditions may be added or put in another order; of equal conditions each has a run of its own.

    Args:
        store: folder that is recorded into.
        conditions: of the sweep.
        data: must take their names.
        config: how each is recorded.

    Raises:
        ConfigError: settings that cannot work with conditions; a finished run with other steps than these would give.
        ConditionError: a condition that is none, or unlike the others here or in the store.
    """
    if config.num_trajectories != 1:
        raise ConfigError(
            "num_trajectories",
            config.num_trajectories,
            "must be 1 with conditions: name a condition several times for several runs at it",
        )
    if isinstance(config.restart, Reinit):
        raise ConfigError(
            "restart", config.restart, "must be Perturb() or Cycle() with conditions: each starts at the given weights"
        )
    if not conditions:
        raise ConfigError("conditions", conditions, "must hold at least one condition")
    parsed = [parse_condition(one, f"conditions[{place}]") for place, one in enumerate(conditions)]
    for place, condition in enumerate(parsed):
        check_same_kind(condition, f"conditions[{place}]", parsed[0], "conditions[0]")
    known, _ = read_conditions(store)
    check_fits(parsed[0], "conditions[0]", known)
    data = _checked(data, parsed[0])

    steps = _recorded_steps(store)
    name = re.compile(re.escape(config.trajectory or DEFAULT_NAME) + r"-\d+")
    own = {run: condition for run, condition in known.items() if name.fullmatch(run)}
    taken = own.keys() | steps.keys()
    runs = []
    for condition, given in zip(parsed, conditions, strict=True):
        found = next((run for run, its in own.items() if its == condition), None)
        if found is None:
            found = next(
                free
                for number in range(1, len(taken) + 2)
                if (free := f"{config.trajectory or DEFAULT_NAME}-{number:03d}") not in taken
            )
        own.pop(found, None)
        taken |= {found}
        is_complete = _is_complete(store, found, steps.get(found, []), condition, config)
        runs.append(Run(found, condition, partial(data, **given), not is_complete and found in steps, is_complete))
    num_complete = sum(run.is_complete for run in runs)
    if num_complete:
        logger.info("%d of %d conditions are recorded in %s already", num_complete, len(runs), store)
    return runs


def check_goes_on(store: Path, runs: Sequence[Run], model: nn.Module, selection: Selection) -> None:
    """Check that a sweep goes on from the network that it began with.

    Args:
        store: that is recorded into.
        runs: of the sweep.
        model: to go on from.
        selection: the tensors that are trained; all other parameters must be those of the finished runs.

    Raises:
        LayoutMismatchError: other tensors were trained.
        ConfigError: a parameter that has other values.
    """
    finished = [run for run in runs if run.is_complete]
    if not finished:
        return
    opened = SnapshotStore.open(store)
    opened.layout.check_same(selection.layout, f"the store {store}")
    for run in finished:
        base = opened.base(run.trajectory)
        if base is None:
            continue
        for name, tensor in named_tensors(model).items():
            if name in selection.tensors or not isinstance(tensor, nn.Parameter) or name not in base:
                continue
            if not torch.equal(tensor.detach().cpu(), base[name]):
                raise ConfigError(
                    "model",
                    type(model).__name__,
                    f"must be the network that {run.trajectory} in {store} was recorded from, whose {name!r} has other "
                    "values: load the same weights, or choose another store or `trajectory`",
                )
        return


def _checked(data: Callable[..., Any] | None, condition: Condition) -> Callable[..., Any]:
    expected = f"must be a function that takes {', '.join(condition)} and returns the loader for such a condition"
    if not callable(data):
        raise ConfigError("data", data, expected)
    try:
        inspect.signature(data).bind(**condition)
    except ValueError:  # some functions written in C do not tell their signature
        pass
    except TypeError as error:
        raise ConfigError("data", data, f"{expected} ({error})") from error
    return data


def _recorded_steps(store: Path) -> dict[str, list[int]]:
    """Steps of each trajectory that has rows."""
    if not (store / LAYOUT_NAME).is_file():
        return {}
    opened = SnapshotStore.open(store)
    index = opened.trajectory_index
    return {name: opened.steps[index == number].tolist() for number, name in enumerate(opened.trajectories)}


def _is_complete(store: Path, trajectory: str, steps: list[int], condition: Condition, config: CollectConfig) -> bool:
    """Whether these are all the steps of a run; False for the first of them, as an interrupted call leaves behind."""
    num_warmup = config.restart.num_warmup(config.num_snapshots)
    expected = list(range(num_warmup + 1, num_warmup + config.num_snapshots + 1))
    is_begun = 0 < len(steps) < len(expected)
    if steps != expected[: len(steps)] or (is_begun and finished_at(store, trajectory) == steps[-1]):
        raise ConfigError(
            "num_snapshots",
            config.num_snapshots,
            f"would record steps {expected[0]} to {expected[-1]}, but {trajectory} ({describe_condition(condition)}) "
            f"holds {len(steps)} snapshots of steps {steps[0]} to {steps[-1]}: give the settings that it was recorded "
            "with, or choose another `trajectory` or store",
        )
    return len(steps) == len(expected)
