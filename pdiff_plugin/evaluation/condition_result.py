"""What an evaluation over conditions found: figures of every row at every condition, sentences, table, JSON.

DIR/conditions.json    the document of :meth:`ConditionEvaluation.to_json`
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pdiff_plugin.errors import ConfigError, EvaluationNotFoundError
from pdiff_plugin.evaluation.condition_findings import ConditionFindings, JudgedCondition, verdicts_of
from pdiff_plugin.evaluation.condition_pictures import save_picture
from pdiff_plugin.evaluation.condition_rows import GENERATED, spec_of
from pdiff_plugin.evaluation.condition_verdict import BEST_CHEAP, ConditionVerdict
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.metrics import standard_error
from pdiff_plugin.evaluation.result import text_table
from pdiff_plugin.snapshots.conditions import parse_condition
from pdiff_plugin.snapshots.files import is_number, json_safe, read_json, reading, write_json

FORMAT = "pdiff-conditions"
FORMAT_VERSION = 1
JSON_NAME = "conditions.json"


class ConditionEvaluation(ConditionFindings):
    """What :func:`pdiff_plugin.evaluate_conditions` found, to read, to show and to keep."""

    @classmethod
    def pooled(cls, evaluations: Sequence[ConditionEvaluation]) -> ConditionEvaluation:
        """Evaluations of one task from several starts (seeds), judged together: each condition of each counts as one.

        Raises:
            ConfigError: none, or of several kinds of task.
        """
        kinds = sorted({one.kind_name for one in evaluations})
        if len(kinds) != 1:
            raise ConfigError("evaluations", ", ".join(kinds) or "none", "must be one or more of one kind of task")
        first = evaluations[0]
        places = [place for one in evaluations for place in one.places]
        costs = [cost for one in evaluations if (cost := one.details.get("train_seconds")) is not None]
        cost = statistics.fmean(costs) if costs else None
        return cls(
            task=first.task,
            kind_name=first.kind_name,
            places=places,
            verdicts=verdicts_of(first.kind, places, cost),
            fitted=[condition for one in evaluations for condition in one.fitted],
            notes=list(dict.fromkeys(note for one in evaluations for note in one.notes)),
            details={"train_seconds": cost, "pooled": [one.details for one in evaluations]},
        )

    @property
    def sentence(self) -> str:
        """What holds, inside what was fitted and outside."""
        return " ".join(verdict.sentence for verdict in self.verdicts.values())

    @property
    def title(self) -> str:
        """Of the table."""
        return f"{self.task}: {len(self.places)} conditions that were not fitted, {len(self.fitted)} fitted"

    def table(self, group: str | None = None) -> tuple[list[str], list[list[str]]]:
        """Headers and one row of text per row: means over conditions ± standard error.

        Args:
            group: ``inside`` or ``outside`` the fitted range; the first of these that there is unless given.
        """
        group = group or next(iter(self.verdicts))
        mine, verdict, kind = [p for p in self.places if p.group == group], self.verdicts[group], self.kind
        loss, score = kind.loss, kind.score
        headers = [
            "row",
            f"{score.title} mean",
            f"ens {score.title}",
            f"ens {loss.title}",
            f"gen. minus: {score.title}",
            f"gen. minus: {loss.title}",
            "better at",
            "sign p",
            "s each",
        ]
        against = {one.name: one for one in verdict.differences}
        rows = []
        for name in [*self.row_names, BEST_CHEAP]:
            found = [place.rows[name] for place in mine if name in place.rows]
            if name == BEST_CHEAP:
                found = [place.rows[chosen] for place, chosen in zip(mine, verdict.cheap_by_condition, strict=True)]
            if not found:
                continue
            one = against.get(name)
            percent = 100 if score.format == "%" else 1
            form = ".2f" if score.format == "%" else score.format
            rows.append(
                [
                    name,
                    _mean_text([percent * row.member_score for row in found], form, with_error=False),
                    _mean_text([percent * row.score for row in found], form),
                    _mean_text([row.loss for row in found], loss.format),
                    "" if one is None else _pair(percent * one.score, percent * one.score_error, form),
                    "" if one is None else _pair(one.loss, one.loss_error, loss.format),
                    "" if one is None else f"{one.num_better}/{one.num_conditions}",
                    "" if one is None else f"{one.sign_p:.2g}",
                    "-" if spec_of(name).role in ("trained", "ceiling") else _seconds([row.seconds for row in found]),
                ]
            )
        return headers, rows

    @property
    def footnote(self) -> str:
        """What the table does not explain by itself."""
        return (
            f"Means over conditions ± standard error; generated minus a row is paired by condition, better at: of how "
            f"many its {self.kind.loss.text} is lower. {BEST_CHEAP}: the cheap row that is best at all other "
            "conditions. s each: seconds to make the weights for one condition."
        )

    def recovery_text(self, group: str) -> str:
        """The headline: which share of what training there gains is recovered, by loss and by score."""
        verdict, kind = self.verdicts[group], self.kind
        parts = []
        for name in (GENERATED, BEST_CHEAP):
            found = verdict.recovery[name]
            parts.append(
                f"{name} {_share(found.loss, found.loss_error)} of the {kind.loss.text}, "
                f"{_share(found.score, found.score_error)} of the {kind.score.text}"
            )
        text = f"Recovery of what training there gains on the average of all: {'; '.join(parts)}."
        text += f" Headroom, span ceiling minus best cheap: {verdict.headroom.text(kind)}."
        spreads = [place.seed_spread for place in self.places if place.group == group and place.seed_spread]
        if spreads:
            noise = [math.sqrt(sum(one[i] ** 2 for one in spreads) / len(spreads)) for i in (0, 1)]
            text += (
                f" Runs of one condition differ by {kind.loss.value(noise[0])} {kind.loss.text} and "
                f"{kind.score.value(noise[1])} {kind.score.text} (standard deviation, {len(spreads)} conditions)."
            )
        return text

    def table_text(self) -> str:
        """Tables, headline, sentences and notes as plain text."""
        parts = []
        for group in self.verdicts:
            num = sum(place.group == group for place in self.places)
            parts += [
                f"{num} conditions {group} what was fitted",
                text_table(*self.table(group)),
                self.recovery_text(group),
            ]
        return "\n\n".join([*parts, self.footnote, *self.notes, self.sentence])

    def __str__(self) -> str:
        return self.table_text()

    def to_json(self) -> dict[str, Any]:
        """One JSON document; what is undefined is null."""
        found: dict[str, Any] = json_safe(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "task": self.task,
                "kind": self.kind_name,
                "sentence": self.sentence,
                "verdicts": {group: verdict.to_json() for group, verdict in self.verdicts.items()},
                "conditions": [asdict(place) for place in self.places],
                "fitted": self.fitted,
                "notes": self.notes,
                "details": self.details,
            }
        )
        return found

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = JSON_NAME) -> ConditionEvaluation:
        """What :meth:`to_json` gave.

        Raises:
            FormatError: it is something else.
        """
        with reading(where, f"a {FORMAT} document"):
            kind = document["kind"]
            if kind not in KINDS:
                raise ValueError(f"a task of kind {kind!r}")
            places = [JudgedCondition.from_json(place) for place in document["conditions"]]
            verdicts = {group: ConditionVerdict.from_json(one) for group, one in document["verdicts"].items()}
            if set(verdicts) != {place.group for place in places}:
                raise ValueError("verdicts on other conditions than those that are there")
            for group, verdict in verdicts.items():
                mine = [place for place in places if place.group == group]
                if len(verdict.cheap_by_condition) != len(mine):
                    raise ValueError("a verdict on another number of conditions")
                if not all(row in place.rows for row, place in zip(verdict.cheap_by_condition, mine, strict=True)):
                    raise ValueError("a best cheap row that is none")
            fitted = [parse_condition(condition, "a fitted condition") for condition in document["fitted"]]
            notes, details = [str(note) for note in document["notes"]], _details(document["details"])
            found = cls(str(document["task"]), kind, places, verdicts, fitted, notes, details)
            found.table_text()  # figures of other types than the metrics have are told here
        return found

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``conditions.json`` and return its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / JSON_NAME, self.to_json())
        return folder / JSON_NAME

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> ConditionEvaluation:
        """Read what :meth:`save` wrote, from the folder or the file.

        Raises:
            EvaluationNotFoundError: there is none.
            FormatError: the file is something else.
            FormatVersionError: written by a newer release.
        """
        path = Path(source)
        path = path / JSON_NAME if path.is_dir() else path
        if not path.is_file():
            raise EvaluationNotFoundError(str(source), JSON_NAME)
        return cls.from_json(read_json(path, FORMAT, FORMAT_VERSION), str(path))

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the score against the condition, all rows, as PNG.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        save_picture(self, Path(path))


def _details(found: Mapping[str, Any]) -> dict[str, Any]:
    groups = ("settings", "seconds", "seconds_once", "provenance", "generator")
    if not all(isinstance(found.get(name, {}), dict) for name in groups):
        raise ValueError(f"one of {', '.join(groups)} that is no object")
    if not all(isinstance(found.get("generator", {}).get(name, {}), dict) for name in ("report", "provenance")):
        raise ValueError("a report or a provenance of the generator that is no object")
    if not is_number(found.get("num_values", 0)):
        raise ValueError("num_values that is no number")
    return dict(found)


def _mean_text(values: list[float], form: str, *, with_error: bool = True) -> str:
    tensor = torch.tensor(values, dtype=torch.float64)
    text = format(float(tensor.mean()), form)
    return f"{text} ± {standard_error(tensor):{form}}" if with_error and len(values) > 1 else text


def _pair(value: float, error: float, form: str) -> str:
    return format(value, f"+{form}") + ("" if math.isnan(error) else f" ± {error:{form}}")


def _share(value: float, error: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.0f} %" if math.isnan(error) else f"{100 * value:.0f} ± {100 * error:.0f} %"


def _seconds(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return "0" if mean == 0 else f"{mean:.3f}" if mean < 10 else f"{mean:.0f}"
