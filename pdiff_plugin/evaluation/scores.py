"""Run sets of members over a task's data, keeping what every metric needs and nothing that grows with the classes.

Shapes: M members, B items in a batch, n items in all, C classes, S ensemble sizes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.task import Task, as_arguments, batches, evaluating, logits_of
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.layout import wrapped_names


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
        brier: of the whole ensemble, (n,).
        entropy: of the whole ensemble's mean probabilities, (n,).
        seconds: time spent in the members' forward passes.
    """

    correct: Tensor
    member_nll: Tensor
    sizes: tuple[int, ...]
    nll: Tensor
    confidence: Tensor
    hit: Tensor
    brier: Tensor
    entropy: Tensor
    seconds: float


def ensemble_sizes(num_members: int) -> tuple[int, ...]:
    """1, 2, 4, ... and M itself."""
    sizes = [2**i for i in range(num_members.bit_length()) if 2**i < num_members]
    return (*sizes, num_members)


def score_sets(
    task: Task,
    sets: Mapping[str, WeightSet],
    *,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, Scores]:
    """Score every set in one pass over the task's data: batch outside, sets and members inside.

    One pass keeps the sets' items aligned whatever the order in which a loader gives them.

    Args:
        task: model and data.
        sets: name -> members.
        seed: of the order in which members join the smaller ensembles (those of a trajectory are ordered in time).
        on_progress: told the number of batches done.
    """
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in sets}
    seconds = dict.fromkeys(sets, 0.0)
    device = task.target_device()
    total = _length(task.eval_loader)
    orders = {
        name: torch.randperm(weights.num_members, generator=torch.Generator().manual_seed(seed))
        for name, weights in sets.items()
    }
    with evaluating(task) as model, torch.no_grad():
        runners = {name: _Runner(model, weights, device) for name, weights in sets.items()}
        for number, (inputs, targets) in enumerate(batches(task.eval_loader, device), start=1):
            for name, runner in runners.items():
                started = time.perf_counter()
                logits = runner(inputs)  # (M, B, C)
                seconds[name] += time.perf_counter() - started
                parts[name].append(_score_batch(logits, targets, orders[name]))
            if on_progress is not None:
                on_progress(Progress("score", number, max(total, number)))
    return {
        name: Scores(
            **{key: torch.cat([part[key] for part in parts[name]], dim=-1) for key in parts[name][0]},
            sizes=ensemble_sizes(weights.num_members),
            seconds=seconds[name],
        )
        for name, weights in sets.items()
    }


class _Runner:
    """Members of one set on the user's model: inputs -> logits (M, B, C)."""

    def __init__(self, model: nn.Module, weights: WeightSet, device: torch.device) -> None:
        self.model = model
        names = wrapped_names(model)
        self.members = [
            {names[name]: tensor.to(device) for name, tensor in member.items()} for member in weights.members()
        ]

    def __call__(self, inputs: Any) -> Tensor:
        args, kwargs = as_arguments(inputs)
        return torch.stack([logits_of(functional_call(self.model, m, args, kwargs)) for m in self.members])


def _score_batch(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Per-item results (..., B) on the CPU of logits (M, B, C)."""
    log_probs = metrics.member_log_probs(logits.cpu())
    targets = targets.cpu()
    log_true = -metrics.nll(log_probs, targets)  # (M, B)
    sizes = torch.tensor(ensemble_sizes(len(logits)))
    counts = sizes.double()[:, None]
    probs = log_probs[order].exp().cumsum(dim=0)[sizes - 1] / counts[..., None]  # (S, B, C)
    confidence, predicted = probs.max(dim=-1)
    return {
        "correct": (log_probs.argmax(dim=-1) == targets) & ~logits.cpu().isnan().any(dim=-1),
        "member_nll": -log_true,
        "nll": counts.log() - log_true[order].logcumsumexp(dim=0)[sizes - 1],
        "confidence": confidence,
        "hit": predicted == targets,
        "brier": metrics.brier(probs[-1], targets),
        "entropy": metrics.entropy(probs[-1].log()),
    }


def _length(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]  # not every iterable has a length
    except TypeError:
        return 0
