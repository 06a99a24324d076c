"""The one sentence that says whether generating members was worth it, and the rule behind it.

Checked in this order:

1. "copies the snapshots": the median member is less than half as far from its nearest snapshot as a snapshot is from
   its nearest one outside its own block of time, and less than half as far as members of the nearest cheap set are.
2. "too few data to tell": members make fewer than 10 errors on average.
3. "copies the snapshots": members err on the same items as some snapshot, error overlap 0.99 or more, and snapshots do
   not do so among themselves, or it is 1; and members of no cheap set reach 0.99, and of the most alike one differ from
   a snapshot's errors more than twice as much.
4. For each baseline, the difference in ensemble NLL on the same items, d = generated - baseline, with its standard
   error s (over items, paired, and over draws of the members). A gain counts from 1 % of its NLL.
   "worth it": against every baseline d + 2 s < 0 and the gain counts, and accuracy is not lower by more than 2 s.
   "no better than averaging": against some baseline, the average or another, d - 2 s excludes a gain that counts,
   or accuracy is lower.
   "too few data to tell": neither.
   Where answers are probabilities that can be temperature-scaled, "worth it" asks for the same once more with all
   ensembles scaled, each with a temperature chosen on the other half of the items: what one number can do is no gain.
5. "snapshots hardly differ", instead of "no better than averaging": an ensemble of a run's snapshots gains less than
   1 % of its NLL on a single one, whichever run, and either two of them share 98 % of their errors on average or 98 %
   of their movement lies along one line. Unless the generated members are surely worse than the snapshots, by what
   would count as a gain: then that is what there is to say.

The cheap sets of 1 and 3 are averages, Gaussians and SWAG, pooled and per run, as far as they were drawn; not those
that are snapshots plus noise. Between snapshots on a line anything is near one of them, and where all predict alike
anything errs as they do: an average of 16 would be called a copy, and nobody copied. Half as far (as different) and not
just nearer (more alike), since a set of the same kind drawn anew is nearer every other time. Where a cheap set
reaches 0.99, likeness tells nothing, as little as 1.0 beside 0.9997: of averages of 64 on a line one in seven would be
called copies. Where none was drawn the snapshots alone are the measure.

Snapshots that hardly differ leave nothing to gain to whatever is made of them, so the sets come out alike and the
comparison is lost before it begins. That is a finding about the recording and not about the generator. It takes nothing
from members that come from elsewhere, such as independent networks: these pass 4. The gain decides, since it is what
an ensemble is for, and it alone would not do: snapshots of different errors may by chance gain nothing, and of those
something better can be made. Runs are looked at one by one: several that each stand still are an ensemble of as many
members already.

NLL, accuracy and error overlap are those of a classification; each kind of task has a loss, a score and a likeness of
its own in their place. Where errors are real numbers rule 2 has nothing to count, and rule 3 takes a correlation of
0.9999; where a loss may be negative the kind says what gain counts: 0.01 nats of a density, or 1 % of the items' mean
absolute loss. To be better than every baseline needs no correction for their number: each test alone has to be passed.
Members with NaN or Inf are left out before anything is judged, and the sentence names their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pdiff_plugin.evaluation.baselines import SNAPSHOTS
from pdiff_plugin.evaluation.kind import MIN_GAIN, Scores, TaskKind
from pdiff_plugin.evaluation.metrics import standard_error
from pdiff_plugin.snapshots.files import is_number
from pdiff_plugin.snapshots.movement import ADVICE, Movement

Outcome = Literal[
    "worth it",
    "no better than averaging",
    "copies the snapshots",
    "snapshots hardly differ",
    "too few data to tell",
    "nothing generated",
]

COPY_RATIO = 0.5
MIN_ERRORS = 10.0
NUM_ERRORS_OF_MEAN = 2.0


@dataclass(frozen=True)
class Verdict:
    """An outcome, the sentence that tells it, and the two numbers that decided it.

    What a newer release found may have an outcome that is none of :data:`Outcome`.
    """

    outcome: Outcome
    sentence: str
    numbers: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Verdict:
        """As it stands in evaluation.json.

        Raises:
            ValueError: it does not.
        """
        outcome, sentence, numbers = (document[key] for key in ("verdict_outcome", "verdict", "verdict_numbers"))
        if not (isinstance(outcome, str) and isinstance(sentence, str)):
            raise ValueError("a verdict that is no text")
        if not all(value is None or is_number(value) for value in numbers.values()):
            raise ValueError("deciding numbers that are none")
        return cls(outcome, sentence, dict(numbers))  # type: ignore[arg-type]  # any text, see above


@dataclass(frozen=True)
class Comparison:
    """Generated ensemble against one baseline on the same items; negative differences of loss favour the generated.

    Attributes:
        loss: mean of the paired differences, and ``loss_error`` its standard error, over items and draws.
        score: the same of the ensembles' scores; positive differences favour the generated.
        other_loss: the baseline's loss.
        draw_error: the part of ``loss_error`` that more members or more draws would lower.
        gain: in loss that counts, where that is not 1 % of the baseline's own.
    """

    name: str
    loss: float
    loss_error: float
    score: float
    score_error: float
    other_loss: float
    draw_error: float = 0.0
    gain: float | None = None

    @property
    def needed(self) -> float:
        """Gain in loss that counts."""
        return MIN_GAIN * self.other_loss if self.gain is None else self.gain

    @property
    def is_won(self) -> bool:
        reach = self.loss + NUM_ERRORS_OF_MEAN * self.loss_error
        return reach < 0 and -self.loss >= self.needed and not self.loses_score

    @property
    def is_excluded(self) -> bool:
        """Whether the data rule out a gain that counts."""
        return -self.loss + NUM_ERRORS_OF_MEAN * self.loss_error < self.needed or self.loses_score

    @property
    def is_lost(self) -> bool:
        """Whether the baseline is surely better by what would count as a gain."""
        return self.loss - NUM_ERRORS_OF_MEAN * self.loss_error > self.needed or self.loses_score

    @property
    def loses_score(self) -> bool:
        return self.score + NUM_ERRORS_OF_MEAN * self.score_error < 0

    @property
    def margin(self) -> float:
        """Gain beyond the one that counts, in standard errors: the baseline with the smallest is the strongest."""
        return (-self.loss - self.needed) / max(self.loss_error, 1e-12)

    def to_json(self, kind: TaskKind) -> dict[str, Any]:
        """As in evaluation.json, where loss and score have the names that the kind of task gives them."""
        values = {name: value for name, value in vars(self).items() if name != "gain" or value is not None}
        return {_in_words(name, kind): value for name, value in values.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], kind: TaskKind) -> Comparison:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: a figure that is none.
        """
        names = {_in_words(field.name, kind): field.name for field in fields(cls)}
        known = {names[key]: value for key, value in document.items() if key in names}
        for name, value in known.items():
            if not (isinstance(value, str) if name == "name" else value is None or is_number(value)):
                raise ValueError(f"{name} of a comparison that is {value!r}")
        # JSON knows no infinity, which the error of a single random member is.
        return cls(**{name: math.inf if value is None else value for name, value in known.items()})  # type: ignore[arg-type]


def _in_words(name: str, kind: TaskKind) -> str:
    return name.replace("loss", kind.loss.key).replace("score", kind.score.key)


@dataclass(frozen=True)
class ScoredSet:
    """A set as the verdict sees it.

    Attributes:
        kind: of the task.
        text: its name in a sentence.
        draws: scores of each draw of its members, one or more.
        is_random: whether its members were drawn at random.
        stratum: which members were drawn alike, (M,), at least two of each where there are two members; all of them
            unless given.
        first_half: a random half of the items, by which temperatures are chosen, (n,) bool; none are unless given.
    """

    kind: TaskKind
    text: str
    draws: Sequence[Scores]
    is_random: bool = True
    stratum: Tensor | None = None
    first_half: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Of the ensemble, mean over draws, (n,)."""
        return torch.stack([scores.loss[-1] for scores in self.draws]).mean(dim=0)

    @property
    def score(self) -> Tensor:
        """Of the ensemble, mean over draws, (n,) float64."""
        return torch.stack([scores.score[-1].double() for scores in self.draws]).mean(dim=0)

    def when_scaled(self) -> ScoredSet | None:
        """The same after temperature scaling; None where answers cannot be scaled.

        Only the ensemble's loss is: how far it varies over draws of its members is told by that of the plain one.
        """
        scale = self.kind.loss_when_scaled
        if scale is None or self.first_half is None:
            return None
        losses = [scale(scores, self.first_half) for scores in self.draws]
        draws = [
            replace(s, loss=torch.cat([s.loss[:-1], own[None]])) for s, own in zip(self.draws, losses, strict=True)
        ]
        return replace(self, draws=draws)

    @property
    def draw_error(self) -> float:
        """Standard error of the ensemble's mean loss over draws of its members.

        The larger of what the members and what the draws tell: a few draws may be alike by chance, and members do not
        show what all those of a draw have in common.
        """
        if not self.is_random:
            return 0.0
        within = [
            math.inf if len(s.member_loss) < 2 else jackknife_error(self.kind.left_out(s), self.stratum)
            for s in self.draws
        ]
        return _error_over_draws(within, [float(scores.loss[-1].mean()) for scores in self.draws])

    @property
    def score_draw_error(self) -> float:
        """The same of the ensemble's score, rather too large where members take several runs in turn."""
        if not self.is_random:
            return 0.0
        within = [math.inf if len(s.member_score) < 2 else halves_error(s.half_difference) for s in self.draws]
        return _error_over_draws(within, [float(scores.score[-1].double().mean()) for scores in self.draws])


def jackknife_error(left_out: Tensor, stratum: Tensor | None = None) -> float:
    """Standard error of an ensemble's mean loss over draws of its members, from leaving out each member once.

    Args:
        left_out: mean loss of the ensemble without each of its two or more members, (M,).
        stratum: which members were drawn alike, (M,), at least two of each kind; all unless given.
    """
    m = len(left_out)
    variance = 0.0
    for number in [None] if stratum is None else sorted(set(stratum.tolist())):
        mine = left_out if stratum is None else left_out[stratum == number]
        # To leave a member out moves the mean by 1/(m - 1) of its deviation, to draw it anew by 1/m.
        variance += float(mine.var()) * len(mine) * ((m - 1) / m) ** 2
    return math.sqrt(variance)


def halves_error(half_difference: Tensor) -> float:
    """Standard error of an ensemble's score over draws of its members, from the two halves of several divisions.

    Accuracy moves in steps: leaving out a single member turns few items but those often, and a jackknife finds up to
    two and a half times the spread. Halves differ by as much as two draws do, and the error of their mean is half that.

    Args:
        half_difference: score of one half minus that of the other, (H, n).
    """
    return float((half_difference.double().mean(dim=1) / 2).square().mean().sqrt())


def _error_over_draws(within: Sequence[float], values: Sequence[float]) -> float:
    """Standard error of the mean of draws' values, from the error seen within each draw and from their spread."""
    pooled = math.sqrt(sum(error**2 for error in within)) / len(within)
    if len(values) < 2:
        return pooled
    spread = standard_error(torch.tensor(values, dtype=torch.float64))
    return max(pooled, spread) if math.isfinite(pooled) else spread


def compare(name: str, generated: ScoredSet, other: ScoredSet) -> Comparison:
    """Pair two ensembles item by item."""
    loss, score = generated.loss - other.loss, generated.score - other.score
    draw_error = math.hypot(generated.draw_error, other.draw_error)
    score_error = math.hypot(standard_error(score), generated.score_draw_error, other.score_draw_error)
    return Comparison(
        name,
        float(loss.mean()),
        math.hypot(standard_error(loss), draw_error),
        float(score.mean()),
        score_error,
        float(other.loss.mean()),
        draw_error,
        generated.kind.gain and generated.kind.gain(other.loss),
    )


@dataclass(frozen=True)
class Nearness:
    """How near generated members come to the snapshots, in weights and in errors, beside what is to be expected.

    Attributes:
        distance: median distance of the members to their nearest snapshot.
        reference_distance: the same of the snapshots, outside their own block.
        cheap_distance: the same of the nearest cheap set; infinite where none was drawn.
        likeness: of the errors of members and the closest snapshot, mean over members.
        reference_likeness: the same of the snapshots, outside their own block.
        cheap_likeness: the same of the most alike cheap set; minus infinity where none was drawn.
    """

    distance: float = math.nan
    reference_distance: float = math.nan
    cheap_distance: float = math.inf
    likeness: float = math.nan
    reference_likeness: float = math.nan
    cheap_likeness: float = -math.inf

    @property
    def lies_on_snapshots(self) -> bool:
        return self.distance < COPY_RATIO * min(self.reference_distance, self.cheap_distance)

    def errs_as_snapshots(self, threshold: float) -> bool:
        """Whether errors are those of a snapshot, for the kind's likeness from which on they count as the same."""
        if not self.likeness >= threshold > self.cheap_likeness:
            return False
        is_more_alike = 1 - self.likeness < COPY_RATIO * (1 - self.cheap_likeness)
        return is_more_alike and (self.likeness == 1 or self.reference_likeness < threshold)


@dataclass(frozen=True)
class Differences:
    """How much the snapshots of a run differ; the run that differs most speaks for all.

    Attributes:
        kind: of the task.
        num_runs: in the store.
        gain: mean loss of single snapshots minus loss of their ensemble; NaN where it was not measured.
        loss: of the ensemble.
        needed: gain that would count.
        likeness: of the errors of two snapshots of one run outside their own block, mean over pairs; NaN without such.
        movement: of the weights; None where it was not measured.
    """

    kind: TaskKind
    num_runs: int
    gain: float
    loss: float
    needed: float
    likeness: float
    movement: Movement | None

    @property
    def are_small(self) -> bool:
        is_line = self.movement is not None and self.movement.is_line
        return self.gain < self.needed and (self.likeness >= self.kind.likeness.alike or is_line)

    @property
    def text(self) -> str:
        """As sentences."""
        where = "" if self.num_runs == 1 else f" within each of the {self.num_runs} runs"
        form, loss = self.kind.loss.format, self.kind.loss.text
        found = (
            f"Snapshots hardly differ{where}: the {self.kind.likeness.text} of two of them is "
            f"{self.likeness:.3f} and their ensemble gains {self.gain:{form}} {loss} on a single one (from "
            f"{self.needed:{form}} on it would count)"
        )
        return f"{found}; {self.movement.text}." if self.movement else f"{found}."

    @property
    def advice(self) -> str:
        return (
            f"{ADVICE} The runs do differ: the last snapshot of each is an ensemble." if self.num_runs > 1 else ADVICE
        )

    def to_json(self) -> dict[str, Any]:
        """As in the details of an evaluation."""
        return {
            "are_small": self.are_small,
            "gain": self.gain,
            "loss": self.loss,
            "likeness": self.likeness,
            "movement": self.movement.to_json() if self.movement else None,
        }


def judge(
    generated: ScoredSet | None, baselines: Mapping[str, ScoredSet], nearness: Nearness, differences: Differences
) -> tuple[Verdict, list[Comparison]]:
    """Apply the rule at the top of this module.

    Args:
        generated: the generated set.
        baselines: those that were drawn.
        nearness: of the generated set.
        differences: between the snapshots.
    """
    if generated is None:
        text = "Nothing generated was given: the table shows the snapshots and what can be made of them cheaply."
        if differences.are_small:
            text += f" {differences.text} {differences.advice}"
        return Verdict("nothing generated", text, {}), []
    comparisons = [compare(name, generated, other) for name, other in baselines.items()]
    verdict = (
        _lies_on_snapshots(nearness)
        or _errs_too_rarely(generated)
        or _errs_as_snapshots(generated.kind, nearness)
        or _compare_all(generated.kind, comparisons, baselines, nearness, differences)
    )
    scaled = generated.when_scaled()
    if verdict.outcome == "worth it" and scaled is not None:
        verdict = _when_scaled(verdict, scaled, baselines)
    return verdict, comparisons


def _when_scaled(verdict: Verdict, generated: ScoredSet, baselines: Mapping[str, ScoredSet]) -> Verdict:
    """A verdict of "worth it", if it stands where all ensembles are temperature-scaled, or what is found there."""
    others = {name: other.when_scaled() for name, other in baselines.items()}
    comparisons = [compare(name, generated, other) for name, other in others.items() if other is not None]
    hardest = _hardest(comparisons)
    found = _against(
        generated.kind, hardest, baselines[hardest.name].text, [c for c in comparisons if c is not hardest]
    )
    if found.outcome == "worth it":
        return replace(verdict, sentence=f"{verdict.sentence} So it is once all are temperature-scaled.")
    (outcome, _, found_text), unscaled_text = found.sentence.partition(": "), verdict.sentence.partition(": ")[2]
    text = f"{outcome} once all are temperature-scaled: {found_text} Without scaling: {unscaled_text}"
    return replace(found, sentence=text)


def _lies_on_snapshots(nearness: Nearness) -> Verdict | None:
    if not nearness.lies_on_snapshots:
        return None
    distance, reference_distance = nearness.distance, nearness.reference_distance
    text = (
        f"Copies the snapshots: generated members lie {distance:.2f} from the nearest snapshot, snapshots lie "
        f"{reference_distance:.2f} from the nearest one outside their own block of time"
    )
    numbers = {"nearest_snapshot_distance": distance, "snapshots_nearest_distance": reference_distance}
    if math.isfinite(nearness.cheap_distance):
        text += f", members of the nearest cheap set {nearness.cheap_distance:.2f}"
        numbers["cheap_nearest_distance"] = nearness.cheap_distance
    return Verdict("copies the snapshots", f"{text}.", numbers)


def _errs_too_rarely(generated: ScoredSet) -> Verdict | None:
    if not generated.kind.likeness.are_counted:
        return None
    errors = torch.stack([generated.kind.errors(scores) for scores in generated.draws])  # (draws, M, n)
    num_errors = float(errors.double().sum(dim=-1).mean())
    if not num_errors < MIN_ERRORS:
        return None
    text = (
        f"Too few data to tell: members make {num_errors:.1f} errors on {errors.shape[-1]} "
        f"{generated.kind.likeness.unit}; it takes {MIN_ERRORS:.0f} to compare sets. Evaluate on more, or harder, data."
    )
    return Verdict("too few data to tell", text, {"errors": num_errors, "errors_needed": MIN_ERRORS})


def _errs_as_snapshots(kind: TaskKind, nearness: Nearness) -> Verdict | None:
    threshold = kind.likeness.copy
    if not nearness.errs_as_snapshots(threshold):
        return None
    why = kind.likeness.copied.format(found=nearness.likeness)
    least = f"{threshold:.0%}" if kind.likeness.are_counted else f"{threshold:g}"
    text = f"Copies the snapshots: {why} ({least} and more counts as a copy)."
    return Verdict("copies the snapshots", text, {kind.likeness.key: nearness.likeness, "threshold": threshold})


def _compare_all(
    kind: TaskKind,
    comparisons: list[Comparison],
    baselines: Mapping[str, ScoredSet],
    nearness: Nearness,
    differences: Differences,
) -> Verdict:
    if not comparisons:
        return Verdict("too few data to tell", "Too few data to tell: no baseline was evaluated.", {})
    hardest = _hardest(comparisons)
    found = _against(kind, hardest, baselines[hardest.name].text, [c for c in comparisons if c is not hardest])
    # Where the snapshots are not among the baselines, all of these stand for them.
    plain = [c for c in comparisons if c.name == SNAPSHOTS] or comparisons
    is_lost = all(c.is_lost for c in plain)
    if found.outcome == "no better than averaging" and differences.are_small and not is_lost:
        text = f"{differences.text} Whatever is made of them comes out alike. {found.sentence} {differences.advice}"
        numbers = {"gain": differences.gain, kind.likeness.key: differences.likeness}
        found = Verdict("snapshots hardly differ", text, numbers | found.numbers)
    return replace(found, sentence=found.sentence + _why_no_copies(kind, nearness))


def _hardest(comparisons: Sequence[Comparison]) -> Comparison:
    """The strongest baseline: one that is excluded if there is such, then the one with the smallest margin."""
    return min(comparisons, key=lambda c: (not c.is_excluded, c.margin))


def _why_no_copies(kind: TaskKind, nearness: Nearness) -> str:
    """What to say of members that err as snapshots do."""
    if not nearness.likeness >= kind.likeness.copy:
        return ""
    if nearness.reference_likeness >= kind.likeness.copy:
        found, reference = nearness.likeness, nearness.reference_likeness
        return f" {kind.likeness.all_alike.format(found=found, reference=reference)}"
    return (
        f" Members err much as a snapshot does ({kind.likeness.text} {nearness.likeness:.3f}), but so do averages or "
        f"Gaussians ({nearness.cheap_likeness:.3f}): that tells nothing of copies."
    )


def _against(kind: TaskKind, hardest: Comparison, text: str, others: list[Comparison]) -> Verdict:
    loss, key, form = hardest.loss + hardest.other_loss, kind.loss.key, kind.loss.format
    against = (
        f"ensemble {kind.loss.text} {loss:{form}} against {hardest.other_loss:{form}} with {text} "
        f"(difference {kind.loss.difference(hardest.loss, hardest.loss_error)})"
    )
    numbers = {f"generated_{key}": loss, f"{hardest.name}_{key}": hardest.other_loss}
    if hardest.is_won and all(c.is_won for c in others):
        more = " The other baselines are further behind." if others else ""
        return Verdict("worth it", f"Worth it: {against}.{more}", numbers)
    if not hardest.is_excluded:
        # Of two independent errors the larger is what has to shrink.
        by_draw = hardest.draw_error >= hardest.loss_error / math.sqrt(2)
        advice = "Take more members, or several draws." if by_draw else "Evaluate on more data."
        sentence = f"Too few data to tell: {against}; a gain of {hardest.needed:{form}} would count. {advice}"
        return Verdict("too few data to tell", sentence, numbers)
    if hardest.loses_score:
        numbers = {f"{kind.score.key}_difference": hardest.score, "standard_error": hardest.score_error}
        difference = kind.score.difference(hardest.score, hardest.score_error)
        against = f"ensemble {kind.score.text} is {difference} from that with {text}"
    return Verdict("no better than averaging", f"No better than averaging: {against}.", numbers)


def half_mask(num_items: int, seed: int) -> Tensor:
    """A random half of the items, (n,) bool."""
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(num_items, dtype=torch.bool)
    mask[order[: num_items // 2]] = True
    return mask
