"""The one sentence that says whether generating members was worth it, and the rule behind it.

Checked in this order:

1. "copies the snapshots": the median member is less than half as far from its nearest snapshot as a snapshot is from
   its nearest one outside its own block of time.
2. "too few data to tell": members make fewer than 10 errors on average.
3. "copies the snapshots": members err on the same items as some snapshot, error overlap 0.99 or more, and snapshots do
   not do so among themselves; or on exactly the same items, whatever the snapshots do.
4. For each cheap alternative, the difference in ensemble NLL on the same items, d = generated - alternative, with its
   standard error s (over items, paired, and over draws of the members). A gain counts from 1 % of its NLL.
   "worth it": against every alternative d + 2 s < 0 and the gain counts, and accuracy is not lower by more than 2 s.
   "no better than averaging": against some alternative, the average or another, d - 2 s excludes a gain that counts,
   or accuracy is lower.
   "too few data to tell": neither.

To be better than every alternative needs no correction for their number: each test alone has to be passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pdiff_plugin.evaluation.metrics import standard_error
from pdiff_plugin.evaluation.scores import Scores

Outcome = Literal[
    "worth it", "no better than averaging", "copies the snapshots", "too few data to tell", "nothing generated"
]

# "none": all members were drawn alike; a number: members take as many runs in turn; "neighbours": members 2i and 2i + 1
# start from neighbouring snapshots.
Strata = Literal["none", "neighbours"] | int

MIN_GAIN = 0.01
COPY_RATIO = 0.5
COPY_OVERLAP = 0.99
MIN_ERRORS = 10.0
NUM_ERRORS_OF_MEAN = 2.0


@dataclass(frozen=True)
class Verdict:
    """An outcome, the sentence that tells it, and the two numbers that decided it."""

    outcome: Outcome
    sentence: str
    numbers: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Generated ensemble against one alternative on the same items; negative NLL differences favour the generated.

    Attributes:
        nll: mean of the paired differences, and ``nll_error`` its standard error, over items and draws.
        draw_error: the part of it that more members or more draws would lower.
        accuracy: the same of the ensembles' accuracy.
        other_nll: the alternative's NLL.
    """

    name: str
    nll: float
    nll_error: float
    accuracy: float
    accuracy_error: float
    other_nll: float
    draw_error: float = 0.0

    @property
    def needed(self) -> float:
        """Gain in NLL that counts."""
        return MIN_GAIN * self.other_nll

    @property
    def is_won(self) -> bool:
        return (
            self.nll + NUM_ERRORS_OF_MEAN * self.nll_error < 0 and -self.nll >= self.needed and not self.loses_accuracy
        )

    @property
    def is_excluded(self) -> bool:
        """Whether the data rule out a gain that counts."""
        return -self.nll + NUM_ERRORS_OF_MEAN * self.nll_error < self.needed or self.loses_accuracy

    @property
    def loses_accuracy(self) -> bool:
        return self.accuracy + NUM_ERRORS_OF_MEAN * self.accuracy_error < 0

    @property
    def margin(self) -> float:
        """Gain beyond the one that counts, in standard errors: the alternative with the smallest is the strongest."""
        return (-self.nll - self.needed) / max(self.nll_error, 1e-12)


@dataclass(frozen=True)
class Candidate:
    """A set as the verdict sees it.

    Attributes:
        text: its name in a sentence.
        draws: scores of each draw of its members, one or more.
        is_random: whether its members were drawn at random.
        strata: kinds of members, of each of which there is a fixed number.
    """

    text: str
    draws: Sequence[Scores]
    is_random: bool = True
    strata: Strata = "none"

    @property
    def nll(self) -> Tensor:
        """Of the ensemble, mean over draws, (n,)."""
        return torch.stack([scores.nll[-1] for scores in self.draws]).mean(dim=0)

    @property
    def hit(self) -> Tensor:
        """Whether the ensemble is right, mean over draws, (n,) float64."""
        return torch.stack([scores.hit[-1].double() for scores in self.draws]).mean(dim=0)

    @property
    def draw_error(self) -> float:
        """Standard error of the ensemble's mean NLL over draws of its members.

        The larger of what the members and what the draws tell: a few draws may be alike by chance, and members do not
        show what all those of a draw have in common.
        """
        if not self.is_random:
            return 0.0
        within = [jackknife_error(s.member_nll, stratum_of(len(s.member_nll), self.strata)) for s in self.draws]
        return _error_over_draws(within, [float(scores.nll[-1].mean()) for scores in self.draws])

    @property
    def accuracy_draw_error(self) -> float:
        """The same of the ensemble's accuracy, rather too large where members take several runs in turn."""
        if not self.is_random:
            return 0.0
        within = [math.inf if len(s.correct) < 2 else halves_error(s.hit_difference) for s in self.draws]
        return _error_over_draws(within, [float(scores.hit[-1].double().mean()) for scores in self.draws])


def stratum_of(num_members: int, strata: Strata) -> Tensor:
    """Which members were drawn alike, (M,) int64, at least two of each kind where there are two members.

    Members that take the runs in turn differ by run whatever is drawn; those that start from evenly spaced snapshots
    differ by snapshot, of which two neighbours stand for draws from one. Where a run has a single member its own spread
    cannot be seen: all members then count as drawn alike, which makes the error too large rather than too small.
    """
    members = torch.arange(num_members)
    if strata == "neighbours":
        return (members // 2).clamp_max(max(num_members // 2 - 1, 0))
    return members % strata if isinstance(strata, int) and num_members >= 2 * strata else torch.zeros_like(members)


def jackknife_error(member_nll: Tensor, stratum: Tensor | None = None) -> float:
    """Standard error of an ensemble's mean NLL over draws of its members, from leaving out each member once.

    Args:
        member_nll: -log p(true) of each member, (M, n).
        stratum: which members were drawn alike, (M,), at least two of each kind; all unless given.

    Returns:
        The error; infinite for a single member, which tells nothing of others.
    """
    m = len(member_nll)
    if m < 2:
        return math.inf
    probs = (-member_nll).exp()
    others = (probs.sum(dim=0) - probs).clamp_min(1e-300) / (m - 1)  # ensemble without each member, (M, n)
    left_out = -others.log().mean(dim=1)
    variance = 0.0
    for kind in [None] if stratum is None else sorted(set(stratum.tolist())):
        mine = left_out if stratum is None else left_out[stratum == kind]
        # To leave a member out moves the mean by 1/(m - 1) of its deviation, to draw it anew by 1/m.
        variance += float(mine.var()) * len(mine) * ((m - 1) / m) ** 2
    return math.sqrt(variance)


def halves_error(hit_difference: Tensor) -> float:
    """Standard error of an ensemble's accuracy over draws of its members, from the two halves of several divisions.

    Accuracy moves in steps: leaving out a single member turns few items but those often, and a jackknife finds up to
    two and a half times the spread. Halves differ by as much as two draws do, and the error of their mean is half that.

    Args:
        hit_difference: hits of one half minus those of the other, (H, n).
    """
    return float((hit_difference.double().mean(dim=1) / 2).square().mean().sqrt())


def _error_over_draws(within: Sequence[float], values: Sequence[float]) -> float:
    """Standard error of the mean of draws' values, from the error seen within each draw and from their spread."""
    pooled = math.sqrt(sum(error**2 for error in within)) / len(within)
    if len(values) < 2:
        return pooled
    spread = standard_error(torch.tensor(values, dtype=torch.float64))
    return max(pooled, spread) if math.isfinite(pooled) else spread


def compare(name: str, generated: Candidate, other: Candidate) -> Comparison:
    """Pair two ensembles item by item."""
    nll, accuracy = generated.nll - other.nll, generated.hit - other.hit
    draw_error = math.hypot(generated.draw_error, other.draw_error)
    accuracy_error = math.hypot(standard_error(accuracy), generated.accuracy_draw_error, other.accuracy_draw_error)
    return Comparison(
        name,
        float(nll.mean()),
        math.hypot(standard_error(nll), draw_error),
        float(accuracy.mean()),
        accuracy_error,
        float(other.nll.mean()),
        draw_error,
    )


def judge(
    generated: Candidate | None,
    alternatives: Mapping[str, Candidate],
    *,
    distance: float,
    reference_distance: float,
    overlap: float,
    reference_overlap: float,
) -> tuple[Verdict, list[Comparison]]:
    """Apply the rule at the top of this module.

    Args:
        generated: the generated set.
        alternatives: the cheap alternatives.
        distance: median distance of the generated members to their nearest snapshot.
        reference_distance: the same of the snapshots, outside their own block.
        overlap: mean over generated members of the largest error overlap with a snapshot.
        reference_overlap: the same of the snapshots, outside their own block.
    """
    if generated is None:
        text = "Nothing generated was given: the table shows the snapshots and what can be made of them cheaply."
        return Verdict("nothing generated", text, {}), []
    comparisons = [compare(name, generated, other) for name, other in alternatives.items()]
    wrong = ~torch.stack([scores.correct for scores in generated.draws])  # (draws, M, n)
    num_errors = float(wrong.double().sum(dim=-1).mean())

    if distance < COPY_RATIO * reference_distance:
        text = (
            f"Copies the snapshots: generated members lie {distance:.2f} from the nearest snapshot, snapshots lie "
            f"{reference_distance:.2f} from the nearest one outside their own block of time."
        )
        numbers = {"nearest_snapshot_distance": distance, "snapshots_nearest_distance": reference_distance}
        return Verdict("copies the snapshots", text, numbers), comparisons
    if num_errors < MIN_ERRORS:
        text = (
            f"Too few data to tell: members make {num_errors:.1f} errors on {wrong.shape[-1]} items; "
            f"it takes {MIN_ERRORS:.0f} to compare sets. Evaluate on more, or harder, data."
        )
        numbers = {"errors": num_errors, "errors_needed": MIN_ERRORS}
        return Verdict("too few data to tell", text, numbers), comparisons
    all_are_alike = reference_overlap >= COPY_OVERLAP
    if overlap >= COPY_OVERLAP and (overlap == 1 or not all_are_alike):
        text = (
            f"Copies the snapshots: of the items that a generated member or its likest snapshot gets wrong, "
            f"{overlap:.1%} are the same ({COPY_OVERLAP:.0%} and more counts as a copy)."
        )
        return Verdict("copies the snapshots", text, {"wrong_iou": overlap, "threshold": COPY_OVERLAP}), comparisons
    if not comparisons:
        return Verdict("too few data to tell", "Too few data to tell: no alternative was evaluated.", {}), []
    found = _compare_all(comparisons, {name: other.text for name, other in alternatives.items()})
    if overlap >= COPY_OVERLAP:
        text = (
            f"{found.sentence} Members share {overlap:.1%} of their errors with the likest snapshot, but the snapshots "
            f"themselves share {reference_overlap:.1%}: that tells nothing of copies."
        )
        found = replace(found, sentence=text)
    return found, comparisons


def _compare_all(comparisons: list[Comparison], texts: Mapping[str, str]) -> Verdict:
    # The strongest alternative: one that is excluded if there is such, then the one with the smallest margin.
    hardest = min(comparisons, key=lambda c: (not c.is_excluded, c.margin))
    nll = hardest.nll + hardest.other_nll
    against = (
        f"ensemble NLL {nll:.4f} against {hardest.other_nll:.4f} with {texts[hardest.name]} "
        f"(difference {hardest.nll:+.4f} ± {hardest.nll_error:.4f})"
    )
    numbers = {"generated_nll": nll, f"{hardest.name}_nll": hardest.other_nll}
    if all(c.is_won for c in comparisons):
        more = " The other alternatives are further behind." if len(comparisons) > 1 else ""
        return Verdict("worth it", f"Worth it: {against}.{more}", numbers)
    if not hardest.is_excluded:
        # Of two independent errors the larger is what has to shrink.
        by_draw = hardest.draw_error >= hardest.nll_error / math.sqrt(2)
        advice = "Take more members, or several draws." if by_draw else "Evaluate on more data."
        text = f"Too few data to tell: {against}; a gain of {hardest.needed:.4f} would count. {advice}"
        return Verdict("too few data to tell", text, numbers)
    if hardest.loses_accuracy:
        numbers = {"accuracy_difference": hardest.accuracy, "standard_error": hardest.accuracy_error}
        against = (
            f"ensemble accuracy is {100 * hardest.accuracy:+.2f} ± {100 * hardest.accuracy_error:.2f} points "
            f"from that with {texts[hardest.name]}"
        )
    return Verdict("no better than averaging", f"No better than averaging: {against}.", numbers)


def half_mask(num_items: int, seed: int) -> Tensor:
    """A random half of the items, (n,) bool."""
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(num_items, dtype=torch.bool)
    mask[order[: num_items // 2]] = True
    return mask
