"""Whether weights for conditions that were never trained are worth generating, and the rule behind the sentence.

The unit is the condition: differences are paired over conditions, and s is the standard error of their mean. Two standard
errors decide, more where there are few conditions (the 95 % points of Student's t). A gain in loss counts from 1 % of
the other row's loss (or the gain of the task's kind), and from a twentieth of what training at the condition gains on
the average of all: in units of what there is to gain.

*won* against a row: the loss is lower, surely, by what counts, and the score is not surely lower.
*excluded*: the conditions rule out a gain that counts, or the score is surely lower.

The best cheap row is chosen for each condition by the mean loss at the others: the lowest of several means would be
lucky on the conditions that chose it. Inside and outside the fitted range are judged apart, in this order:

1. "too few conditions to tell": fewer than three.
2. "nothing to gain": training at the condition itself has its gain on the average of all excluded.
3. "nothing to gain": training there has won against the best cheap row, and the condition's own weights in the span of
   the fitted ones have their gain on that row excluded. No generator that lives in that span can do better.
4. "conditions explain nothing": generated members have their gain on members made for another condition excluded.
5. "worth it": generated members have won against every cheap row and every other way to do without: the model as it is,
   a joint one, a user's own.
6. "interpolation is enough": their gain on the best cheap row is excluded; "another row is enough": that on one of the
   others. "train there" in place of both: training there has won against them, and they are not won over either.
7. "not told apart": the conditions leave it open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pdiff_plugin.evaluation.condition_rows import AVERAGE, CEILING, GENERATED, SHUFFLED, TRAINED, spec_of
from pdiff_plugin.evaluation.kind import TaskKind
from pdiff_plugin.evaluation.metrics import standard_error

Outcome = Literal[
    "worth it",
    "interpolation is enough",
    "another row is enough",
    "train there",
    "nothing to gain",
    "conditions explain nothing",
    "not told apart",
    "too few conditions to tell",
]
BEST_CHEAP = "best cheap"
MIN_SHARE = 0.05
MIN_CONDITIONS = 3
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
        reach = self.loss + num_errors(self.num_conditions) * self.loss_error
        return reach < 0 and -self.loss >= self.needed and not self.loses_score

    @property
    def is_excluded(self) -> bool:
        """Whether a gain that counts is ruled out."""
        return self.loses_score or -self.loss + num_errors(self.num_conditions) * self.loss_error < self.needed

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


@dataclass(frozen=True)
class ConditionVerdict:
    """What holds inside the fitted range, or outside.

    Attributes:
        outcome: in a word.
        sentence: that tells it.
        num_conditions: it is based on.
        best_cheap: row that is best by the mean loss.
        cheap_by_condition: row that was chosen at each condition by the others.
        recovery: of ``generated`` and of ``best cheap``.
        headroom: span ceiling minus the best cheap row.
        differences: generated minus each other row, and minus the best cheap one.
    """

    outcome: Outcome
    sentence: str
    num_conditions: int
    best_cheap: str
    cheap_by_condition: list[str]
    recovery: dict[str, Recovery]
    headroom: Difference | None
    differences: list[Difference]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ConditionVerdict:
        """What :meth:`to_json` gave; null stands for what is undefined."""
        headroom = document["headroom"]
        return cls(
            outcome=document["outcome"],
            sentence=document["sentence"],
            num_conditions=document["num_conditions"],
            best_cheap=document["best_cheap"],
            cheap_by_condition=list(document["cheap_by_condition"]),
            recovery={name: Recovery(**_floats(one)) for name, one in document["recovery"].items()},
            headroom=None if headroom is None else Difference(**_floats(headroom)),
            differences=[Difference(**_floats(one)) for one in document["differences"]],
        )


def _floats(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in document.items()}


def judge_conditions(
    kind: TaskKind, rows: Mapping[str, Series], train_seconds: float | None = None, where: str = ""
) -> ConditionVerdict:
    """Judge generated members over some conditions.

    Args:
        kind: of the task.
        rows: row -> its series, all over the same C conditions.
        train_seconds: what training at one of them costs, if that is known.
        where: start of the sentence.
    """
    scale = _gain(rows)
    cheap = [name for name in rows if spec_of(name).role == "cheap"]
    best = min(cheap, key=lambda name: float(rows[name].loss.mean()))
    fair, chosen = best_by_others({name: rows[name] for name in cheap})
    everything = {**rows, BEST_CHEAP: fair}

    def minus(one: str, other: str) -> Difference | None:
        if one not in everything or other not in everything:
            return None
        return difference(kind, other, everything[one], everything[other], scale)

    differences = [found for name in everything if name != GENERATED and (found := minus(GENERATED, name))]
    recovery = {name: recovered(everything[name], rows[AVERAGE], rows[TRAINED]) for name in (GENERATED, BEST_CHEAP)}
    headroom = minus(CEILING, BEST_CHEAP)
    case = _Case(kind, {found.name: found for found in differences}, best, recovery, headroom, train_seconds)
    case.trained_over_average, case.trained_over_cheap = minus(TRAINED, AVERAGE), minus(TRAINED, BEST_CHEAP)
    case.trained = minus(TRAINED, GENERATED)
    outcome, sentence = case.decide()
    sentence = f"{where}{sentence}" if where else sentence[0].upper() + sentence[1:]
    C = len(rows[GENERATED].loss)
    return ConditionVerdict(outcome, sentence, C, best, chosen, recovery, headroom, differences)


def _gain(rows: Mapping[str, Series]) -> float:
    """What training at the condition gains on the average of all, at least 0."""
    return max(0.0, float((rows[AVERAGE].loss - rows[TRAINED].loss).nanmean()))


def difference(kind: TaskKind, name: str, one: Series, other: Series, scale: float) -> Difference:
    """``one`` minus ``other``, over the conditions that have both."""
    both = ~(one.loss.isnan() | other.loss.isnan())
    loss, score = (one.loss - other.loss)[both], (one.score - other.score)[both]
    n, better, worse = len(loss), int((loss < 0).sum()), int((loss > 0).sum())
    needed = max(kind.needed(other.loss[both]), MIN_SHARE * scale) if n else math.nan
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
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


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


@dataclass
class _Case:
    """One group of conditions on its way to a sentence."""

    kind: TaskKind
    against: Mapping[str, Difference]
    best: str
    recovery: Mapping[str, Recovery]
    headroom: Difference | None
    train_seconds: float | None
    trained_over_average: Difference | None = None
    trained_over_cheap: Difference | None = None
    trained: Difference | None = None

    def decide(self) -> tuple[Outcome, str]:
        cheap, there = self.against[BEST_CHEAP], self.trained
        assert there is not None and self.trained_over_average is not None and self.trained_over_cheap is not None
        num, best = cheap.num_conditions, spec_of(self.best).text
        if num < MIN_CONDITIONS:
            few = f"{num} held-out condition{'' if num == 1 else 's'}"
            return (
                "too few conditions to tell",
                f"too few conditions to tell: {few}, at least {MIN_CONDITIONS} are needed.",
            )
        if self.trained_over_average.is_excluded:
            return "nothing to gain", (
                "nothing to gain: training at the condition itself is no better than the average of all conditions "
                f"({self.trained_over_average.text(self.kind)})."
            )
        if self.trained_over_cheap.is_won and self.headroom is not None and self.headroom.is_excluded:
            return "nothing to gain", (
                f"nothing to gain: the span of the runs holds no more than {best}: the conditions' own weights "
                f"projected on it differ from it by {self.headroom.text(self.kind)}. Training there {self._costing()}"
                f"gives more: {self.trained_over_cheap.text(self.kind)}."
            )
        shuffled = self.against.get(SHUFFLED)
        if shuffled is not None and shuffled.is_excluded:
            return "conditions explain nothing", (
                "conditions explain nothing: members generated for another condition do as well (generated minus "
                f"shuffled: {shuffled.text(self.kind)})."
            )
        rivals = [one for one in self.against.values() if spec_of(one.name).role in ("cheap", "other")]
        rivals = [one for one in rivals if one.name != BEST_CHEAP]
        if all(one.is_won for one in rivals):
            hardest = min(rivals, key=lambda one: one.margin)
            return "worth it", (
                f"worth it: at {num} conditions that were never fitted, generated members are better than every other "
                f"row, {spec_of(hardest.name).text} among them ({hardest.text(self.kind)}). {self._recovered()}"
                f"{self._beside_training()}"
            )
        others = [one for one in rivals if spec_of(one.name).role == "other" and one.is_excluded]
        enough = [*([cheap] if cheap.is_excluded else []), *others]
        if enough:
            return self._enough(min(enough, key=lambda one: one.margin))
        closest = min(
            [cheap, *(one for one in rivals if spec_of(one.name).role == "other")], key=lambda one: one.margin
        )
        name = best if closest.name == BEST_CHEAP else spec_of(closest.name).text
        return "not told apart", (
            f"not told apart from {name}: generated minus it, {closest.text(self.kind)} over {num} conditions. "
            f"{self._recovered()}{self._beside_training()}"
        )

    def _enough(self, rival: Difference) -> tuple[Outcome, str]:
        assert self.trained is not None
        is_cheap = rival.name == BEST_CHEAP
        name = spec_of(self.best if is_cheap else rival.name).text
        found = f"generated minus it, {rival.text(self.kind)} over {rival.num_conditions} conditions"
        if self.trained.is_won and self.trained_over_cheap is not None and self.trained_over_cheap.is_won:
            return "train there", (
                f"train there: it {self._costing()}gives more than generated members, {self.trained.text(self.kind)}; and "
                f"{name} is as good as these ({found})."
            )
        outcome: Outcome = "interpolation is enough" if is_cheap else "another row is enough"
        return outcome, (
            f"{outcome if is_cheap else 'no generator is needed'}: {name} is as good ({found}). {self._recovered()}".rstrip()
        )

    def _recovered(self) -> str:
        if self.trained_over_average is None or not self.trained_over_average.is_won:
            return ""  # a share of what is not there
        generated, cheap = (self.recovery[name] for name in (GENERATED, BEST_CHEAP))
        return (
            f"Of what training there gains on the average of all ({self.kind.loss.text}), generated members recover "
            f"{100 * generated.loss:.0f} ± {100 * generated.loss_error:.0f} %, the best cheap row "
            f"{100 * cheap.loss:.0f} ± {100 * cheap.loss_error:.0f} %. "
        )

    def _beside_training(self) -> str:
        there = self.trained
        assert there is not None
        gives = (
            "gives more" if there.is_won else "gives no gain that counts" if there.is_excluded else "is not told apart"
        )
        return f"Training there {self._costing()}{gives}: {there.text(self.kind)}."

    def _costing(self) -> str:
        return "" if self.train_seconds is None else f"costs about {self.train_seconds:.3g} s and "
