"""Run sets of members over data, keeping what every metric needs and nothing that grows with the classes.

Shapes: M members, B items in a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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


def score_sets(
    task: Task,
    sets: Mapping[str, WeightSet],
    data: Data | None = None,
    *,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Scores], Tensor]:
    """Score every set in one pass over the data: batch outside, sets and members inside.

    One pass keeps the items of the sets aligned whatever the order in which a loader gives them.

    Args:
        task: the model, and how its answers are scored.
        sets: name -> members.
        data: other data than the task's own ``eval_loader``.
        seed: of the order in which members join the smaller ensembles (those of a trajectory are ordered in time).
        on_progress: told the number of batches done.

    Returns:
        Set name -> scores, and marks of the targets met, (items,): other targets, or in another order, have others.
    """
    data, kind = data or task.data, task.task_kind
    total = num_batches_in(data.loader)
    seen: list[Tensor] = []
    with evaluating(task) as model, torch.no_grad():
        runs = {key: _Run(model, weights, task, seed) for key, weights in sets.items()}
        flops_per_item = 0.0
        for number, (args, kwargs, targets) in enumerate(batches(data, kind, task.target_device()), start=1):
            seen.append(_marks(targets))
            if number == 1:
                with FlopCounterMode(display=False) as counter:
                    model(*args, **kwargs)
                flops_per_item = counter.get_total_flops() / len(seen[0])
            for run in runs.values():
                run.score(args, kwargs, targets, data)
            if on_progress is not None:
                on_progress(Progress("score", number, max(total, number)))
    return {key: run.scores(flops_per_item) for key, run in runs.items()}, torch.cat(seen)


class Scorer(Protocol):
    """:func:`score_sets`, or something that does its work elsewhere."""

    def __call__(
        self,
        task: Task,
        sets: Mapping[str, WeightSet],
        data: Data | None = None,
        *,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> tuple[dict[str, Scores], Tensor]: ...


class _Run:
    """One set on its way through the data."""

    def __init__(self, model: nn.Module, weights: WeightSet, task: Task, seed: int) -> None:
        self.kind = task.task_kind
        self.ensemble = DiffusionEnsemble(model, weights, select=task.pick)
        self.order = joining_order(weights.num_members, seed)
        self.parts: list[dict[str, Tensor]] = []
        self.flops_per_item = 0.0
        self.seconds: list[float] = []
        self.is_silent = torch.zeros(weights.num_members, dtype=torch.bool)

    def score(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any, data: Data) -> None:
        started = time.perf_counter()
        if len(self.parts) >= _NUM_COUNTED:
            outputs = self.ensemble.members(*args, **kwargs)
        else:
            with FlopCounterMode(display=False) as counter:
                outputs = self.ensemble.members(*args, **kwargs)
            self.flops_per_item = counter.get_total_flops() / outputs.shape[1]
        targets = targets if data.has_targets else self.kind.blank_targets(outputs)
        outputs = self.kind.check_outputs(outputs, targets, data.name).cpu()  # (M, B, ...); waits for the device
        # -Inf is the answer of a masked class.
        self.is_silent |= (outputs.isnan() | outputs.isposinf()).flatten(1).any(dim=1)
        self.seconds.append(time.perf_counter() - started)
        self.parts.append(self.kind.score_batch(outputs, targets, self.order))

    def scores(self, flops_per_item: float) -> Scores:
        # Counting takes time: batches without it stand for all, where there are such.
        items = [part["loss"].shape[-1] for part in self.parts]
        first = _NUM_COUNTED if len(items) > _NUM_COUNTED else 0
        seconds = sum(self.seconds[first:]) * sum(items) / sum(items[first:])
        found = self.kind.joined(self.parts)
        return Scores(
            **{key: found.pop(key) for key in _OF_EVERY_KIND},
            more=found,
            sizes=ensemble_sizes(len(self.order)),
            forward_passes=self.flops_per_item / flops_per_item if flops_per_item else None,
            seconds=seconds,
            is_silent=self.is_silent,
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
