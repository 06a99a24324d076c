"""Which conditions an evaluation judges: those that the generator was not fitted on.

Shapes: R recorded conditions, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_plugin.errors import ConditionError, ConfigError
from pdiff_plugin.generator.variables import Variables
from pdiff_plugin.snapshots.conditions import Condition, matching

HELD_OUT = "held-out"
_SHARE, _LEAST = 0.25, 4
# Fewer fitted conditions than this tell nothing of what lies between them.
_LEAST_FITTED = 3


@dataclass(frozen=True)
class Place:
    """A condition at which rows are judged.

    Attributes:
        condition: names and values.
        runs: trajectories that were recorded at it.
        outside: a sentence for each value outside what was fitted; empty inside.
    """

    condition: Condition
    runs: tuple[str, ...]
    outside: tuple[str, ...] = ()


def key_of(condition: Mapping[str, object]) -> str:
    """The same text for equal conditions."""
    return json.dumps(condition, sort_keys=True)


def by_condition(conditions: Mapping[str, Condition]) -> list[tuple[str, ...]]:
    """Trajectories that share one condition, in the order of the first of them."""
    groups: dict[str, list[str]] = {}
    for run, condition in conditions.items():
        groups.setdefault(key_of(condition), []).append(run)
    return [tuple(runs) for runs in groups.values()]


def runs_to_judge(
    conditions: Mapping[str, Condition], fitted: Sequence[str], wanted: Sequence[str], variables: Variables, seed: int
) -> tuple[list[str], bool]:
    """The trajectories to judge at, and whether the generator has to be fitted again without them.

    Args:
        conditions: trajectory -> condition, of the whole store.
        fitted: trajectories that the generator was fitted on.
        wanted: ``held-out``, or trajectories as :func:`pdiff_plugin.snapshots.conditions.matching` takes them.
        variables: of the generator.
        seed: of the choice, where nothing was held out.

    Raises:
        ConditionError: no such run; or too few would be left to be fitted on.
    """
    if list(wanted) == [HELD_OUT]:
        runs = [run for run in conditions if run not in set(fitted)]
        if runs:
            return runs, False
        chosen = spread_over_range(conditions, variables, seed)
    else:
        chosen = matching(conditions, wanted, "--conditions")
    # A run at the same condition would give its answer away.
    keys = {key_of(conditions[run]) for run in chosen}
    runs = [run for run, condition in conditions.items() if key_of(condition) in keys]
    left = {key_of(conditions[run]) for run in fitted} - keys
    if len(left) < _LEAST_FITTED:
        raise ConditionError(
            "--conditions", f"{len(left)} of {len(by_condition(conditions))} conditions left to fit", "at least 3"
        )
    return runs, not set(runs).isdisjoint(fitted)


def spread_over_range(conditions: Mapping[str, Condition], variables: Variables, seed: int) -> list[str]:
    """Trajectories at a quarter of the conditions, four at least, spread over the recorded ones.

    A tour from each condition to the nearest one not yet visited, of which every fourth is taken. No category loses all
    of its runs.

    Raises:
        ConditionError: too few would be left to be fitted on.
    """
    groups = by_condition(conditions)
    R = len(groups)
    count = max(_LEAST, round(_SHARE * R))
    if R - count < _LEAST_FITTED:
        raise ConditionError("the store", f"{R} different conditions", f"at least {_LEAST + _LEAST_FITTED} to judge at")
    features = variables.encode([conditions[runs[0]] for runs in groups])
    rng = torch.Generator().manual_seed(seed)
    tour = _tour(features, int(torch.randint(R, (), generator=rng)))
    start = float(torch.rand((), generator=rng))
    picked = [tour[int((start + number) * R / count)] for number in range(count)]
    kept: list[int] = []
    for group in picked:
        rest = [conditions[groups[other][0]] for other in range(R) if other not in (*kept, group)]
        mine = conditions[groups[group][0]]
        if all(
            any(other[variable.name] == mine[variable.name] for other in rest)
            for variable in variables.variables
            if variable.kind == "category"
        ):
            kept.append(group)
    if not kept:
        raise ConditionError("the store", "categories of one run each", "several runs of a category to judge at")
    return [run for group in sorted(kept) for run in groups[group]]


def _tour(features: Tensor, start: int) -> list[int]:
    distances = torch.cdist(features.double(), features.double())
    tour = [start]
    while len(tour) < len(features):
        near = distances[tour[-1]].clone()
        near[tour] = torch.inf
        tour.append(int(near.argmin()))
    return tour


def places_of(
    conditions: Mapping[str, Condition], runs: Sequence[str], fitted: Sequence[str], variables: Variables
) -> tuple[list[Place], list[str]]:
    """The different conditions of ``runs``, and a sentence for what is left out of them.

    Raises:
        ConfigError: nothing is left.
    """
    places, notes = [], []
    known = {key_of(conditions[run]) for run in fitted}
    for group in by_condition({run: conditions[run] for run in runs}):
        condition, names = conditions[group[0]], ", ".join(group)
        if key_of(condition) in known:
            notes.append(f"{names}: left out, other runs of the same condition were fitted.")
            continue
        try:
            variables.encode([condition])
        except ConditionError as error:
            notes.append(f"{names}: left out, the generator cannot be asked for {error.found}.")
            continue
        places.append(Place(condition, group, tuple(variables.outside(condition))))
    if not places:
        raise ConfigError("conditions", ", ".join(runs), f"must be some that can be judged. {' '.join(notes)}")
    return places, notes
