"""Tables as they look in terminals of several widths."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from pdiff_plugin import console
from pdiff_plugin.progress import Progress

HEADERS = ["set", "members", "acc mean", "± std", "best*", "worst", "ens acc", "ens NLL", "ECE", "IoU"]
HEADERS += ["IoU to snap", "nearest", "passes"]
ROWS = [
    row.split()
    for row in (
        "snapshots 32 92.98 1.04 93.26 89.56 94.05 0.1947 0.0257 0.555 0.739 0.716 20.86",
        "generated 32 93.32 0.80 92.77 91.20 94.15 0.1841 0.0168 0.571 0.785 0.612 20.87",
        "deep-ensemble 5 92.05 0.00 92.06 92.07 92.08 0.2545 0.0213 - 0.742 0.714 5.00",
    )
]


def shown(monkeypatch: pytest.MonkeyPatch, width: int, is_terminal: bool = True, **options: object) -> list[str]:
    """The lines of the table, as a terminal of this width gets them."""
    file = io.StringIO()
    out = Console(file=file, force_terminal=is_terminal, width=width, color_system=None, highlight=False)
    monkeypatch.setattr(console, "out", out)
    console.table("digits", HEADERS, ROWS, **options)  # type: ignore[arg-type]
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [30, 60, 80, 110, 127])
def test_every_figure_is_whole_and_stands_under_its_header(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = shown(monkeypatch, width)
    assert all(len(line) <= width for line in lines)
    found: dict[tuple[str, str], str] = {}
    headers: dict[str, int] = {}
    for line in lines:
        name = line.split()[0] if line.strip() else ""
        if name == "set":
            ends = {h: re.search(rf"  {re.escape(h)}(?=  |$)", line) for h in HEADERS[1:]}
            headers = {h: match.end() for h, match in ends.items() if match}
        for header, end in headers.items():
            if name in {row[0] for row in ROWS}:
                found[name, header] = line[:end].split()[-1]
    assert found == {(row[0], h): cell for row in ROWS for h, cell in zip(HEADERS[1:], row[1:], strict=True)}


def test_a_narrow_terminal_shows_the_deciding_columns_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 80, lead=("acc mean", "ens NLL", "IoU"))
    heads = [" ".join(line.split()) for line in lines if line.split()[:1] == ["set"]]
    assert len(heads) == 2
    assert heads[0].startswith("set acc mean ens NLL IoU members")
    assert lines.count("digits") == 1


def test_columns_that_tell_rows_apart_are_repeated_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 60, keys=2)
    heads = [" ".join(line.split()) for line in lines if line.split()[:1] == ["set"]]
    assert len(heads) > 1
    assert all(head.startswith("set members ") for head in heads)


def test_a_wide_terminal_and_a_pipe_of_any_width_show_one_table_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = shown(monkeypatch, 200, lead=("IoU",))
    assert [" ".join(line.split()) for line in wide if "set" in line] == [" ".join(HEADERS)]
    assert shown(monkeypatch, 80, is_terminal=False, lead=("IoU",)) == wide


def test_long_words_of_a_table_of_text_go_on_in_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=file, force_terminal=True, width=40, color_system=None))
    console.table("fitted", ["measured", ""], [["store", "x" * 50]], numeric=False)
    assert file.getvalue().count("x") == 50
    assert "…" not in file.getvalue()


def test_control_characters_are_shown_as_escapes_and_line_breaks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: io.StringIO() for name in ("out", "err")}
    for name, file in files.items():
        monkeypatch.setattr(console, name, Console(file=file, force_terminal=True, width=80, color_system=None))
    nasty = "bn\x1b[2J\x07\x9b31m\u202eweight"
    shown = r"bn\x1b[2J\x07\x9b31m\u202eweight"
    console.table(nasty, ["tensor", "kind"], [[nasty, nasty]], note=nasty, numeric=False)
    console.say(f"{nasty}\nnext line")
    console.tell(nasty)
    console.error(ValueError(nasty))
    for name, count in (("out", 5), ("err", 2)):
        text = re.sub(r"\x1b\[\d*m", "", files[name].getvalue())  # rich's own bold title
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), name
        assert text.count(shown) == count, name
    assert "\nnext line" in files["out"].getvalue()


def test_control_characters_in_log_messages_are_shown_as_escapes() -> None:
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    handler.setFormatter(console._VisibleMessage("%(message)s"))
    handler.emit(logging.LogRecord("pdiff_plugin", logging.WARNING, "", 0, "left out: %s", ("a\x1b[2J",), None))
    assert logged.getvalue() == "left out: a\\x1b[2J\n"


def test_a_plain_line_of_progress_says_what_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=file, force_terminal=False, width=40))
    with console.progress() as tell:
        tell(Progress("score", 3, 12, text="gaussian 3/12, about 40 s left"))
    assert file.getvalue() == "score: 3/12 gaussian 3/12, about 40 s left\n"
