"""Rows over conditions: paired differences, the best of several, and how much of a gain is recovered.

Shapes: C conditions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_plugin.evaluation.kind import TaskKind
from pdiff_plugin.evaluation.metrics import standard_error

# 97.5 % points of Student's t with 1, 2, ... degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def num_errors(num_conditions: int) -> float:
    """Standard errors that decide: two, or what 95 % ask for with few conditions."""
    degrees = num_conditions - 1
    if degrees < 1:
        return math.inf
    return _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else max(2.0, 1.96 + 2.6 / degrees)


@dataclass(frozen=True)
class Difference:
    """One row minus another over conditions; of loss, negative favours the first.

    Attributes:
        name: of the other row.
        loss: mean of the paired differences, with ``loss_error``.
        score: the same of the score.
        num_conditions: that have both.
        num_better: at which the loss of the first is lower.
        sign_p: of the sign test on these, two-sided.
        needed: gain in loss that counts.
    """

    name: str
    loss: float
    loss_error: float
    score: float
    score_error: float
    num_conditions: int
    num_better: int
    sign_p: float
    needed: float

    @property
    def is_won(self) -> bool:
        """Whether the loss is surely lower, by what counts, and the score not surely lower."""
        return self.is_lower and -self.loss >= self.needed

    @property
    def is_lower(self) -> bool:
        """Whether the loss is surely lower, by however little, and the score not surely lower."""
        return self.loss + num_errors(self.num_conditions) * self.loss_error < 0 and not self.loses_score

    @property
    def is_excluded(self) -> bool:
        """Whether a gain that counts is ruled out."""
        return self.loses_score or -self.loss + num_errors(self.num_conditions) * self.loss_error < self.needed

    @property
    def is_lost(self) -> bool:
        """Whether the other row is surely better in loss, and by what counts."""
        return self.loss >= self.needed and self.loss - num_errors(self.num_conditions) * self.loss_error > 0

    @property
    def loses_score(self) -> bool:
        return self.score + num_errors(self.num_conditions) * self.score_error < 0

    @property
    def margin(self) -> float:
        """Gain beyond what counts, in standard errors."""
        return (-self.loss - self.needed) / max(self.loss_error, 1e-12)

    def text(self, kind: TaskKind) -> str:
        """Both differences with their errors."""
        return (
            f"{kind.loss.text} {kind.loss.difference(self.loss, self.loss_error)}, "
            f"{kind.score.text} {kind.score.difference(self.score, self.score_error)}"
        )


@dataclass(frozen=True)
class Series:
    """A row over conditions: loss and score of its ensemble at each, (C,) float64, NaN where it was not made."""

    loss: Tensor
    score: Tensor


@dataclass(frozen=True)
class Recovery:
    """Share of what training at a condition gains on the average of all that a row has, with its standard error."""

    loss: float
    loss_error: float
    score: float
    score_error: float


def difference(kind: TaskKind, name: str, one: Series, other: Series) -> Difference:
    """``one`` minus ``other``, over the conditions that have both."""
    both = ~(one.loss.isnan() | other.loss.isnan())
    loss, score = (one.loss - other.loss)[both], (one.score - other.score)[both]
    n, better, worse = len(loss), int((loss < 0).sum()), int((loss > 0).sum())
    needed = kind.needed(other.loss[both]) if n else math.nan
    return Difference(
        name, _mean(loss), _error(loss), _mean(score), _error(score), n, better, sign_test(better, worse), needed
    )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _error(values: Tensor) -> float:
    return standard_error(values) if len(values) > 1 else math.nan


def sign_test(num_better: int, num_worse: int) -> float:
    """Two-sided p of as uneven a count if both were as likely."""
    n, k = num_better + num_worse, min(num_better, num_worse)
    return min(1.0, 2.0 * sum(math.comb(n, i) for i in range(k + 1)) / 2.0**n)


def best_by_others(cheap: Mapping[str, Series]) -> tuple[Series, list[str]]:
    """At each condition the row with the lowest mean loss at all others, and its name."""
    names = list(cheap)
    loss = torch.stack([cheap[name].loss for name in names])  # (rows, C)
    score = torch.stack([cheap[name].score for name in names])
    others = loss.sum(dim=1, keepdim=True) - loss if loss.shape[1] > 1 else loss
    chosen = others.argmin(dim=0)  # (C,)
    index = chosen[None]
    fair = Series(loss.gather(0, index).squeeze(0), score.gather(0, index).squeeze(0))
    return fair, [names[number] for number in chosen.tolist()]


def recovered(row: Series, average: Series, trained: Series) -> Recovery:
    """Ratio of means over conditions; its error by leaving out each condition once."""

    def ratio(own: Tensor, low: Tensor, high: Tensor) -> tuple[float, float]:
        gained, possible = own - low, high - low
        n = len(gained)
        value = float(gained.sum() / possible.sum())
        if n < 2:
            return value, math.nan
        left_out = (gained.sum() - gained) / (possible.sum() - possible)
        return value, float(((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())

    loss = ratio(row.loss, average.loss, trained.loss)
    return Recovery(*loss, *ratio(row.score, average.score, trained.score))
