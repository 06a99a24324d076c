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
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from pdiff_plugin.progress import OnProgress, Progress

_PLAIN_LINE_EVERY_S = 10.0

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "", numeric: bool = True
) -> None:
    """Print a table on stdout: the first column to the left, the others, if ``numeric``, to the right."""
    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, header in enumerate(headers):
        grid.add_column(header, justify="right" if numeric and number else "left", no_wrap=number == 0)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    if not out.is_terminal:
        # In a file or a pipe there is no width to fit: print every column whole.
        Console(file=out.file, width=max(out.width, 200), highlight=False).print(grid)
    else:
        out.print(grid)
    if note:
        say(note)


def say(text: str) -> None:
    """Print a line of a result on stdout, as it is."""
    out.print(text, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Print a line about what is going on, on stderr."""
    err.print(text, markup=False, soft_wrap=True)


def error(exception: BaseException) -> None:
    """Print an error on stderr: one panel that says what was found, what was expected and the next move."""
    err.print(Panel(Text(str(exception)), title=type(exception).__name__, title_align="left", border_style="red"))


def log_to_stderr() -> None:
    """Show the package's warnings on stderr, above the bars of progress."""
    logger = logging.getLogger("pdiff_plugin")
    if logger.handlers:
        return
    handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)


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
    return "  ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
