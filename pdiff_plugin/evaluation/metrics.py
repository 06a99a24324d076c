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
    bins = bin_of(confidence, num_bins)
    count = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, torch.ones_like(confidence.double()))
    safe = count.clamp_min(1)
    sums = [
        torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, values.double())
        for values in (confidence, correct)
    ]
    return Reliability(count, sums[0] / safe, sums[1] / safe)


def bin_of(confidence: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Which bin of :func:`reliability` a confidence falls into, int64."""
    return (confidence.double() * num_bins).ceil().long().clamp(1, num_bins) - 1


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


def correlation(values: Tensor, others: Tensor | None = None) -> Tensor:
    """Correlation over items of each pair of rows: (M, n) and (R, n), or the rows themselves, -> (M, R) float64.

    Exactly 1 for rows that are alike but for rounding, and 0 where one does not vary.
    """
    rows = []
    for x in (values, values if others is None else others):
        centred = x.double() - x.double().mean(dim=1, keepdim=True)
        rows.append(centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-300))
    found = rows[0] @ rows[1].T
    return torch.where(found > 1 - 1e-12, torch.ones_like(found), found)


def crps_of_members(values: Tensor, targets: Tensor) -> Tensor:
    """CRPS of the empirical distribution of members: E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007, eq. 21).

    X and X' are members with return, so that a single one has its absolute error. (M, ...) and (...) -> (...).
    """
    m = len(values)
    rank = 2.0 * torch.arange(1, m + 1, dtype=values.dtype) - m - 1
    spread = (rank.reshape(-1, *[1] * targets.ndim) * values.sort(dim=0).values).sum(dim=0) / m**2
    return (values - targets).abs().mean(dim=0) - spread


def crps_of_gaussians(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """CRPS of an even mixture of M Gaussians (Grimit et al. 2006, eq. 5): (M, ...) and (...) -> (...)."""
    m = len(mean)
    spread = torch.zeros_like(targets)
    for i in range(m):  # one row of pairs at a time
        spread += _expected_distance(mean[i] - mean, variance[i] + variance).sum(dim=0)
    return _expected_distance(targets - mean, variance).mean(dim=0) - spread / (2 * m**2)


def _expected_distance(mean: Tensor, variance: Tensor) -> Tensor:
    """E|X| of a Gaussian."""
    std = variance.sqrt()
    z = mean / std
    return 2 * std * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) + mean * torch.erf(z / math.sqrt(2))


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Mean precision at each recall, items of equal score taken together; NaN without a positive.

    Args:
        score: (n,).
        positive: (n,) bool.
    """
    order = score.argsort(descending=True)
    hits = positive[order].double().cumsum(dim=0)
    ends = torch.cat([score[order].diff() != 0, torch.ones(1, dtype=torch.bool)])
    rank = torch.arange(1, len(score) + 1, dtype=torch.float64)
    precision, recall = (hits / rank)[ends], (hits / hits[-1])[ends]
    return float((precision * recall.diff(prepend=torch.zeros(1, dtype=torch.float64))).sum())


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
