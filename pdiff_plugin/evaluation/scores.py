"""Run sets of members over data, keeping what every metric needs and nothing that grows with the classes.

Shapes: M members, B items in a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.evaluation.kind import Scores, TaskKind, ensemble_sizes, joining_order
from pdiff_plugin.evaluation.kinds import KINDS
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
        Set name -> scores, and the targets met, (items, ...).
    """
    data, kind = data or task.data, KINDS[task.kind]
    total = num_batches_in(data.loader)
    seen: list[Tensor] = []
    with evaluating(task) as model, torch.no_grad():
        runs = {key: _Run(model, weights, kind, seed) for key, weights in sets.items()}
        flops_per_item = 0.0
        for number, (args, kwargs, targets) in enumerate(batches(data, kind, task.target_device()), start=1):
            if number == 1:
                with FlopCounterMode(display=False) as counter:
                    model(*args, **kwargs)
                flops_per_item = counter.get_total_flops() / len(targets)
            seen.append(targets)
            for run in runs.values():
                run.score(args, kwargs, targets, data.name)
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

    def __init__(self, model: nn.Module, weights: WeightSet, kind: TaskKind, seed: int) -> None:
        self.kind = kind
        self.ensemble = DiffusionEnsemble(model, weights)
        self.order = joining_order(weights.num_members, seed)
        self.parts: list[dict[str, Tensor]] = []
        self.flops_per_item = 0.0
        self.seconds: list[float] = []

    def score(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Tensor, name: str) -> None:
        started = time.perf_counter()
        if len(self.parts) >= _NUM_COUNTED:
            outputs = self.ensemble.members(*args, **kwargs)
        else:
            with FlopCounterMode(display=False) as counter:
                outputs = self.ensemble.members(*args, **kwargs)
            self.flops_per_item = counter.get_total_flops() / len(targets)
        outputs = self.kind.check_outputs(outputs, targets, name).cpu()  # (M, B, ...); waits for the device
        self.seconds.append(time.perf_counter() - started)
        self.parts.append(self.kind.score_batch(outputs, targets, self.order))

    def scores(self, flops_per_item: float) -> Scores:
        # Counting takes time: batches without it stand for all, where there are such.
        items = [part["loss"].shape[-1] for part in self.parts]
        first = _NUM_COUNTED if len(items) > _NUM_COUNTED else 0
        seconds = sum(self.seconds[first:]) * sum(items) / sum(items[first:])
        found = {key: torch.cat([part[key] for part in self.parts], dim=-1) for key in self.parts[0]}
        return Scores(
            **{key: found.pop(key) for key in _OF_EVERY_KIND},
            more=found,
            sizes=ensemble_sizes(len(self.order)),
            forward_passes=self.flops_per_item / flops_per_item if flops_per_item else None,
            seconds=seconds,
        )
