"""Our docstrings for Sphinx: shapes as code, and colons in the docstrings of fields as what they are."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

# (B, K), (N,), (K + r, D), (M, *shape): sizes of one letter or so, at least one comma.
_SIZE = r"(?:\*shape|\.\.\.|[A-Za-z]\w?(?: ?[+*x] ?[a-zA-Z0-9])?|[1-9])"
_SHAPE = re.compile(rf"\({_SIZE}(?:, {_SIZE})*,?(?<=[,\w.])\)")
_ONE_SIZE = re.compile(r": ([A-Z])\.$")  # `num_members: M.`, which would begin a list
_LITERAL = re.compile(r"(``.*?``|:\w+:`.*?`|`.*?`)")


def mark_up(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Change ``lines`` in place, before napoleon reads them."""
    code_indent: int | None = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if code_indent is not None and line.strip() and indent <= code_indent:
            code_indent = None
        if code_indent is None:
            parts = _LITERAL.split(line)
            parts[::2] = (
                _SHAPE.sub(lambda m: f"``{m[0]}``" if "," in m[0] or "*" in m[0] else m[0], part) for part in parts[::2]
            )
            lines[number] = _ONE_SIZE.sub(r": ``\1``.", "".join(parts))
            if line.rstrip().endswith("::"):
                code_indent = indent
    if what in ("attribute", "data", "property"):
        # An empty comment: napoleon takes what stands before a colon in the first line of a field for its type.
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", mark_up, priority=400)
    return {"parallel_read_safe": True}
