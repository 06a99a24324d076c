"""What an evaluation asks of a kind of task; classification is one value of :class:`TaskKind`.

A kind says how targets and outputs are checked, what is kept of every item and which figures are made of it. All that
comes after (verdict, sweep, gate, pictures, page) knows a set by these alone:

loss         of each item, lower is better; of classes -log p(true)
score        of each item, higher is better; of classes whether the right one was chosen
errors       what is compared to tell how alike two members are; of classes which items are wrong
uncertainty  how unsure the whole ensemble is of each item; of classes the entropy of the mean probabilities

A new kind is a file like ``classification.py`` and an entry in ``kinds.py``.

Shapes: M members, R reference members, B items in a batch, n items in all, S ensemble sizes, H divisions into halves,
P positions of an item (its pixels, tokens, labels or values).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pdiff_plugin.evaluation import metrics
from pdiff_plugin.modules.batches import logits_of

# Ways in which members are divided into two halves, whose difference tells how far a score is by chance.
_NUM_DIVISIONS = 16
# Positions of an item at which the errors of members are compared: all pixels of all images would not fit in memory.
MAX_COMPARED = 1024
MIN_GAIN = 0.01
"""Gain in loss that counts, as a share of a baseline's loss unless a kind says otherwise."""


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
        is_silent: members whose answer to some item is NaN or +Inf, (M,) bool.
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
    is_silent: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

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

    def value(self, value: float) -> str:
        """A value with its unit as text."""
        return f"{100 * value:.2f} %" if self.format == "%" else f"{value:{self.format}}"

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
        copy: from which likeness on a member is a copy.
        unit: what an error is one of.
        help: below the picture of all pairs.
    """

    of: Callable[[Tensor, Tensor | None], Tensor]
    copied: str
    all_alike: str
    are_counted: bool = True
    copy: float = 0.99
    unit: str = "items"
    help: str = "Of the items that either of two models gets wrong, the share that both do."

    @property
    def alike(self) -> float:
        """From which mean likeness on, over pairs outside their own block, the snapshots of a run hardly differ.

        With 0.98 for errors in common: 0.989 to 0.998 for converged trainings of an MLP on digits, whose snapshots gain
        0.01 to 0.05 %; 0.947 and less for trainings that still move, which gain 0.2 to 13 %.
        """
        return 2 * self.copy - 1


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A kind of task: everything that an evaluation does differently for it.

    Attributes:
        name: in :attr:`pdiff_plugin.Task.kind`.
        loss: of an item, lower is better.
        score: of an item, higher is better.
        likeness: of the errors of two members.
        check_targets: what a loader gave as targets and the loader's name -> the targets of a batch, on the CPU.
        check_outputs: members' outputs (M, B, ...), targets and the loader's name -> the outputs; raises DataError
            where they do not fit.
        score_batch: outputs, targets, and the order (M,) in which members join the ensembles -> results with items in
            the last axis, named as in :class:`Scores`; those of other names become its ``more``.
        errors: what the likeness compares, (M, n).
        left_out: mean loss of the ensemble without each of its members, (M,).
        metrics: every figure of a set, in the order of the table.
        curves: keys of the metrics that are kept for every size of the ensemble; the first two are drawn.
        arrays: what else is kept for the pictures, by name.
        pick: what a model returned -> the outputs (B, ...) that are judged.
        blank_targets: outputs (M, B, ...) -> what stands for the targets of data without any.
        finish: results of all batches, items in the last axis -> the same, where they need to know of all items.
        ensemble_options: of the DiffusionEnsemble that answers as the ensemble was judged; None where there is none.
        gain: loss of a baseline (n,) -> gain in loss that counts; 1 % of its mean unless given.
        groups: targets (n, ...) -> the group of each item, (n,) from 0, by which scores are also told, if any.
        loss_when_scaled: scores and a random half of the items (n,) -> loss of the ensemble after temperature scaling,
            (n,), where answers are probabilities that can be scaled.
    """

    name: str
    loss: Quantity
    score: Quantity
    likeness: Likeness
    check_targets: Callable[[Any, str], Any]
    check_outputs: Callable[[Tensor, Any, str], Tensor]
    score_batch: Callable[[Tensor, Any, Tensor], dict[str, Tensor]]
    errors: Callable[[Scores], Tensor]
    left_out: Callable[[Scores], Tensor]
    metrics: tuple[Metric, ...]
    curves: tuple[str, ...]
    arrays: Mapping[str, Callable[[Scores], Tensor]] = field(default_factory=dict)
    pick: Callable[[Any], Tensor] = logits_of
    blank_targets: Callable[[Tensor], Any] = lambda outputs: torch.zeros(outputs.shape[1], dtype=torch.int64)
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found
    ensemble_options: Mapping[str, Any] | None = field(default_factory=dict)
    gain: Callable[[Tensor], float] | None = None
    groups: Callable[[Tensor], Tensor] | None = None
    loss_when_scaled: Callable[[Scores, Tensor], Tensor] | None = None

    def needed(self, loss: Tensor) -> float:
        """Gain that counts on an ensemble of these losses, (n,)."""
        return MIN_GAIN * float(loss.mean()) if self.gain is None else self.gain(loss)

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

    def joined(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What :attr:`score_batch` found in each batch, as one."""
        return self.finish({key: torch.cat([part[key] for part in parts], dim=-1) for key in parts[0]})


def ensemble_sizes(num_members: int) -> tuple[int, ...]:
    """1, 2, 4, ... and M itself."""
    sizes = [2**i for i in range(num_members.bit_length()) if 2**i < num_members]
    return (*sizes, num_members)


def joining_order(num_members: int, seed: int) -> Tensor:
    """The order (M,) in which members join the smaller ensembles: those of a trajectory are ordered in time."""
    return torch.randperm(num_members, generator=torch.Generator().manual_seed(seed))


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


def mean_loss_without_each(scores: Scores) -> Tensor:
    """Mean loss of the ensemble without each of its members, (M,), where ``loss_without`` (M, n) was kept."""
    return scores.more["loss_without"].mean(dim=1)


def log_mean_without_each(log_values: Tensor) -> Tensor:
    """Log of the mean over all members but one, for each, (M, ...); NaN for a single member.

    Sums from both ends: nothing is taken away from a sum in which it may be all there is.
    """
    m = len(log_values)
    if m == 1:
        return torch.full_like(log_values, torch.nan)
    nothing = torch.full_like(log_values[:1], -torch.inf)
    before = torch.cat([nothing, log_values[:-1].logcumsumexp(dim=0)])
    after = torch.cat([log_values[1:].flip(0).logcumsumexp(dim=0).flip(0), nothing])
    return torch.logaddexp(before, after) - torch.tensor(m - 1.0, dtype=log_values.dtype).log()


def halves(num_members: int) -> Tensor:
    """Which members are in the first half, for several divisions of them, (H, M) int64 of 0 and 1.

    Members 2i and 2i + 1 never share a half: where they start from neighbouring snapshots, halves differ by what was
    drawn and not by the snapshots.
    """
    rng = torch.Generator().manual_seed(0)
    first = torch.randint(2, (_NUM_DIVISIONS, (num_members + 1) // 2), generator=rng)
    return torch.stack([first, 1 - first], dim=2).flatten(1)[:, :num_members]


def half_means(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means over both halves of members (M, ...), each (H, ...); 0 where a half has none."""
    mask = halves(len(values)).to(values.dtype)
    means = []
    for mine in (mask, 1 - mask):
        sums = (mine @ values.flatten(1)).reshape(len(mine), *values.shape[1:])
        means.append(sums / mine.sum(dim=1).clamp_min(1).reshape(-1, *[1] * (values.ndim - 1)))
    return means[0], means[1]


def means_of_first(values: Tensor, order: Tensor) -> Tensor:
    """Means of (M, ...) over the first members in an order, for each of the ensemble's sizes, (S, ...)."""
    sizes = torch.tensor(ensemble_sizes(len(values)))
    counts = sizes.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return values[order].cumsum(dim=0)[sizes - 1] / counts


def log_means_of_first(log_values: Tensor, order: Tensor) -> Tensor:
    """Logs of the means of exp(log_values) over the first members in an order, (S, ...)."""
    sizes = torch.tensor(ensemble_sizes(len(log_values)))
    counts = sizes.to(log_values.dtype).reshape(-1, *[1] * (log_values.ndim - 1))
    return log_values[order].logcumsumexp(dim=0)[sizes - 1] - counts.log()


def compared(errors: Tensor) -> Tensor:
    """Errors (M, B, P) of members as (M, B * p), at p random positions of each item, the same in every set."""
    num_positions = errors.shape[2]
    if num_positions > MAX_COMPARED:
        order = torch.randperm(num_positions, generator=torch.Generator().manual_seed(num_positions))
        errors = errors[:, :, order[:MAX_COMPARED].sort().values]
    return errors.flatten(1)


def hint(kind: str, targets: Any, shape: Sequence[int] = ()) -> str:
    """A question after what was expected: which other kind fits such targets (and outputs of a shape, if known)."""
    if not isinstance(targets, Tensor) or targets.is_complex():
        return ""
    is_binary = bool(((targets == 0) | (targets == 1)).all())
    if is_binary and targets.ndim == 2 and len(shape) in (0, 2):
        found, likely = "zeros and ones for several labels", "multilabel"
    elif targets.is_floating_point():
        found, likely = "floating point", "regression"
    elif targets.ndim == 1:
        found, likely = "one integer per item", "classification" if len(shape) != 1 else "regression"
    elif targets.ndim == 2:
        found, likely = "a row of integers per item", "language"
    else:
        found, likely = "a map of integers per item", "dense"
    return "" if likely == kind else f'; targets are {found}: is this kind="{likely}"?'


def found_in(targets: Any) -> str:
    """What was given as targets, for an error."""
    return f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__


def usual_metrics(
    loss: Quantity, score: Quantity, likeness: Likeness, combined: str, extras: Sequence[Metric]
) -> tuple[Metric, ...]:
    """The figures of a kind's loss, score and likeness, with ``extras`` of the ensemble after its loss.

    Args:
        combined: what the ensemble answers, as ``mean probabilities``.
    """
    return (
        MEMBERS,
        Metric(
            f"{score.key}_mean", f"{score.title} mean", score.format, lambda s: float(s.member_scores.mean()), "higher",
            f"{score.text}, mean over members",
        ),
        Metric(f"{score.key}_std", "± std", score.format, spread_of_scores, "", "standard deviation over members"),
        Metric(
            f"{score.key}_best", "best*", score.format, best_score, "higher",
            "chosen on one half of the data, scored on the other", is_noted=True,
        ),
        Metric(
            f"{score.key}_worst", "worst", score.format, lambda s: float(s.member_scores.min()), "higher",
            "of the worst member",
        ),
        Metric(
            f"ensemble_{score.key}", f"ens {score.title}", score.format, ensemble_score, "higher",
            f"{score.text} of the {combined}",
        ),
        Metric(
            f"ensemble_{loss.key}", f"ens {loss.title}", loss.format, ensemble_loss, "lower",
            f"{loss.text} of the {combined}",
        ),
        *extras,
        Metric(
            f"{likeness.key}_mean", likeness.title, likeness.format, lambda s: metrics.pair_mean(s.within), "lower",
            f"{likeness.text}, over pairs of members", is_noted=True,
        ),
        Metric(
            f"{likeness.key}_max_to_snapshots", f"{likeness.title} to snap", likeness.format,
            lambda s: float(s.closest.nanmean()), "lower", "the same with the closest snapshot, over members",
            is_noted=True,
        ),
        NEAREST,
        Metric(
            f"member_{loss.key}_mean", "", loss.format, lambda s: float(s.scores.member_loss.mean()), "lower",
            f"{loss.text}, mean over members",
        ),
    )  # fmt: skip


def shared_mistakes(unit: str) -> Likeness:
    """How many of their mistakes two members share, where a mistake is one of ``unit``."""
    return Likeness(
        "wrong_iou",
        "IoU",
        f"share of wrong {unit} in common",
        ".3f",
        of=metrics.wrong_iou,
        copied=f"of the {unit} that a generated member or its closest snapshot gets wrong, {{found:.1%}} are the same",
        all_alike="Members share {found:.1%} of their errors with the closest snapshot, but the snapshots themselves "
        "share {reference:.1%}: that tells nothing of copies.",
        unit=unit,
        help=f"Of the {unit} that either of two models gets wrong, the share that both do.",
    )


def alike_errors(what: str) -> Likeness:
    """How far the errors of two members, real numbers called ``what``, go together."""
    return Likeness(
        "error_correlation",
        "corr",
        f"correlation of {what}",
        ".4f",
        of=metrics.correlation,
        copied=f"{what} of generated members and of their closest snapshot have a correlation of {{found:.4f}}",
        all_alike=f"The {what} of members have a correlation of {{found:.4f}} with the closest snapshot, but the "
        "snapshots themselves have {reference:.4f}: that tells nothing of copies.",
        are_counted=False,
        # Noise in the targets is an error that all members share: good ones have 0.99 without being copies.
        copy=0.9999,
        help=f"How far the {what} of two models go together: 1 where they are proportional.",
    )


# Figures that every kind has.
MEMBERS = Metric("members", "members", "d", lambda s: len(s.member_scores), "", "number of members of the set")
NEAREST = Metric(
    "nearest_snapshot_distance", "nearest", ".3f", lambda s: float(s.distance.nanmedian()), "higher",
    "distance to the nearest snapshot in typical deviations (of snapshots: outside their own block of time)",
    is_noted=True,
)  # fmt: skip
