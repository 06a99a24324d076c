"""What was found at each condition: figures of every row.

Shapes: C conditions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.evaluation.condition_rows import GENERATED, TRAINED
from pdiff_plugin.evaluation.condition_statistics import Series
from pdiff_plugin.evaluation.condition_verdict import ConditionVerdict, judge_conditions
from pdiff_plugin.evaluation.kind import TaskKind
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.snapshots.conditions import Condition, parse_condition
from pdiff_plugin.snapshots.files import number_in

INSIDE, OUTSIDE = "inside", "outside"


@dataclass(frozen=True)
class RowFigures:
    """One row at one condition.

    Attributes:
        loss: of the ensemble.
        score: of the ensemble.
        member_loss: mean over members.
        member_score: mean over members.
        members: M.
        seconds: that it took to make them.
    """

    loss: float
    score: float
    member_loss: float
    member_score: float
    members: int
    seconds: float


@dataclass(frozen=True)
class JudgedCondition:
    """A condition and what was found at it.

    Attributes:
        condition: names and values.
        runs: trajectories that were recorded there.
        outside: a sentence for each value outside what was fitted.
        rows: row -> figures, means over the runs where there are several.
        seed_spread: standard deviation of (loss, score) of what the runs there have, where there are several.
    """

    condition: Condition
    runs: tuple[str, ...]
    outside: tuple[str, ...]
    rows: dict[str, RowFigures]
    seed_spread: tuple[float, float] | None = None

    @property
    def group(self) -> str:
        return OUTSIDE if self.outside else INSIDE

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> JudgedCondition:
        spread = document["seed_spread"]
        rows = {name: RowFigures(**_numbers(row)) for name, row in document["rows"].items()}
        if GENERATED not in rows or TRAINED not in rows:
            raise ValueError("a condition without generated or trained members")
        if not all(isinstance(text, str) for text in (*document["runs"], *document["outside"])):
            raise ValueError("runs or sentences that are no text")
        return cls(
            parse_condition(document["condition"], "a judged condition"),
            tuple(document["runs"]),
            tuple(document["outside"]),
            rows,
            None if spread is None else (number_in(spread[0]), number_in(spread[1])),
        )


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    wrong = set(row) ^ {one.name for one in fields(RowFigures)}
    if wrong:
        raise ValueError(f"a row with or without {sorted(wrong)[0]!r}")
    return {key: int(value) if key == "members" else number_in(value) for key, value in row.items()}


@dataclass(frozen=True)
class ConditionFindings:
    """Rows over conditions that the generator was not fitted on, and what they say.

    Attributes:
        task: name of the task.
        kind_name: of its kind.
        places: what was found at each condition.
        verdicts: ``inside`` and ``outside`` the fitted range, as far as there are such conditions.
        fitted: the conditions that the generator was fitted on.
        notes: sentences on what was left out, or done first.
        details: settings of the rows, seconds spent once, counts, provenance.
    """

    task: str
    kind_name: str
    places: list[JudgedCondition]
    verdicts: dict[str, ConditionVerdict]
    fitted: list[Condition]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> TaskKind:
        """How answers were scored."""
        return KINDS[self.kind_name]

    @property
    def row_names(self) -> list[str]:
        """Every row that was made at some condition, in the order of the table."""
        return list(dict.fromkeys(name for place in self.places for name in place.rows))


def series_of(places: Sequence[JudgedCondition], name: str) -> Series:
    """A row over conditions, NaN where it was not made."""

    def column(key: str) -> Tensor:
        values = [getattr(place.rows[name], key) if name in place.rows else math.nan for place in places]
        return torch.tensor(values, dtype=torch.float64)

    return Series(column("loss"), column("score"))


def verdicts_of(
    kind: TaskKind, places: Sequence[JudgedCondition], train_seconds: float | None
) -> dict[str, ConditionVerdict]:
    """What holds inside and outside the fitted range, as far as there are such conditions."""
    found = {}
    for group, where in ((INSIDE, ""), (OUTSIDE, "Outside what was recorded: ")):
        mine = [place for place in places if place.group == group]
        if mine:
            names = dict.fromkeys(name for place in mine for name in place.rows)
            rows = {name: series_of(mine, name) for name in names}
            found[group] = judge_conditions(kind, rows, train_seconds, where)
    return found
