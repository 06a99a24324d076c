"""The report: one HTML file that needs nothing else, and its pictures as PNG files.

DIR/report.html
DIR/report-figures/NAME.png
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff_plugin.errors import MissingDependencyError, visible
from pdiff_plugin.evaluation.baselines import LOOKS, look_of
from pdiff_plugin.evaluation.charts import Chart, charts, paint
from pdiff_plugin.evaluation.choice import Choice, passes_text
from pdiff_plugin.evaluation.kind import Metric
from pdiff_plugin.evaluation.plots import Picture, pictures, style
from pdiff_plugin.evaluation.result import ARRAYS_NAME, Evaluation
from pdiff_plugin.snapshots.files import reading, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HTML_NAME = "report.html"
FIGURES_DIR = "report-figures"
_PNG_DPI = 200
_PLAIN = "#777777"
_COLOURS = {
    "worth it": "#009E73",
    "no better than averaging": "#E69F00",
    "copies the snapshots": "#D55E00",
    "snapshots hardly differ": "#CC79A7",
    "too few data to tell": "#777777",
    "nothing generated": "#777777",
}
# Colours on a dark screen, where those of the pictures would be hard to see; #ffffff is the paper, #000000 the ink.
_DARK = {
    "#ffffff": "#15181c",
    "#000000": "#e8e6e3",
    "#dddddd": "#33383f",
    "#444444": "#b3b8bf",
    "#777777": "#9aa0a8",
    "#0072B2": "#4ba3e3",
    "#009E73": "#2fc79a",
    "#D55E00": "#ff8a3d",
    "#7F6000": "#c9a53a",
}


def write_report(source: Evaluation | str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write ``report.html`` and its pictures, and return the path of the HTML file.

    Args:
        source: an evaluation, or the folder it was saved in; no model and no data are needed.
        out: folder to write to; that of the source unless given, the working directory for an evaluation in memory.

    Raises:
        EvaluationNotFoundError: the folder holds no evaluation.
        FormatError: its files cannot be read, or drawn.
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    if isinstance(source, Evaluation):
        drawn = pictures(source)
        return write_page(Path(out or "."), HTML_NAME, render_html(source, drawn), drawn)
    evaluation, folder = Evaluation.load(source), _folder_of(Path(source))
    with reading(str(folder / ARRAYS_NAME), "arrays of the sets in evaluation.json"):
        drawn = pictures(evaluation)
        html = render_html(evaluation, drawn)
    return write_page(folder if out is None else Path(out), HTML_NAME, html, drawn)


def write_page(folder: Path, name: str, html: str, drawn: Sequence[Picture]) -> Path:
    """Write a page and its pictures as PNG files; the path of the page."""
    (folder / FIGURES_DIR).mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        write_figure(picture.figure, folder / FIGURES_DIR / f"{picture.name}.png")
    with replacing(folder / name) as temp:
        temp.write_text(html, encoding="utf-8")
    return folder / name


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as temp, style():
        figure.savefig(temp, format="png", dpi=_PNG_DPI, metadata={"Software": None})


def render_html(evaluation: Evaluation, drawn: list[Picture] | None = None) -> str:
    """The report as text; ``drawn`` saves drawing the pictures again.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    headers, rows = evaluation.table()
    return render_page(
        title=f"pdiff report: {evaluation.details.get('task', 'task')}",
        facts=_facts(evaluation.details),
        outcome=evaluation.verdict.outcome,
        verdict=evaluation.verdict.sentence,
        colour=_COLOURS.get(evaluation.verdict.outcome, _PLAIN),
        tables=[Table("Sets", headers, rows, evaluation.footnote, [look_of(row[0]).colour for row in rows])],
        drawn=pictures(evaluation) if drawn is None else drawn,
        groups=_groups(evaluation),
        choices=_choices(evaluation),
        charts=charts(evaluation),
    )


@dataclass(frozen=True)
class Table:
    """A table of a page, with the colour of each row's mark."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    footnote: str
    colours: Sequence[str]


def render_page(
    *,
    colour: str,
    tables: Sequence[Table],
    drawn: Sequence[Picture],
    choices: Sequence[Mapping[str, Any]] = (),
    charts: Sequence[Chart] = (),
    **words: Any,
) -> str:
    """One self-contained page.

    Args:
        colour: of the mark beside the verdict.
        tables: in their order.
        drawn: pictures, below the tables.
        choices: boxes above the tables.
        charts: pictures above the tables.
        **words: ``title``, ``facts``, ``outcome``, ``verdict`` and ``groups`` of the page.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe  # comes with jinja2
    except ImportError as error:
        raise MissingDependencyError("jinja2", "report") from error
    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    marks = {mark for table in tables for mark in table.colours}
    colours = {"#ffffff", "#dddddd", "#444444", "#777777", *(look.colour for look in LOOKS.values()), *_DARK, *marks}
    html: str = template.render(
        **words,
        colour=paint(colour),
        light={paint(one)[4:-1]: one for one in sorted(colours)},
        dark={paint(one)[4:-1]: dark for one, dark in _DARK.items()},
        choices=choices,
        charts=[{**vars(chart), "svg": markupsafe.Markup(chart.svg)} for chart in charts],
        tables=[{**vars(table), "chips": [paint(mark) for mark in table.colours]} for table in tables],
        figures=[
            {
                "name": picture.name,
                "title": picture.title,
                "caption": picture.caption,
                "svg": markupsafe.Markup(svg_text(picture.figure, picture.name, picture.title)),
            }
            for picture in drawn
        ],
    )
    return visible(html)


def svg_text(figure: Figure, name: str, title: str) -> str:
    """A figure as an ``<svg>`` element that can stand beside others in one page.

    Ids are unique to the figure: two figures would else share clip paths and glyphs of the same name.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style():
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour in sorted({"#dddddd", *(look.colour for look in LOOKS.values()), *_DARK}):
        text = re.sub(rf"((?:fill|stroke): ){colour}\b", rf"\g<1>{paint(colour)}", text, flags=re.IGNORECASE)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _choices(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The best for one pass and for eight, as the boxes at the top of the page show them."""
    titles: dict[tuple[str, tuple[int, ...], str], tuple[Choice, list[str]]] = {}
    for budget, choice in evaluation.shown_choices():
        key = choice.set, choice.members, choice.by
        titles.setdefault(key, (choice, []))[1].append(choice.title(budget))
    loss, score = evaluation.kind.loss, evaluation.kind.score
    return [
        {
            "title": f"Best {'; '.join(name.removeprefix('Best ') for name in names)}",
            "text": choice.text,
            "price": passes_text(round(choice.num_passes, 1)),
            "heads": ["", loss.text, score.text],
            "rows": [
                ["this choice", loss.value(choice.loss), score.value(choice.score)],
                *(
                    [
                        text,
                        f"{loss.value(other.loss)} ({loss.difference(other.loss_difference, other.loss_error)})",
                        f"{score.value(other.score)} ({score.difference(other.score_difference, other.score_error)})",
                    ]
                    for text, other in choice.compared
                ),
            ],
        }
        for choice, names in titles.values()
    ]


def _facts(details: Mapping[str, Any]) -> str:
    runs = len(details.get("trajectories", []))
    texts = [
        f"{details.get('num_items', 0):,} items",
        f"{details.get('num_snapshots', 0):,} snapshots of {details.get('num_values', 0):,} values "
        f"from {runs} run{'' if runs == 1 else 's'}",
    ]
    if details.get("num_skipped_snapshots"):
        texts.append(f"{details['num_skipped_snapshots']} skipped for NaN or Inf")
    if details.get("num_duplicate_snapshots"):
        texts.append(f"{details['num_duplicate_snapshots']} repeat another")
    if details.get("changed_since_fit"):
        texts.append(details["changed_since_fit"])
    if details.get("quick"):
        texts.append("quick: few members, wider errors")
    draws = details.get("num_draws", 1)
    texts.append(f"seed {details.get('seed')}" + (f", {draws} draws of each set" if draws > 1 else ""))
    return ", ".join(texts) + "."


def _groups(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, str]]]]:
    details = evaluation.details
    plain = {k: v for k, v in details.items() if k not in ("provenance", "generator")}
    generator = details.get("generator", {})
    groups = {
        "Evaluation": plain,
        "Figures": {_title_of(metric): metric.help for metric in evaluation.kind.metrics},
        "Provenance": details.get("provenance", {}),
        "Deciding numbers": evaluation.verdict.numbers,
        "Seconds": evaluation.seconds,
        "Seconds of the sets' forward passes": {n: c.get("seconds") for n, c in evaluation.cost.items()},
        "Generator: what the fit measured": generator.get("report", {}),
        "Generator: configuration": generator.get("config", {}),
        "Generator: provenance": generator.get("provenance", {}),
    }
    return [(heading, list(flattened(entries))) for heading, entries in groups.items() if entries]


def _title_of(metric: Metric) -> str:
    name = metric.title or metric.key
    return f"{name} ({metric.better} is better)" if metric.better else name


def flattened(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested entries as dotted, readable names and values."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".replace("_", " "), _value_text(value)


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(_value_text(v) for v in value[:12])
        return f"{shown}, … ({len(value)})" if len(value) > 12 else shown or "none"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent
