"""What an ensemble says about a batch, and how sure it is.

Shapes: M members, m members at a time, B inputs in a batch, C classes, ``...`` further axes of an output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What an ensemble of classifiers says about a batch; of several labels, each by itself, (B, L).

    Attributes:
        probabilities: mean over members, (B, C, ...); of several labels, that each is there.
        predictive_entropy: entropy of that mean, in nats: all uncertainty, (B, ...).
        expected_entropy: mean of the members' entropies: what every member is unsure of, (B, ...).
        mutual_information: their difference: what the members disagree on, (B, ...).
        disagreement: share of pairs of members that choose different classes, (B, ...).
    """

    probabilities: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor


@dataclass(frozen=True)
class RegressionPrediction:
    """What an ensemble of regressors says about a batch.

    Attributes:
        mean: over members, (B, ...).
        variance: of the members' outputs around it, divided by M, (B, ...); plus the mean of their own variances where
            members are Gaussians.
    """

    mean: Tensor
    variance: Tensor


class PredictionSums:
    """Running sums over members, so that dense outputs need not be held for all of them.

    Args:
        class_axis: of one member's output.
    """

    def __init__(self, class_axis: int) -> None:
        self._class_axis = class_axis
        self._num_members = 0
        self._log_sum = self._entropy = self._votes = torch.empty(0)

    def add(self, log_probabilities: Tensor) -> None:
        """Add members, (m, B, C, ...)."""
        axis = member_axis(self._class_axis)
        chosen = log_probabilities.argmax(axis, keepdim=True)  # (m, B, 1, ...)
        votes = torch.zeros_like(log_probabilities).scatter_(axis, chosen, 1.0).sum(0)  # (B, C, ...)
        log_sum = log_probabilities.logsumexp(0)  # (B, C, ...)
        entropies = entropy(log_probabilities, axis).sum(0)  # (B, ...)
        first = self._num_members == 0
        self._log_sum = log_sum if first else torch.logaddexp(self._log_sum, log_sum)
        self._entropy = entropies if first else self._entropy + entropies
        self._votes = votes if first else self._votes + votes
        self._num_members += len(log_probabilities)

    def prediction(self) -> Prediction:
        """Of all members added."""
        log_mean = self._log_sum - math.log(self._num_members)
        predictive = entropy(log_mean, self._class_axis)
        expected = self._entropy / self._num_members
        agreeing = (self._votes * (self._votes - 1)).sum(self._class_axis)
        pairs = self._num_members * (self._num_members - 1)
        return Prediction(
            probabilities=log_mean.exp(),
            predictive_entropy=predictive,
            expected_entropy=expected,
            # Never negative (Jensen), but a difference of two rounded numbers may be.
            mutual_information=(predictive - expected).clamp_min(0.0),
            disagreement=1.0 - agreeing / pairs if pairs else torch.zeros_like(expected),
        )


def entropy(log_probabilities: Tensor, axis: int) -> Tensor:
    """Entropy along ``axis`` in nats; a class of probability 0 adds nothing."""
    probabilities = log_probabilities.exp()
    return -torch.where(probabilities == 0, probabilities, probabilities * log_probabilities).sum(axis)


def join(parts: Sequence[Any]) -> Any:
    """Predictions of several batches as one, along B, on the CPU."""
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(**{name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in names})


def member_axis(class_axis: int) -> int:
    """Place of the class axis once members are stacked in front."""
    return class_axis + 1 if class_axis >= 0 else class_axis
