"""The blocks of code in Markdown pages, and how they run: Python in one namespace a page, `pdiff` in this process."""

from __future__ import annotations

import glob
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from pdiff_plugin.cli import main

_COMMENT = re.compile(r"<!-- (?:not run: )?(.*?) -->")
_LANGUAGES = {"python": "python", "bash": "shell", "sh": "shell"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: python or shell.
        code: its text.
        place: page and line, for errors.
        caption: name of the file that it is to be saved as, or None.
        reason: why it is not run, or None.
    """

    language: str
    code: str
    place: str
    caption: str | None
    reason: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page in their order, those of included files too.

    A comment right above a block, `<!-- not run: why -->`, keeps it from being run.
    """
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence":
            continue
        words = token.info.split()
        if words[:1] == ["{include}"]:
            yield from blocks_of(page.parent / words[1])
            continue
        language = _LANGUAGES.get((words[1:] if words[:1] == ["{code-block}"] else words)[0] if words else "")
        if language is None:
            continue
        options = dict(re.findall(r"^:(\w+): (.*)$", token.content, re.MULTILINE))
        code = re.sub(r"\A(:\w+:.*\n)+", "", token.content)
        comment = _COMMENT.search(before.content) if before is not None and before.type == "html_block" else None
        place = f"{page.name}, line {token.map[0] + 1}"
        yield Block(language, code, place, options.get("caption"), comment[1] if comment else None)


def run(block: Block, names: dict[str, Any]) -> None:
    """Save a block under its caption, else run it in the working folder.

    Args:
        block: of Python, whose names are kept in ``names``, or of `pdiff` and `python FILE.py` commands.
        names: what the page's blocks know.
    """
    if block.caption is not None:
        Path(block.caption).write_text(block.code, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.code, block.place, "exec"), names)
    else:
        for line in block.code.replace("\\\n", " ").splitlines():
            _run_command(shlex.split(line, comments=True), f"{block.place}: {line}")


def _run_command(words: list[str], place: str) -> None:
    arguments = [found for word in words[1:] for found in (sorted(glob.glob(word)) if "*" in word else []) or [word]]
    if words[:1] == ["pdiff"]:
        assert main(arguments) == 0, place
    elif words[:1] == ["python"]:
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        assert not words, f"{place}: neither pdiff nor python; say `<!-- not run: why -->` above the block"
