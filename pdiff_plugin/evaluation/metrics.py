"""Metrics of members, of ensembles and of their likeness, as plain functions.

Shapes: M members, R reference members, B or n items, C classes, N snapshots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_BINS = 15
"""Bins of equal width of the calibration error."""


def member_log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities (..., C) float64 of logits (..., C). Where a member's output is NaN it counts as uniform."""
    log_probs = logits.double().log_softmax(dim=-1)
    broken = log_probs.isnan().any(dim=-1, keepdim=True)
    return torch.where(broken, -math.log(logits.shape[-1]), log_probs)


def nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """-log p(true) of each item: log_probs (..., n, C), targets (n,) -> (..., n)."""
    index = targets.expand(log_probs.shape[:-1])[..., None]
    return -log_probs.gather(-1, index).squeeze(-1)


def brier(probs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of the probabilities summed over classes, of each item: probs (..., n, C) -> (..., n)."""
    truth = torch.nn.functional.one_hot(targets, probs.shape[-1]).to(probs.dtype)
    return (probs - truth).square().sum(dim=-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of each item: log_probs (..., C) -> (...)."""
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, torch.zeros_like(probs)).sum(dim=-1)


@dataclass(frozen=True)
class Reliability:
    """Items by confidence, in bins of equal width: counts, mean confidence and accuracy, each (num_bins,) float64."""

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    def ece(self) -> float:
        """Expected calibration error: the bins' |accuracy - confidence|, weighted by their share of the items."""
        return float(((self.accuracy - self.confidence).abs() * self.count).sum() / self.count.sum())


def reliability(confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS) -> Reliability:
    """Sort items into the bins (0, 1/num_bins], ..., (1 - 1/num_bins, 1].

    Args:
        confidence: largest probability of each item, (n,).
        correct: whether that class is true, (n,) bool.
        num_bins: bins of equal width.
    """
    bins = (confidence.double() * num_bins).ceil().long().clamp(1, num_bins) - 1
    count = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, torch.ones_like(confidence.double()))
    safe = count.clamp_min(1)
    sums = [
        torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, values.double())
        for values in (confidence, correct)
    ]
    return Reliability(count, sums[0] / safe, sums[1] / safe)


def ece(confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error over 15 bins of equal width; see :func:`reliability`."""
    return reliability(confidence, correct, num_bins).ece()


@overload
def wrong_iou(wrong: Tensor, others: Tensor | None = None) -> Tensor: ...


@overload
def wrong_iou(wrong: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float64]: ...


def wrong_iou(
    wrong: Tensor | npt.NDArray[np.bool_], others: Tensor | npt.NDArray[np.bool_] | None = None
) -> Tensor | npt.NDArray[np.float64]:
    """Overlap of errors: |both wrong| / |either wrong| for each pair of members, as one matrix product.

    Args:
        wrong: which items each member gets wrong, (M, n) bool; torch or numpy.
        others: the same of other members, (R, n); ``wrong`` itself unless given.

    Returns:
        (M, R) float64, of the kind that came in. Two members without any error have 1.
    """
    if isinstance(wrong, np.ndarray):
        theirs = None if others is None else torch.as_tensor(others)
        return np.asarray(wrong_iou(torch.as_tensor(wrong), theirs).numpy(), dtype=np.float64)
    # float32 counts exactly up to 2**24 items, and its product is twice as fast.
    dtype = torch.float32 if wrong.shape[1] < 2**24 else torch.float64
    a = wrong.bool().to(dtype)
    b = a if others is None else torch.as_tensor(others).bool().to(dtype)
    both = (a @ b.T).double()
    either = a.sum(dim=1).double()[:, None] + b.sum(dim=1).double()[None, :] - both
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))


def pair_mean(matrix: Tensor) -> float:
    """Mean over the pairs of different members of a symmetric (M, M) matrix; NaN for one member."""
    m = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (m * (m - 1))) if m > 1 else float("nan")


def nearest_distance(distances: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Smallest entry of each row, (M, N) -> (M,); ``excluded`` (M, N) bool are left out. NaN where nothing is left."""
    if excluded is None:
        return distances.min(dim=1).values
    nearest = distances.masked_fill(excluded, float("inf")).min(dim=1).values
    return nearest.masked_fill(excluded.all(dim=1), float("nan"))


def auroc(score: Tensor, positive: Tensor) -> float:
    """Chance that a positive item scores above a negative one (ties count half), from average ranks.

    Args:
        score: (n,).
        positive: (n,) bool, with at least one of each; NaN otherwise.
    """
    _, place, counts = torch.unique(score.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    rank = (last - (counts.double() - 1) / 2)[place]  # average rank among ties, from 1
    p = int(positive.sum())
    q = len(score) - p
    if not p or not q:
        return float("nan")
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * q))


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of (n,) values; NaN for fewer than two."""
    return float(values.double().std(unbiased=True) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def best_on_other_half(correct: Tensor, first_half: Tensor) -> float:
    """Accuracy of the member that is best on one half of the items, scored on the other; both ways, averaged.

    The plain maximum over members rises with their number even if all are equally good; this does not.

    Args:
        correct: (M, n) bool.
        first_half: (n,) bool.
    """
    scores = []
    for chosen_on in (first_half, ~first_half):
        best = correct[:, chosen_on].double().mean(dim=1).argmax()
        scores.append(correct[best, ~chosen_on].double().mean())
    return float(sum(scores) / 2)
