"""Run sets of members over data, keeping what every metric needs and nothing that grows with the classes.

Shapes: M members, B items in a batch, n items in all, C classes, S ensemble sizes, H divisions into halves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.task import Task, batches, check_logits, evaluating
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.batches import num_batches_in
from pdiff_plugin.progress import OnProgress, Progress

# Batches whose FLOPs are counted: in the first an ensemble may still try what works, the last counted one is believed.
_NUM_COUNTED = 2
# Ways in which members are divided into two halves, whose difference tells how far an ensemble's accuracy is by chance.
_NUM_DIVISIONS = 16


@dataclass(frozen=True)
class Scores:
    """One set's results, item by item; every tensor is on the CPU and float64 unless said.

    Attributes:
        correct: whether each member is right, (M, n) bool.
        member_nll: -log p(true) of each member, (M, n).
        sizes: numbers of members at which the ensemble was scored, the last one M.
        nll: of the ensemble of the first ``sizes[s]`` members in a random order, (S, n).
        confidence: its largest probability, (S, n).
        hit: whether that class is true, (S, n) bool.
        hit_difference: whether the ensemble of one half of the members is right, minus whether that of the other half
            is, for several divisions of the members, (H, n) int8.
        brier: of the whole ensemble, (n,).
        entropy: of the whole ensemble's mean probabilities, (n,).
        forward_passes: arithmetic of the members in forward passes of the model; None where nothing is counted
            (FLOPs of matrix products and convolutions).
        seconds: time of the members' forward passes.
    """

    correct: Tensor
    member_nll: Tensor
    sizes: tuple[int, ...]
    nll: Tensor
    confidence: Tensor
    hit: Tensor
    hit_difference: Tensor
    brier: Tensor
    entropy: Tensor
    forward_passes: float | None
    seconds: float


def ensemble_sizes(num_members: int) -> tuple[int, ...]:
    """1, 2, 4, ... and M itself."""
    sizes = [2**i for i in range(num_members.bit_length()) if 2**i < num_members]
    return (*sizes, num_members)


def score_sets(
    task: Task,
    sets: Mapping[str, WeightSet],
    *,
    loader: Iterable[Any] | None = None,
    name: str = "eval_loader",
    has_targets: bool = True,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Scores], Tensor]:
    """Score every set in one pass over the data: batch outside, sets and members inside.

    One pass keeps the items of the sets aligned whatever the order in which a loader gives them.

    Args:
        task: the model, and the data unless ``loader`` is given.
        sets: name -> members.
        loader: other data.
        name: of the data, in errors.
        has_targets: False where targets mean nothing (out-of-distribution data); then only ``entropy`` does.
        seed: of the order in which members join the smaller ensembles (those of a trajectory are ordered in time).
        on_progress: told the number of batches done.

    Returns:
        Set name -> scores, and the targets met, (n,) int64.
    """
    device = task.target_device()
    data = task.eval_loader if loader is None else loader
    total = num_batches_in(data)
    seen: list[Tensor] = []
    with evaluating(task) as model, torch.no_grad():
        runs = {key: _Run(model, weights, seed) for key, weights in sets.items()}
        flops_per_item = 0.0
        for number, (args, kwargs, targets) in enumerate(batches(data, device, name, has_targets), start=1):
            if number == 1:
                with FlopCounterMode(display=False) as counter:
                    model(*args, **kwargs)
                flops_per_item = counter.get_total_flops() / len(targets)
            seen.append(targets)
            for run in runs.values():
                run.score(args, kwargs, targets, name)
            if on_progress is not None:
                on_progress(Progress("score", number, max(total, number)))
    return {key: run.scores(flops_per_item) for key, run in runs.items()}, torch.cat(seen)


class Scorer(Protocol):
    """:func:`score_sets`, or something that does its work elsewhere."""

    def __call__(
        self,
        task: Task,
        sets: Mapping[str, WeightSet],
        *,
        loader: Iterable[Any] | None = None,
        name: str = "eval_loader",
        has_targets: bool = True,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> tuple[dict[str, Scores], Tensor]: ...


class _Run:
    """One set on its way through the data."""

    def __init__(self, model: nn.Module, weights: WeightSet, seed: int) -> None:
        self.ensemble = DiffusionEnsemble(model, weights)
        self.order = torch.randperm(weights.num_members, generator=torch.Generator().manual_seed(seed))
        self.parts: list[dict[str, Tensor]] = []
        self.flops_per_item = 0.0
        self.seconds: list[float] = []

    def score(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Tensor, name: str) -> None:
        started = time.perf_counter()
        if len(self.parts) >= _NUM_COUNTED:
            logits = self.ensemble.members(*args, **kwargs)
        else:
            with FlopCounterMode(display=False) as counter:
                logits = self.ensemble.members(*args, **kwargs)
            self.flops_per_item = counter.get_total_flops() / len(targets)
        logits = check_logits(logits, targets, name).cpu()  # (M, B, C); waits for the device
        self.seconds.append(time.perf_counter() - started)
        self.parts.append(_score_batch(logits, targets, self.order))

    def scores(self, flops_per_item: float) -> Scores:
        # Counting takes time: batches without it stand for all, where there are such.
        items = [part["entropy"].shape[-1] for part in self.parts]
        first = _NUM_COUNTED if len(items) > _NUM_COUNTED else 0
        seconds = sum(self.seconds[first:]) * sum(items) / sum(items[first:])
        return Scores(
            **{key: torch.cat([part[key] for part in self.parts], dim=-1) for key in self.parts[0]},
            sizes=ensemble_sizes(len(self.order)),
            forward_passes=self.flops_per_item / flops_per_item if flops_per_item else None,
            seconds=seconds,
        )


def _score_batch(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Per-item results (..., B) of logits (M, B, C)."""
    log_probs = metrics.member_log_probs(logits)
    log_true = -metrics.nll(log_probs, targets)  # (M, B)
    sizes = torch.tensor(ensemble_sizes(len(logits)))
    counts = sizes.double()[:, None]
    probs = log_probs[order].exp().cumsum(dim=0)[sizes - 1] / counts[..., None]  # (S, B, C)
    confidence, predicted = probs.max(dim=-1)
    return {
        "correct": (log_probs.argmax(dim=-1) == targets) & ~logits.isnan().any(dim=-1),
        "member_nll": -log_true,
        "nll": counts.log() - log_true[order].logcumsumexp(dim=0)[sizes - 1],
        "confidence": confidence,
        "hit": predicted == targets,
        "hit_difference": _hit_difference(log_probs.exp(), targets),
        "brier": metrics.brier(probs[-1], targets),
        "entropy": metrics.entropy(probs[-1].log()),
    }


def _hit_difference(probs: Tensor, targets: Tensor) -> Tensor:
    """Hits of one half of the members minus those of the other, (H, B) int8, from probabilities (M, B, C).

    Members 2i and 2i + 1 never share a half: where they start from neighbouring snapshots, halves differ by what was
    drawn and not by the snapshots.
    """
    m = len(probs)
    first = torch.randint(2, (_NUM_DIVISIONS, (m + 1) // 2), generator=torch.Generator().manual_seed(0))
    is_mine = torch.stack([first, 1 - first], dim=2).flatten(1)[:, :m].to(probs.dtype)  # (H, M)
    mine = (is_mine @ probs.flatten(1)).reshape(-1, *probs.shape[1:])  # (H, B, C)
    theirs = probs.sum(dim=0) - mine
    return (mine.argmax(dim=-1) == targets).to(torch.int8) - (theirs.argmax(dim=-1) == targets).to(torch.int8)
