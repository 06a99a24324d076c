"""What an evaluation asks of a kind of task; classification is one value of :class:`TaskKind`.

A kind says how targets and outputs are checked, what is kept of every item and which figures are made of it. All that
comes after (verdict, sweep, gate, pictures, page) knows a set by these alone:

loss         of each item, lower is better; of classes -log p(true)
score        of each item, higher is better; of classes whether the right one was chosen
errors       what is compared to tell how alike two members are; of classes which items are wrong
uncertainty  how unsure the whole ensemble is of each item; of classes the entropy of the mean probabilities

A new kind is a file like ``classification.py`` and an entry in ``kinds.py``.

Shapes: M members, R reference members, B items in a batch, n items in all, S ensemble sizes, H divisions into halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pdiff_plugin.evaluation import metrics


@dataclass(frozen=True)
class Scores:
    """One draw of a set, item by item; every tensor is on the CPU and float64 unless said.

    Attributes:
        member_loss: of each member, (M, n).
        member_score: of each member, (M, n); bool where it is right or wrong.
        sizes: numbers of members at which the ensemble was scored, the last one M.
        loss: of the ensemble of the first ``sizes[s]`` members in a random order, (S, n).
        score: of the same, (S, n); bool where it is right or wrong.
        half_difference: score of the ensemble of one half of the members minus that of the other half, for several
            divisions of the members, (H, n).
        uncertainty: of the whole ensemble, (n,).
        more: what else the metrics of the kind need, by name, items last.
        forward_passes: arithmetic of the members in forward passes of the model; None where nothing is counted
            (FLOPs of matrix products and convolutions).
        seconds: time of the members' forward passes.
    """

    member_loss: Tensor
    member_score: Tensor
    sizes: tuple[int, ...]
    loss: Tensor
    score: Tensor
    half_difference: Tensor
    uncertainty: Tensor
    more: Mapping[str, Tensor]
    forward_passes: float | None
    seconds: float

    @property
    def num_items(self) -> int:
        return self.loss.shape[-1]


@dataclass(frozen=True)
class Measured:
    """One draw of a set as metrics see it; on shifted data, there are only the scores.

    Attributes:
        scores: of its items.
        place: which of the ensemble's sizes is meant.
        within: likeness of the members to each other, (M, M).
        closest: of each member to the closest snapshot, (M,); NaN where there is none to compare with.
        distance: of each member to the nearest snapshot, (M,); NaN where there is none to compare with.
        first_half: a random half of the items, (n,) bool.
    """

    scores: Scores
    place: int = -1
    within: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    closest: Tensor = field(default_factory=lambda: torch.zeros(0))
    distance: Tensor = field(default_factory=lambda: torch.zeros(0))
    first_half: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @cached_property
    def member_scores(self) -> Tensor:
        """Mean score of each member, (M,) float64."""
        return self.scores.member_score.double().mean(dim=1)


@dataclass(frozen=True)
class Metric:
    """One figure of a set: how it is measured, shown and explained.

    Attributes:
        key: its name in evaluation.json.
        title: head of its column, and name of its axis; empty for figures without a column.
        format: ``%`` for percent, else a format of Python's.
        of: measures it.
        better: what to wish for, if anything.
        help: what it is, in a few words.
        is_noted: whether the footnote of the table explains it.
    """

    key: str
    title: str
    format: str
    of: Callable[[Measured], float]
    better: Literal["higher", "lower", ""]
    help: str
    is_noted: bool = False

    @property
    def is_of_ensemble(self) -> bool:
        """Whether it is of the ensemble's answers alone, and so is measured on shifted data too."""
        return self.key.startswith("ensemble_")


@dataclass(frozen=True)
class Quantity:
    """What is told of an item, by its names.

    Attributes:
        key: in the names of figures, as in ``ensemble_KEY``.
        title: in the head of a column.
        text: in a sentence.
        format: ``%`` for percent, else a format of Python's.
    """

    key: str
    title: str
    text: str
    format: str

    def difference(self, value: float, error: float) -> str:
        """A difference and its standard error as text."""
        if self.format == "%":
            return f"{100 * value:+.2f} ± {100 * error:.2f} points"
        return f"{value:+{self.format}} ± {error:{self.format}}"


@dataclass(frozen=True, kw_only=True)
class Likeness(Quantity):
    """How alike two members err, 1 for the same errors.

    Attributes:
        of: errors (M, n), and those of others (R, n) or None for the members themselves, -> (M, R).
        copied: why members are copies of snapshots, as a template for their likeness ``{found}``.
        all_alike: why that tells nothing where snapshots are as alike, for ``{found}`` and ``{reference}``.
        are_counted: whether an error either happens or not; there must then be some of them to compare.
    """

    of: Callable[[Tensor, Tensor | None], Tensor]
    copied: str
    all_alike: str
    are_counted: bool = True


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A kind of task: everything that an evaluation does differently for it.

    Attributes:
        name: in :attr:`pdiff_plugin.Task.kind`.
        loss: of an item, lower is better.
        score: of an item, higher is better.
        likeness: of the errors of two members.
        check_targets: what a loader gave as targets and the loader's name -> the targets of a batch, on the CPU.
        check_outputs: members' outputs (M, B, ...), targets and the loader's name -> the outputs; raises ConfigError
            where they do not fit.
        score_batch: outputs, targets, and the order (M,) in which members join the ensembles -> results with items in
            the last axis, named as in :class:`Scores`; those of other names become its ``more``.
        errors: what the likeness compares, (M, n).
        left_out: mean loss of the ensemble without each of its members, (M,).
        metrics: every figure of a set, in the order of the table.
        curves: keys of the metrics that are kept for every size of the ensemble; the first two are drawn.
        arrays: what else is kept for the pictures, by name.
    """

    name: str
    loss: Quantity
    score: Quantity
    likeness: Likeness
    check_targets: Callable[[Any, str], Tensor]
    check_outputs: Callable[[Tensor, Tensor, str], Tensor]
    score_batch: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
    errors: Callable[[Scores], Tensor]
    left_out: Callable[[Scores], Tensor]
    metrics: tuple[Metric, ...]
    curves: tuple[str, ...]
    arrays: Mapping[str, Callable[[Scores], Tensor]] = field(default_factory=dict)

    @property
    def mean_score(self) -> str:
        """Key of the members' mean score."""
        return f"{self.score.key}_mean"

    @property
    def ensemble_score(self) -> str:
        return f"ensemble_{self.score.key}"

    @property
    def ensemble_loss(self) -> str:
        return f"ensemble_{self.loss.key}"

    @property
    def within(self) -> str:
        """Key of the members' likeness to each other."""
        return f"{self.likeness.key}_mean"

    @property
    def closest(self) -> str:
        """Key of the members' likeness to the closest snapshot."""
        return f"{self.likeness.key}_max_to_snapshots"

    def metric(self, key: str) -> Metric:
        return next(metric for metric in self.metrics if metric.key == key)

    @property
    def columns(self) -> tuple[Metric, ...]:
        """The metrics with a column in the table."""
        return tuple(metric for metric in self.metrics if metric.title)

    @property
    def footnote(self) -> str:
        """What the table does not explain by itself."""
        notes = [f"{metric.title}: {metric.help}." for metric in self.metrics if metric.is_noted]
        return " ".join([*notes, "passes: cost of the set in forward passes of the model."])


def ensemble_sizes(num_members: int) -> tuple[int, ...]:
    """1, 2, 4, ... and M itself."""
    sizes = [2**i for i in range(num_members.bit_length()) if 2**i < num_members]
    return (*sizes, num_members)


def best_score(measured: Measured) -> float:
    """Score of the best member, chosen on one half of the items and scored on the other."""
    return metrics.best_on_other_half(measured.scores.member_score, measured.first_half)


def spread_of_scores(measured: Measured) -> float:
    """Standard deviation of the members' mean scores; 0 for a single one."""
    scores = measured.member_scores
    return float(scores.std()) if len(scores) > 1 else 0.0


def ensemble_score(measured: Measured) -> float:
    return float(measured.scores.score[measured.place].double().mean())


def ensemble_loss(measured: Measured) -> float:
    return float(measured.scores.loss[measured.place].mean())


# Figures that every kind has.
MEMBERS = Metric("members", "members", "d", lambda s: len(s.member_scores), "", "number of members of the set")
NEAREST = Metric(
    "nearest_snapshot_distance", "nearest", ".3f", lambda s: float(s.distance.nanmedian()), "higher",
    "distance to the nearest snapshot in typical deviations (of snapshots: outside their own block of time)",
    is_noted=True,
)  # fmt: skip
