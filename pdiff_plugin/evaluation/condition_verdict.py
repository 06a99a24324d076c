"""Whether weights for conditions that were never trained are worth generating, and the rule behind the sentence.

The unit is the condition: differences are paired over conditions, with the standard error of their mean. Two standard
errors decide, more where there are few conditions (the 95 % points of Student's t). A gain in loss counts from 1 % of
the other row's loss, or the gain of the task's kind.

*won* against a row: the loss is lower, surely, by what counts, and the score is not surely lower.
*excluded*: the conditions rule out a gain that counts, or the score is surely lower.

The best cheap row is chosen for each condition by the mean loss at the others: the lowest of several means would be
lucky at the conditions that chose it. Inside and outside the fitted range are judged apart, in this order:

1. "too few conditions to tell": fewer than three.
2. "nothing to gain": the gain of training at the condition itself on the average of all is excluded.
3. "nothing to gain": training there has won against the best cheap row; the gain on that row of the condition's own
   weights, projected on the span of the fitted ones, is excluded; and generated members are not surely better than it.
   The projection is the nearest point of the span by weights and not by loss: where other points are better, it is no
   bound, and members that did better have shown so.
4. "conditions explain nothing": the gain of generated members on members made for another condition is excluded.
5. "worth it": generated members have won against every cheap row and every other way to do without: the model as it is,
   a joint one, a user's own.
6. "train there": training there has won against generated members and against the best cheap row, and generated members
   have not won against the latter.
7. "interpolation is enough": the gain of generated members on the best cheap row is excluded; "another row is enough":
   that on one of the others is.
8. "not told apart": the conditions leave it open.

To be better than every row needs no correction for their number, as each single test has to be passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from pdiff_plugin.evaluation.condition_rows import (
    AVERAGE,
    CEILING,
    GENERATED,
    SHUFFLED,
    TRAINED,
    spec_of,
)
from pdiff_plugin.evaluation.condition_statistics import (
    Difference,
    Recovery,
    Series,
    best_by_others,
    difference,
    recovered,
)
from pdiff_plugin.evaluation.kind import TaskKind
from pdiff_plugin.snapshots.files import number_in

F = TypeVar("F", Recovery, Difference)

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
MIN_CONDITIONS = 3


@dataclass(frozen=True)
class ConditionVerdict:
    """What holds inside the fitted range, or outside.

    Attributes:
        outcome: in a word.
        sentence: that tells it.
        num_conditions: that it is based on.
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
    headroom: Difference
    differences: list[Difference]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ConditionVerdict:
        """What :meth:`to_json` gave; null stands for what is undefined, and an outcome may be that of a newer release.

        Raises:
            ValueError: an outcome that is no text, or a figure that is none.
        """
        if not isinstance(document["outcome"], str):
            raise ValueError("an outcome that is no text")
        return cls(
            outcome=document["outcome"],  # type: ignore[arg-type]  # any text, see above
            sentence=str(document["sentence"]),
            num_conditions=int(document["num_conditions"]),
            best_cheap=str(document["best_cheap"]),
            cheap_by_condition=list(document["cheap_by_condition"]),
            recovery={name: _figures(Recovery, document["recovery"][name]) for name in (GENERATED, BEST_CHEAP)},
            headroom=_figures(Difference, document["headroom"]),
            differences=[_figures(Difference, one) for one in document["differences"]],
        )


def _figures(kind: type[F], document: Mapping[str, Any]) -> F:
    values: dict[str, Any] = {}
    for key in (field.name for field in fields(kind)):
        number = 0.0 if key == "name" else number_in(document[key])
        values[key] = str(document[key]) if key == "name" else int(number) if key.startswith("num_") else number
    return kind(**values)


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
    cheap = {name: series for name, series in rows.items() if spec_of(name).role == "cheap"}
    fair, chosen = best_by_others(cheap)
    everything = {**rows, BEST_CHEAP: fair}

    def minus(one: str, other: str) -> Difference:
        return difference(kind, other, everything[one], everything[other])

    case = _Case(
        kind=kind,
        against={name: minus(GENERATED, name) for name in everything if name != GENERATED},
        best=min(cheap, key=lambda name: float(cheap[name].loss.mean())),
        recovery={name: recovered(everything[name], rows[AVERAGE], rows[TRAINED]) for name in (GENERATED, BEST_CHEAP)},
        headroom=minus(CEILING, BEST_CHEAP),
        trained={name: minus(TRAINED, name) for name in (AVERAGE, BEST_CHEAP, GENERATED)},
        train_seconds=train_seconds,
    )
    outcome, sentence = case.decide()
    return ConditionVerdict(
        outcome,
        f"{where}{sentence}" if where else sentence[0].upper() + sentence[1:],
        len(rows[GENERATED].loss),
        case.best,
        chosen,
        case.recovery,
        case.headroom,
        list(case.against.values()),
    )


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One group of conditions on its way to a sentence.

    Attributes:
        kind: of the task.
        against: generated minus each other row.
        best: the cheap row of the lowest mean loss.
        recovery: as in the verdict.
        headroom: as in the verdict.
        trained: training there minus the average, the best cheap row and generated members.
        train_seconds: what training there costs, if that is known.
    """

    kind: TaskKind
    against: dict[str, Difference]
    best: str
    recovery: dict[str, Recovery]
    headroom: Difference
    trained: dict[str, Difference]
    train_seconds: float | None

    def decide(self) -> tuple[Outcome, str]:
        num, cheap, shuffled = self.headroom.num_conditions, self.against[BEST_CHEAP], self.against.get(SHUFFLED)
        if num < MIN_CONDITIONS:
            few = f"{num} held-out condition{'' if num == 1 else 's'}"
            return "too few conditions to tell", f"too few conditions to tell: {few}, at least {MIN_CONDITIONS} needed."
        if self.trained[AVERAGE].is_excluded:
            return "nothing to gain", (
                "nothing to gain: training at the condition itself is no better than the average of all conditions "
                f"({self.trained[AVERAGE].text(self.kind)})."
            )
        if self.trained[BEST_CHEAP].is_won and self.headroom.is_excluded and not cheap.is_lower:
            return "nothing to gain", (
                f"nothing to gain: the span of the runs holds no more than {self._named(BEST_CHEAP)}: the conditions' "
                f"own weights projected on it, minus that row, {self.headroom.text(self.kind)}. Training there "
                f"{self._costing}gives more: {self.trained[BEST_CHEAP].text(self.kind)}."
            )
        if shuffled is not None and shuffled.is_excluded:
            return "conditions explain nothing", (
                "conditions explain nothing: members generated for another condition do as well (generated minus "
                f"shuffled: {shuffled.text(self.kind)})."
            )
        rivals = [one for name, one in self.against.items() if spec_of(name).role in ("cheap", "other")]
        rivals = [one for one in rivals if one.name != BEST_CHEAP]
        if all(one.is_won for one in rivals):
            hardest = min(rivals, key=lambda one: one.margin)
            return "worth it", (
                f"worth it: at {num} conditions that were never fitted, generated members are better than every other "
                f"row, {self._named(hardest.name)} among them ({hardest.text(self.kind)}). {self._recovered}"
                f"{self._beside_training}{self._tuned}"
            )
        closest = min(
            [cheap, *(one for one in rivals if spec_of(one.name).role == "other")], key=lambda one: one.margin
        )
        if not cheap.is_won and self.trained[GENERATED].is_won and self.trained[BEST_CHEAP].is_won:
            costs = "" if self.train_seconds is None else f"it costs about {self.train_seconds:.3g} s and "
            return "train there", (
                f"train there: {costs or 'it '}gives more than generated members, "
                f"{self.trained[GENERATED].text(self.kind)}; {self._beside(closest)}. {self._recovered}"
            ).rstrip()
        if closest.is_excluded:
            is_cheap = closest.name == BEST_CHEAP
            outcome: Outcome = "interpolation is enough" if is_cheap else "another row is enough"
            return outcome, f"{outcome}: {self._beside(closest)}. {self._recovered}{self._tuned}".rstrip()
        return "not told apart", (
            f"not told apart from {self._named(closest.name)}: {self._found(closest)}. {self._recovered}"
            f"{self._beside_training}{self._tuned}"
        )

    def _named(self, row: str) -> str:
        return spec_of(self.best if row == BEST_CHEAP else row).text

    def _found(self, one: Difference) -> str:
        return f"generated minus it, {one.text(self.kind)} over {one.num_conditions} conditions"

    def _beside(self, rival: Difference) -> str:
        is_how = (
            "is better"
            if rival.is_lost
            else "is as good but for less than would count"
            if rival.is_excluded and rival.is_lower
            else "is at least as good"
            if rival.is_excluded
            else "is worse"
            if rival.is_won
            else "is not told apart from them"
        )
        return f"{self._named(rival.name)} {is_how} ({self._found(rival)})"

    @property
    def _recovered(self) -> str:
        if not self.trained[AVERAGE].is_won:
            return ""  # a share of what may not be there
        generated, cheap = (self.recovery[name] for name in (GENERATED, BEST_CHEAP))
        return (
            f"Of what training there gains on the average of all ({self.kind.loss.text}), generated members recover "
            f"{100 * generated.loss:.0f} ± {100 * generated.loss_error:.0f} %, the best cheap row "
            f"{100 * cheap.loss:.0f} ± {100 * cheap.loss_error:.0f} %. "
        )

    @property
    def _beside_training(self) -> str:
        there = self.trained[GENERATED]
        gives = "gives more" if there.is_won else "gives no more" if there.is_excluded else "is not told apart"
        return f"Training there {self._costing}{gives}: {there.text(self.kind)}."

    @property
    def _tuned(self) -> str:
        """A few steps there, from what costs nothing, that generated members do not beat."""
        tuned = [one for name, one in self.against.items() if spec_of(name).role == "tuned" and one.is_excluded]
        tuned = [one for one in tuned if not one.name.startswith(GENERATED)]
        if not tuned:
            return ""
        best = max(tuned, key=lambda one: one.loss)
        return f" With labels there, {self._beside(best)}."

    @property
    def _costing(self) -> str:
        return "" if self.train_seconds is None else f"costs about {self.train_seconds:.3g} s and "
