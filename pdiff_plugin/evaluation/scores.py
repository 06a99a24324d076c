"""Run sets of members over data, keeping what every metric needs and nothing that grows with the classes.

Shapes: M members of a set, U of a pool that sets share, B items in a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.evaluation.kind import Scores, TaskKind, ensemble_sizes
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.task import Data, Task, batches, evaluating
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.batches import num_batches_in
from pdiff_plugin.progress import OnProgress, Progress

# Batches whose FLOPs are counted: in the first an ensemble may still try what works, the last counted one is believed.
_NUM_COUNTED = 2
_OF_EVERY_KIND = ("member_loss", "member_score", "loss", "score", "half_difference", "uncertainty")


@dataclass(frozen=True)
class View:
    """A set whose members are some of a pool's, in any order and as often as wanted: places (M,) in ``pool``."""

    pool: str
    places: Tensor


def score_sets(
    task: Task,
    sets: Mapping[str, WeightSet],
    data: Data | None = None,
    *,
    views: Mapping[str, View] | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Scores], Tensor]:
    """Score every set in one pass over the data: batch outside, sets and members inside.

    One pass keeps the items of the sets aligned whatever the order in which a loader gives them.

    Args:
        task: the model, and how its answers are scored.
        sets: name -> members.
        data: other data than the task's own ``eval_loader``.
        views: sets to score instead, of which ``sets`` are the pools: a member of several is run once.
        seed: of the order in which members join the smaller ensembles (those of a trajectory are ordered in time).
        on_progress: told the number of batches done, times that of the sets.

    Returns:
        Name of set or view -> scores, and the targets met, (items, ...).
    """
    data, kind = data or task.data, KINDS[task.kind]
    if views is None:
        views = {key: View(key, torch.arange(weights.num_members)) for key, weights in sets.items()}
    total = num_batches_in(data.loader)
    seen: list[Tensor] = []
    with evaluating(task) as model, torch.no_grad():
        runs = {
            pool: _Run(model, weights, kind, {key: v.places for key, v in views.items() if v.pool == pool}, seed)
            for pool, weights in sets.items()
        }
        flops_per_item = 0.0
        for number, (args, kwargs, targets) in enumerate(batches(data, kind, task.target_device())):
            if number == 0:
                with FlopCounterMode(display=False) as counter:
                    model(*args, **kwargs)
                flops_per_item = counter.get_total_flops() / len(targets)
            seen.append(targets)
            for place, (pool, run) in enumerate(runs.items()):
                run.score(args, kwargs, targets, data.name)
                if on_progress is not None:
                    done, in_all = number * len(runs) + place + 1, max(total, number + 1) * len(runs)
                    on_progress(Progress("score", done, in_all, text=pool))
    found = {key: scores for run in runs.values() for key, scores in run.scores(flops_per_item).items()}
    return {key: found[key] for key in views}, torch.cat(seen)


class Scorer(Protocol):
    """:func:`score_sets`, or something that does its work elsewhere."""

    def __call__(
        self,
        task: Task,
        sets: Mapping[str, WeightSet],
        data: Data | None = None,
        *,
        views: Mapping[str, View] | None = None,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> tuple[dict[str, Scores], Tensor]: ...


class _Run:
    """One pool of members, and the sets made of them, on its way through the data."""

    def __init__(
        self, model: nn.Module, weights: WeightSet, kind: TaskKind, sets: Mapping[str, Tensor], seed: int
    ) -> None:
        self.kind, self.sets, self.num_members = kind, sets, weights.num_members
        everyone = torch.arange(self.num_members)
        # Outputs may be large: those of a pool that is one set are not copied.
        self.picks = {key: slice(None) if torch.equal(places, everyone) else places for key, places in sets.items()}
        self.ensemble = DiffusionEnsemble(model, weights, copy=False)
        self.orders = {
            key: torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
            for key, places in sets.items()
        }
        self.parts: dict[str, list[dict[str, Tensor]]] = {key: [] for key in sets}
        self.items: list[int] = []
        self.flops_per_item = 0.0
        self.seconds: list[float] = []

    def score(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Tensor, name: str) -> None:
        started = time.perf_counter()
        if len(self.items) >= _NUM_COUNTED:
            outputs = self.ensemble.members(*args, **kwargs)
        else:
            with FlopCounterMode(display=False) as counter:
                outputs = self.ensemble.members(*args, **kwargs)
            self.flops_per_item = counter.get_total_flops() / len(targets)
        outputs = self.kind.check_outputs(outputs, targets, name).cpu()  # (U, B, ...); waits for the device
        self.seconds.append(time.perf_counter() - started)
        self.items.append(len(targets))
        for key, pick in self.picks.items():
            self.parts[key].append(self.kind.score_batch(outputs[pick], targets, self.orders[key]))

    def scores(self, flops_per_item: float) -> dict[str, Scores]:
        # Counting takes time: batches without it stand for all, where there are such.
        first = _NUM_COUNTED if len(self.items) > _NUM_COUNTED else 0
        seconds = sum(self.seconds[first:]) * sum(self.items) / sum(self.items[first:])
        return {key: self._scores_of(key, seconds, flops_per_item) for key in self.sets}

    def _scores_of(self, key: str, seconds: float, flops_per_item: float) -> Scores:
        parts = self.parts[key]
        num_distinct = len(set(self.sets[key].tolist()))
        # What the members share is computed once, whatever their number; the rest is theirs in equal parts.
        own = (self.flops_per_item - flops_per_item) / max(self.num_members - 1, 1)
        flops = self.flops_per_item - (self.num_members - num_distinct) * own
        found = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
        return Scores(
            **{name: found.pop(name) for name in _OF_EVERY_KIND},
            more=found,
            sizes=ensemble_sizes(len(self.sets[key])),
            forward_passes=flops / flops_per_item if flops_per_item else None,
            seconds=seconds * num_distinct / self.num_members,
        )
