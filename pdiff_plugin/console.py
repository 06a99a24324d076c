"""What a person sees: tables, progress and error panels. The only module that imports rich.

Results go to stdout; progress, logs and errors go to stderr, so that ``pdiff inspect STORE --json | jq`` works.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from pdiff_plugin.errors import visible
from pdiff_plugin.progress import OnProgress, Progress

_PLAIN_LINE_EVERY_S = 10.0
_NO_LIMIT = 1_000_000  # characters in a line

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    note: str = "",
    numeric: bool = True,
    keys: int = 1,
    lead: Sequence[str] = (),
) -> None:
    """Print a table on stdout, whole: where a terminal is too narrow, as several blocks of columns.

    Args:
        title: printed once, above.
        headers: one per column.
        rows: cells as text.
        note: printed below.
        numeric: columns after the first hold figures, set to the right. Otherwise they hold text, which is wrapped.
        keys: number of first columns that tell the rows apart; every block repeats them.
        lead: headers of the columns that matter most, which come first where there are several blocks.
    """

    def grid(columns: Sequence[int]) -> Table:
        made = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        for number in columns:
            made.add_column(headers[number], justify="right" if numeric and number else "left", overflow="fold")
        for row in rows:
            made.add_row(*(Text(visible(row[number])) for number in columns))
        return made

    def width_of(columns: Sequence[int]) -> int:
        return Measurement.get(out, out.options.update(max_width=_NO_LIMIT), grid(columns)).maximum

    # In a file or a pipe there is no width to fit.
    limit = out.width if out.is_terminal else _NO_LIMIT
    blocks = [list(range(len(headers)))]
    if numeric and width_of(blocks[0]) > limit:
        shared = blocks[0][:keys]
        blocks = [shared]
        for number in sorted(range(keys, len(headers)), key=lambda number: headers[number] not in lead):
            if blocks[-1] != shared and width_of([*blocks[-1], number]) > limit:
                blocks.append(shared)
            blocks[-1] = [*blocks[-1], number]
    for block in blocks:
        part = grid(block)
        part.title = Text(visible(title)) if block is blocks[0] else None
        # One column too wide for the terminal is left to the terminal to wrap: a figure cut short is a wrong figure.
        part.width = width_of(block) if numeric else min(width_of(block), limit)
        out.print(part, crop=False)
    if note:
        say(note)


def say(text: str) -> None:
    """Print a line of a result on stdout, as it is."""
    out.print(visible(text), markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Print a line about what is going on, on stderr."""
    err.print(visible(text), markup=False, soft_wrap=True)


def error(exception: BaseException) -> None:
    """Print an error on stderr: one panel that says what was found, what was expected and the next move."""
    err.print(
        Panel(Text(visible(str(exception))), title=type(exception).__name__, title_align="left", border_style="red")
    )


def log_to_stderr() -> None:
    """Show the package's warnings on stderr, above the bars of progress."""
    logger = logging.getLogger("pdiff_plugin")
    if logger.handlers:
        return
    handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.setFormatter(_VisibleMessage("%(message)s"))
    logger.addHandler(handler)


class _VisibleMessage(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Show reports of long work on stderr: bars in a terminal, else a plain line per stage and every ten seconds."""
    if not err.is_terminal:
        yield _plain_lines()
        return
    bars = ProgressBar(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=err,
    )
    ids: dict[str, TaskID] = {}

    def show(report: Progress) -> None:
        if report.stage not in ids:
            ids[report.stage] = bars.add_task(report.stage, total=report.total_steps, metrics="")
        bars.update(ids[report.stage], completed=report.step, total=report.total_steps, metrics=_metrics_text(report))

    with bars:
        yield show


def _plain_lines() -> Callable[[Progress], None]:
    stage, told = "", 0.0

    def show(report: Progress) -> None:
        nonlocal stage, told
        now = time.monotonic()
        if report.stage == stage and now - told < _PLAIN_LINE_EVERY_S and report.step < report.total_steps:
            return
        stage, told = report.stage, now
        tell(f"{report.stage}: {report.step}/{report.total_steps} {_metrics_text(report)}".rstrip())

    return show


def _metrics_text(report: Progress) -> str:
    metrics = (f"{name} {value:.4g}" for name, value in report.metrics.items())
    return "  ".join([*filter(None, [visible(report.text)]), *metrics])
