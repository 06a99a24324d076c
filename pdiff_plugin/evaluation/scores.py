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
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.evaluation.kind import Scores, ensemble_sizes, joining_order
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
        Name of set or view -> scores, and marks of the targets met, (items,): other targets, or in another order, have
        others.
    """
    data, kind = data or task.data, task.task_kind
    if views is None:
        views = {key: View(key, torch.arange(weights.num_members)) for key, weights in sets.items()}
    total = num_batches_in(data.loader)
    seen: list[Tensor] = []
    with evaluating(task) as model, torch.no_grad():
        runs = {
            pool: _Run(model, weights, task, {key: v.places for key, v in views.items() if v.pool == pool}, seed)
            for pool, weights in sets.items()
        }
        flops_per_item = 0.0
        for number, (args, kwargs, targets) in enumerate(batches(data, kind, task.target_device())):
            seen.append(_marks(targets))
            if number == 0:
                with FlopCounterMode(display=False) as counter:
                    model(*args, **kwargs)
                flops_per_item = counter.get_total_flops() / len(seen[0])
            for place, (pool, run) in enumerate(runs.items()):
                run.score(args, kwargs, targets, data)
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

    def __init__(self, model: nn.Module, weights: WeightSet, task: Task, sets: Mapping[str, Tensor], seed: int) -> None:
        self.kind, self.sets, self.num_members = task.task_kind, sets, weights.num_members
        everyone = torch.arange(self.num_members)
        # Outputs may be large: those of a pool that is one set are not copied.
        self.picks = {key: slice(None) if torch.equal(places, everyone) else places for key, places in sets.items()}
        self.ensemble = DiffusionEnsemble(model, weights, select=task.pick, copy=False)
        self.orders = {key: joining_order(len(places), seed) for key, places in sets.items()}
        self.parts: dict[str, list[dict[str, Tensor]]] = {key: [] for key in sets}
        self.items: list[int] = []
        self.flops_per_item = 0.0
        self.seconds: list[float] = []
        self.is_silent = torch.zeros(self.num_members, dtype=torch.bool)

    def score(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any, data: Data) -> None:
        started = time.perf_counter()
        if len(self.items) >= _NUM_COUNTED:
            outputs = self.ensemble.members(*args, **kwargs)
        else:
            with FlopCounterMode(display=False) as counter:
                outputs = self.ensemble.members(*args, **kwargs)
            self.flops_per_item = counter.get_total_flops() / outputs.shape[1]
        self.items.append(outputs.shape[1])
        targets = targets if data.has_targets else self.kind.blank_targets(outputs)
        outputs = self.kind.check_outputs(outputs, targets, data.name).cpu()  # (U, B, ...); waits for the device
        # -Inf is the answer of a masked class.
        self.is_silent |= (outputs.isnan() | outputs.isposinf()).flatten(1).any(dim=1)
        self.seconds.append(time.perf_counter() - started)
        for key, pick in self.picks.items():
            self.parts[key].append(self.kind.score_batch(outputs[pick], targets, self.orders[key]))

    def scores(self, flops_per_item: float) -> dict[str, Scores]:
        # Counting takes time: batches without it stand for all, where there are such.
        first = _NUM_COUNTED if len(self.items) > _NUM_COUNTED else 0
        seconds = sum(self.seconds[first:]) * sum(self.items) / sum(self.items[first:])
        return {key: self._scores_of(key, seconds, flops_per_item) for key in self.sets}

    def _scores_of(self, key: str, seconds: float, flops_per_item: float) -> Scores:
        places, num_run = self.sets[key], self.num_members
        # What the members share is computed once, whatever their number; the rest is theirs in equal parts. One that
        # is in a set several times was run once here, but would be run as often in an ensemble of that set.
        own = (self.flops_per_item - flops_per_item) / (num_run - 1) if num_run > 1 else flops_per_item
        flops = self.flops_per_item + (len(places) - num_run) * own
        found = self.kind.joined(self.parts[key])
        return Scores(
            **{name: found.pop(name) for name in _OF_EVERY_KIND},
            more=found,
            sizes=ensemble_sizes(len(places)),
            forward_passes=flops / flops_per_item if flops_per_item else None,
            seconds=seconds * len(places) / num_run,
            is_silent=self.is_silent[places],
        )


def _marks(targets: Any) -> Tensor:
    """A number for each item, (B,), that other targets do not have: targets of many pixels are not kept."""
    if isinstance(targets, Tensor) and targets.ndim == 1:
        return targets
    marks = torch.zeros(0, dtype=torch.int64)
    for leaf in tree_leaves(targets):
        rows = leaf.reshape(len(leaf), -1)
        rows = rows.double().view(torch.int64) if rows.is_floating_point() else rows.long()
        odd = 2 * torch.arange(rows.shape[1]) + 0x9E3779B1  # products and sums wrap around
        mark = (rows * odd * odd).sum(dim=1)
        marks = 31 * marks + mark if len(marks) else mark
    return marks
