"""The report of an evaluation over conditions: one HTML file that needs nothing else, and its pictures.

DIR/conditions.html
DIR/report-figures/NAME.png
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdiff_plugin.evaluation.condition_pictures import condition_pictures
from pdiff_plugin.evaluation.condition_result import ConditionEvaluation
from pdiff_plugin.evaluation.condition_rows import spec_of
from pdiff_plugin.evaluation.condition_verdict import Outcome
from pdiff_plugin.evaluation.page import Table, flattened, render_page, write_page

HTML_NAME = "conditions.html"
_COLOURS: dict[Outcome, str] = {
    "worth it": "#009E73",
    "interpolation is enough": "#E69F00",
    "another row is enough": "#E69F00",
    "train there": "#E69F00",
    "nothing to gain": "#D55E00",
    "conditions explain nothing": "#D55E00",
    "not told apart": "#777777",
    "too few conditions to tell": "#777777",
}


def write_condition_report(evaluation: ConditionEvaluation, folder: str | os.PathLike[str]) -> Path:
    """Write ``conditions.html`` and its pictures, and return the path of the HTML file.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    drawn = condition_pictures(evaluation)
    groups = list(evaluation.verdicts)
    first = evaluation.verdicts[groups[0]]
    html = render_page(
        title=f"pdiff report over conditions: {evaluation.task}",
        facts=" ".join([f"{evaluation.title}, {evaluation.details.get('num_values', 0):,} values.", *evaluation.notes]),
        outcome=first.outcome,
        verdict=evaluation.sentence,
        colour=_COLOURS.get(first.outcome, "#777777"),
        tables=[_table(evaluation, group) for group in groups],
        drawn=drawn,
        groups=[(heading, list(flattened(entries))) for heading, entries in _entries(evaluation) if entries],
    )
    return write_page(Path(folder), HTML_NAME, html, drawn)


def _table(evaluation: ConditionEvaluation, group: str) -> Table:
    headers, rows = evaluation.table(group)
    num = evaluation.verdicts[group].num_conditions
    return Table(
        f"{num} condition{'' if num == 1 else 's'} {group} what was fitted",
        headers,
        rows,
        f"{evaluation.recovery_text(group)} {evaluation.footnote}",
        [spec_of(row[0]).look.colour for row in rows],
    )


def _entries(evaluation: ConditionEvaluation) -> Iterator[tuple[str, dict[str, Any]]]:
    details = evaluation.details
    own = ("settings", "seconds", "seconds_once", "provenance", "generator")
    yield "Evaluation", {key: value for key, value in details.items() if key not in own}
    yield "Rows", {name: spec_of(name).text for name in evaluation.row_names}
    yield "Settings of the rows", details.get("settings", {})
    yield "Seconds", details.get("seconds", {})
    yield "Seconds for all conditions together", details.get("seconds_once", {})
    yield "Provenance", details.get("provenance", {})
    generator = details.get("generator", {})
    yield "Generator: what the fit measured", generator.get("report", {})
    yield "Generator: provenance", generator.get("provenance", {})
