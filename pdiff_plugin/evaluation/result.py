"""What an evaluation found: figures, table, JSON, and the files a report is made from.

DIR/evaluation.json           the document of :meth:`Evaluation.to_json`
DIR/evaluation.safetensors    what plots need: one tensor per set and kind, as in ``accuracy/generated``
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pdiff_plugin.errors import EvaluationNotFoundError
from pdiff_plugin.evaluation.choice import SHOWN_BUDGETS, By, Choice, best
from pdiff_plugin.evaluation.kind import Metric, TaskKind
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.verdict import Comparison, Verdict
from pdiff_plugin.snapshots.files import is_number, json_safe, read_json, reading, remove_strays, write_json
from pdiff_plugin.snapshots.tensor_files import load_tensors, save_tensors

FORMAT = "pdiff-evaluation"
FORMAT_VERSION = 1
JSON_NAME = "evaluation.json"
# What is shown of the details by more than its text.
_DETAILS: dict[str, type[Any]] = {
    **dict.fromkeys(("num_items", "num_snapshots", "num_values", "num_draws"), int),
    **dict.fromkeys(("trajectories", "parameters"), list),
    **dict.fromkeys(("generator", "provenance"), dict),
}
ARRAYS_NAME = "evaluation.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """Figures of every set, the verdict, and what they cost.

    Attributes:
        sets: set name -> figures, as in :meth:`to_json`.
        verdict: outcome, sentence and deciding numbers.
        comparisons: generated against each baseline, paired item by item.
        seconds: stage -> seconds.
        cost: set name -> ``forward_passes`` and ``seconds`` of its members on the evaluation data.
        details: what else a report tells: task, seed, counts, configuration, provenance.
        arrays: what a report draws, by kind and set.
        choices: the best model or ensemble by rising price in forward passes, see :meth:`best`.
    """

    sets: dict[str, dict[str, Any]]
    verdict: Verdict
    comparisons: list[Comparison]
    seconds: dict[str, float]
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict, repr=False)
    choices: list[Choice] = field(default_factory=list)

    def best(self, num_passes: float = 1, by: By = "loss") -> Choice:
        """The best single model, or the best ensemble where that is better, for a number of forward passes.

        It was chosen on one half of the items, by the lowest loss or by the highest score, among all sets and all their
        members; its figures are of the other half. A result of :func:`pdiff_plugin.evaluate` can give and save its
        weights; one that was loaded tells what was chosen.

        Raises:
            ConfigError: less than one pass, or neither loss nor score; or an old evaluation, or one of very few items,
                which names no choice.
        """
        return best(self.choices, num_passes, by)

    def shown_choices(self, *budgets: float) -> list[tuple[float, Choice]]:
        """The choices for one pass, for eight and for further numbers of passes; by score, where that is another."""
        found = []
        for budget in sorted({*SHOWN_BUDGETS, *budgets}) if self.choices else []:
            by_loss, by_score = self.best(budget), self.best(budget, "score")
            found.append((budget, by_loss))
            if (by_score.set, by_score.members) != (by_loss.set, by_loss.members):
                found.append((budget, by_score))
        return found

    def to_json(self) -> dict[str, Any]:
        """One JSON document; what is undefined (the overlap within a set of one) is null."""
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sets": self.sets,
            "verdict": self.verdict.sentence,
            "seconds": self.seconds,
            "verdict_outcome": self.verdict.outcome,
            "verdict_numbers": self.verdict.numbers,
            "comparisons": [c.to_json(self.kind) for c in self.comparisons],
            "cost": self.cost,
            "details": self.details,
            "choices": [choice.to_json() for choice in self.choices],
        }
        cleaned: dict[str, Any] = json_safe(document)
        return cleaned

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write both files into ``folder``, which is made if missing, and return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_strays(folder)
        save_tensors(folder / ARRAYS_NAME, self.arrays, FORMAT, FORMAT_VERSION)
        write_json(folder / JSON_NAME, self.to_json())
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote; the path of the JSON file does as well. Without arrays, there are none.

        Raises:
            EvaluationNotFoundError: nothing there.
            FormatError: not an evaluation.
            FormatVersionError: written by a newer release.
        """
        path = Path(folder)
        if path.is_dir():
            path = path / JSON_NAME
        if not path.is_file():
            raise EvaluationNotFoundError(str(folder))
        arrays = path.with_name(ARRAYS_NAME)
        loaded = cls.from_json(read_json(path, FORMAT, FORMAT_VERSION), str(path))
        return replace(loaded, arrays=load_tensors(arrays, FORMAT, FORMAT_VERSION)[0] if arrays.is_file() else {})

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = JSON_NAME) -> Evaluation:
        """What :meth:`to_json` gave, without arrays. An outcome that this release does not know is one all the same.

        Raises:
            FormatError: it is something else.
        """
        with reading(where, f"a {FORMAT} document"):
            details = _details(document["details"])
            kind = _kind_of(details)
            found = cls(
                sets={name: _figures(found) for name, found in document["sets"].items()},
                verdict=Verdict.from_json(document),
                comparisons=[Comparison.from_json(one, kind) for one in document["comparisons"]],
                seconds=_figures(document["seconds"]),
                cost={name: _figures(found) for name, found in document["cost"].items()},
                details=details,
                choices=[Choice.from_json(choice) for choice in document.get("choices", [])],
            )
            found.table_text()  # figures of other types than the metrics have are told here
        return found

    @property
    def kind(self) -> TaskKind:
        """How answers were scored."""
        return _kind_of(self.details)

    @property
    def sentence(self) -> str:
        """The verdict."""
        return self.verdict.sentence

    @property
    def title(self) -> str:
        """Of the table."""
        quick = ", quick: few members, wider errors" if self.details.get("quick") else ""
        return f"{self.details.get('task', 'task')}: {self.details.get('num_items', 0)} items{quick}"

    @property
    def footnote(self) -> str:
        """What the table does not explain by itself."""
        return self.kind.footnote

    @property
    def lead(self) -> tuple[str, ...]:
        """Heads of the columns to look at first."""
        kind = self.kind
        return tuple(kind.metric(key).title for key in (kind.mean_score, kind.ensemble_loss, kind.within))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and one row of text per set."""
        names, kind = list(self.sets), self.kind
        headers = ["set", *(metric.title for metric in kind.columns), "passes"]
        rows = [[name, *_cells(self.sets[name], kind.columns), self._passes(name)] for name in names]
        first = self.sets[names[0]] if names else {}
        for key in sorted(first, key=lambda key: key.startswith("ood_auroc/")):  # shifted data come first
            which, _, data = key.partition("/")
            if which == "shifted":
                told = [kind.metric(kind.ensemble_score), kind.metric(kind.ensemble_loss)]
                headers += [f"{data}: {quantity.title}" for quantity in (kind.score, kind.loss)]
                for row, name in zip(rows, names, strict=True):
                    row += _cells(self.sets[name].get(key, {}), told)
            elif which == "ood_auroc":
                headers.append(f"{data}: AUROC")
                for row, name in zip(rows, names, strict=True):
                    row.append(format_figure(self.sets[name].get(key), ".3f"))
        return headers, rows

    def told_choices(self, *budgets: float) -> list[str]:
        """A sentence on each of :meth:`shown_choices`."""
        told: list[str] = []
        seen: list[Choice] = []
        for budget, choice in self.shown_choices(*budgets):
            told.append(f"{choice.title(budget)}: the same." if choice in seen else choice.sentence(budget))
            seen.append(choice)
        return told

    def table_text(self) -> str:
        """The table, the verdict and the choices as plain text."""
        title = self.title if self.details.get("quick") else ""
        parts = [title, text_table(*self.table()), self.footnote, self.verdict.sentence, "\n".join(self.told_choices())]
        return "\n\n".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.table_text()

    def _passes(self, name: str) -> str:
        return format_figure(self.cost.get(name, {}).get("forward_passes"), ".2f")


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of plain text, the first one flush left."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def format_figure(value: Any, kind: str) -> str:
    """A figure as text: ``%`` for percent, else a format; a dash where it is undefined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{100 * value:.2f}" if kind == "%" else format(value, kind)


def _cells(figures: Mapping[str, Any], told: Sequence[Metric]) -> list[str]:
    # A figure may be younger than what was saved.
    return [format_figure(figures.get(metric.key), metric.format) for metric in told]


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by name, one level deep on other data, as they stand in a file."""
    for name, value in found.items():
        if name.startswith("shifted/"):
            _figures(value)
        elif not (value is None or (is_number(value) and not math.isinf(value))):
            raise ValueError(f"{name} that is no number")
    return dict(found)


def _details(found: Mapping[str, Any]) -> dict[str, Any]:
    for name, kind in _DETAILS.items():
        if not isinstance(found.get(name, kind()), kind) or (kind is int and not is_number(found.get(name, 0))):
            raise ValueError(f"{name} that is no {kind.__name__}")
    if not isinstance(found.get("changed_since_fit"), str | None):
        raise ValueError("changed_since_fit that is no text")
    for name in ("report", "config", "provenance"):
        if not isinstance(found.get("generator", {}).get(name, {}), dict):
            raise ValueError(f"{name} of the generator that is no dict")
    return dict(found)


def _kind_of(details: Mapping[str, Any]) -> TaskKind:
    # The first evaluations were of classifications, and did not say so.
    return KINDS[details.get("kind", "classification")]
