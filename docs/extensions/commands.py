"""The directive ``pdiff-commands``: a section for every subcommand of ``pdiff``, made from the command itself."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tyro
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pdiff_plugin import cli

# Settings that are only there with another flag, which tyro's parser is built after.
_VARIANTS = {"fit": {"--autoencoder conv": ["fit", "--autoencoder", "conv"]}}


class Commands(SphinxDirective):
    """Sections with usage, description and every flag; ``:option:`` and ``:ref:`pdiff-NAME``` lead to them."""

    def run(self) -> list[nodes.Node]:
        lines = [line for name in cli.COMMANDS for line in _section(name)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _section(name: str) -> Iterator[str]:
    function = cli._fit_from([name]) if name == "fit" else cli.COMMANDS[name]
    parser, command = _parser(function, name), f"pdiff {name}"
    yield from (f".. _pdiff-{name}:", "", command, "-" * len(command), "", f".. program:: {command}", "")
    yield from (".. code-block:: none", "", f"   {_usage(command, parser)}", "")
    yield from (*(_marked_up(paragraph) + "\n" for paragraph in (parser.description or "").split("\n\n")), "")
    for group in parser._action_groups:
        yield from _group(group)
    for flags, args in _VARIANTS.get(name, {}).items():
        other = _parser(cli._fit_from(args), name)
        known = {flag for action in parser._actions for flag in action.option_strings}
        yield from (f"With ``{flags}`` also:", "")
        for action in other._actions:
            if not known & set(action.option_strings) and action.option_strings:
                yield from _option(action)


def _group(group: Any) -> Iterator[str]:
    actions = [action for action in group._group_actions if action.dest != "help"]
    if actions and group.description:
        yield from (_marked_up(group.description), "")
    for action in actions:
        yield from _option(action)


def _option(action: argparse.Action) -> Iterator[str]:
    value = _value(action)
    flags = [f"{flag} {value}".rstrip() for flag in action.option_strings] or [value]
    yield from (f".. option:: {', '.join(flags)}", "", f"   {_marked_up(_help(action))}", "")


def _value(action: argparse.Action) -> str:
    """As tyro writes it, less the brackets of what may be repeated."""
    value = action.metavar if isinstance(action.metavar, str) else ""
    repeated = re.fullmatch(r"\[?\[(\S+) \[\1 \.\.\.\]\]\]?", value)
    return f"{repeated[1]} ..." if repeated else value.replace("{None}|", "")


def _help(action: argparse.Action) -> str:
    """The help of a flag without what says nothing: of a switch that it is off, of a default that there is none."""
    text = " ".join((action.help or "").replace("%%", "%").split())
    return re.sub(r" \(default: (None|False|)\)$", "", text)


def _usage(command: str, parser: argparse.ArgumentParser) -> str:
    required = [a for a in parser._actions if a.option_strings and a.required]
    positional = [a for a in parser._actions if not a.option_strings]
    shown = [*(_value(a) for a in positional), *(f"{a.option_strings[0]} {_value(a)}" for a in required)]
    return " ".join([command, *shown, "[OPTIONS]"])


def _marked_up(text: str) -> str:
    """Help as reStructuredText: what stands in backticks is code, everything else stands for itself."""
    parts = " ".join(text.split()).split("`")
    escaped = [re.sub(r"([\\*_|<>])", r"\\\1", part) for part in parts]
    return "".join(f"``{parts[n]}``" if n % 2 else escaped[n] for n in range(len(parts)))


def _parser(function: Callable[..., None], name: str) -> argparse.ArgumentParser:
    with warnings.catch_warnings():
        # Deprecated since tyro 1.0 without a successor that tells flags apart from the text of the help.
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(function, prog=f"pdiff {name}", config=(tyro.conf.AvoidSubcommands,))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("pdiff-commands", Commands)
    return {"parallel_read_safe": True}
