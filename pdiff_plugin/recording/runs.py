r"""Which checkpoints are of one run, and the condition that it was trained at: from a table, from the names of files,
or from the user's own function.

**A table** has a row for each run. One column names it, by the first of these headings: ``trajectory``, ``run``,
``file``, ``path``, ``checkpoint``, ``name``, ``logdir``. What stands there is a file, a file without its suffix, such a
name without the step (``a-step100`` is of ``a``), or a folder above it, with as many folders before it as one likes;
where several rows fit, the nearest to the file counts. Other columns are the condition: all of them, or those whose
heading begins as in the exports of Optuna (``params_``), Ray (``config/``) and W&B (``config.``) where there are some,
under the names that follow.

**A pattern** is ``NAME=REGEX`` with one group, which is the value; or an expression with named groups alone.
``angle=(\d+)`` is looked for in the name of the file, then of the folders above it, nearest first: ``angle``, then
nothing or one of ``= : _ -``, then the expression. Where the name of the file does not hold the word ``angle``, and no
folder gave a value, the expression alone is looked for in the file's name without its step. Suffixes (``.pt``) are left
out throughout.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from pdiff_plugin.errors import ConditionError, ConfigError, FormatError
from pdiff_plugin.snapshots.conditions import (
    Condition,
    check_fits,
    check_same_kind,
    parse_condition,
    parse_value,
    read_conditions,
)
from pdiff_plugin.snapshots.files import check_regular

StrPath = str | os.PathLike[str]
Conditions = Mapping[str, Mapping[str, Any]] | Callable[[Path], Mapping[str, Any]] | StrPath

KEYS = ("trajectory", "run", "file", "path", "checkpoint", "name", "logdir")
PREFIXES = ("params_", "params.", "params/", "config/", "config.", "hparams/", "hparams.")
_SUFFIX = re.compile(r"\.(?:pt|pth|bin|ckpt|safetensors)(?:\.tar)?$")
# Between other words: what names the moment of a checkpoint, or its score then (Lightning's {epoch}-{val_loss:.2f}).
_STEP = re.compile(
    r"(?<![a-z])(?:(?:global_?step|step|epoch|iteration|iter|checkpoint|ckpt|model_best|best|last|latest|final)s?"
    r"[-_=]?\d*|\w*(?:loss|acc|accuracy|score|error|f1|auc)=-?\d+(?:\.\d+)?)(?![a-z0-9])",
    re.IGNORECASE,
)
_SEPARATORS = "-_=. "


@dataclass(frozen=True)
class Run:
    """Checkpoints of one run.

    Attributes:
        files: in natural order of their names.
        condition: that it was trained at, if any is asked for.
    """

    files: list[Path] = field(default_factory=list)
    condition: Condition | None = None


def runs_of(files: Sequence[Path], conditions: Conditions | None, store: Path) -> list[Run]:
    """The runs that ``files`` are of, in the order of their first files.

    Without conditions they are one run. With them, those of one row of a table are, and those that have the same
    condition and the same place but for the step: ``a/step-1.pt`` and ``a/step-2.pt``, ``b-epoch1.pt`` and
    ``b-epoch2.pt``.

    Raises:
        ConditionError: a file without a condition, or with one unlike the others here or in the store.
        ConfigError: ``conditions`` is nothing of the kind.
        FormatError: a table that cannot be read.
    """
    if conditions is None:
        return [Run(list(files))]
    if isinstance(conditions, str | os.PathLike):
        conditions = read_table(conditions)
    find: Callable[[Path], tuple[Any, str]]
    if isinstance(conditions, Mapping):
        find = _Rows(conditions).find
    elif callable(conditions):
        given = conditions
        find = lambda file: (given(file), "")  # noqa: E731 (both give a condition and the row that it is from)
    else:
        raise ConfigError("conditions", conditions, "must be a mapping, a function of the path, or the path of a table")
    known, _ = read_conditions(store)
    runs: dict[tuple[Any, ...], Run] = {}
    first: tuple[str, Condition] | None = None
    for file in files:
        found, row = find(file)
        condition = parse_condition(found, str(file))
        first = first or (str(file), condition)
        check_same_kind(condition, str(file), first[1], first[0])
        check_fits(condition, str(file), dict(list(known.items())[:1]))
        place = (
            (row, repr(sorted(condition.items()))) if row else (_without_step(file), repr(sorted(condition.items())))
        )
        runs.setdefault(place, Run([], condition)).files.append(file)
    return list(runs.values())


def read_table(path: StrPath, columns: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Run -> names -> values of a CSV file, with commas, semicolons or tabs.

    An empty cell is no value. Values are read as :func:`~pdiff_plugin.snapshots.conditions.parse_value` does; lists may
    stand in square brackets.

    Args:
        path: of the file.
        columns: the names of the condition, with or without the prefixes of exports; chosen as the module says unless
            given.

    Raises:
        FormatError: it cannot be read, has no column that names the runs, none of ``columns``, no other column, or two
            rows for one run.
    """
    path = Path(path)
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(str(path), str(error), "a CSV file with a row for each run", "Check the path.") from error
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        lines = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as error:
        raise FormatError(str(path), f"no table ({error})", "a CSV file with a row for each run") from error
    header = lines[0] if lines else []
    named = {name.strip().lower(): name for name in reversed(header)}
    key = next((named[name] for name in KEYS if name in named), None)
    if key is None:
        expected = f"one that names the run or its files: {', '.join(KEYS)}"
        raise FormatError(str(path), f"columns {', '.join(header) or 'none'}", expected, "Add or rename one.")
    wanted = _columns(path, header, columns)
    table: dict[str, dict[str, Any]] = {}
    for line in lines[1:]:
        row = dict(zip_longest(header, line[: len(header)], fillvalue=""))
        name = row[key].strip()
        cells = {short: row[column].strip() for short, column in wanted.items()}
        values = {short: _parse_cell(cell) for short, cell in cells.items() if cell}
        if name and table.setdefault(name, values) != values:
            found = f"two rows with other values for {name!r} in column {key!r}"
            raise FormatError(str(path), found, "one row for each run", "Remove one, or choose columns.")
    return table


def conditions_in_names(patterns: Sequence[str]) -> Callable[[Path], Condition]:
    r"""A function that finds the condition of a checkpoint in its path; see the module for ``patterns``.

    Raises:
        ConfigError: one that is no regular expression, has no group, or gives a name that another has given.
    """
    parsed = [_Pattern(text) for text in patterns]
    names = [name for pattern in parsed for name in pattern.names]
    for text, pattern in zip(patterns, parsed, strict=True):
        if any(names.count(name) > 1 for name in pattern.names):
            raise ConfigError("condition", text, "must give names that no other expression gives")
    return lambda path: {name: value for pattern in parsed for name, value in pattern.find(path).items()}


def _columns(path: Path, header: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """Name in the condition -> column of the table."""
    prefixed = {_short(column): column for column in header if _short(column) != column}
    others = {column: column for column in header if column and column.strip().lower() not in KEYS}
    if not wanted:
        found = prefixed or others
        if not found:
            raise FormatError(str(path), f"columns {', '.join(header)}", "others that are the condition", "Add them.")
        return found
    known = {**prefixed, **{column: column for column in header}}
    for name in wanted:
        if name not in known:
            there = ", ".join({**prefixed, **others})
            raise FormatError(str(path), f"no column {name!r}", f"one of {there}", "Choose among these.")
    return {_short(name): known[name] for name in wanted}


def _short(column: str) -> str:
    return next((column.removeprefix(p) for p in PREFIXES if column.startswith(p) and column != p), column)


def _parse_cell(text: str) -> Any:
    is_list = text[0] == "[" and text[-1] == "]" and len(text) > 2
    return parse_value(f"{text[1:-1].strip().rstrip(',')}," if is_list else text)


class _Rows:
    """The row of each file.

    Args:
        conditions: run, file or folder -> its condition.
    """

    def __init__(self, conditions: Mapping[str, Mapping[str, Any]]) -> None:
        self._rows = {PurePath(key).parts: (str(key), condition) for key, condition in conditions.items()}

    def find(self, file: Path) -> tuple[Any, str]:
        """The condition, and the name of its row where that is of the whole run."""
        for parts, is_file in _names(file):
            if parts in self._rows:
                key, condition = self._rows[parts]
                return condition, "" if is_file else key
        known = ", ".join(key for key, _ in list(self._rows.values())[:6]) + (", ..." if len(self._rows) > 6 else "")
        raise ConditionError(
            str(file), "no row for it", f"one named like the file or a folder above it, but they are: {known or 'none'}"
        )


def _names(file: Path) -> Iterator[tuple[tuple[str, ...], bool]]:
    """What may name a file, the nearest first, as parts of a path; and whether it is of the file alone."""
    parts = Path(os.path.abspath(file)).parts
    stem = _SUFFIX.sub("", parts[-1])
    for own, is_file in ((parts[-1], True), (stem, True), (_drop_step(stem), False)):
        for start in range(len(parts)):
            yield (*parts[start:-1], own), is_file
    for end in range(len(parts) - 1, 0, -1):
        for start in range(end):
            yield parts[start:end], False


def _without_step(file: Path) -> tuple[str, ...]:
    """Where a file is, but for what its path says of the moment."""
    *folders, name = Path(os.path.abspath(file)).parts
    stem = _drop_step(_SUFFIX.sub("", name))
    return (*map(_drop_step, folders), "" if stem.isdigit() else stem)


def _drop_step(name: str) -> str:
    without = _STEP.sub("", name)
    return name if without == name else re.sub(r"([-_=. ])[-_=. ]+", r"\1", without).strip(_SEPARATORS)


class _Pattern:
    """One expression that finds values in paths."""

    def __init__(self, text: str) -> None:
        self.text = text
        whole = self._compiled(text)
        self._alone: re.Pattern[str] | None = None
        if whole.groupindex:
            self.names, self._expression = list(whole.groupindex), whole
            return
        name, _, regex = text.partition("=")
        if not re.fullmatch(r"[^\W\d][\w.-]*", name) or self._compiled(regex).groups != 1:
            raise ConfigError(
                "condition",
                text,
                r"must be NAME=REGEX with one group, the value, as in angle=(\d+), or have named groups (?P<angle>\d+)",
            )
        self.names, self._alone = [name], self._compiled(regex)
        self._word = re.compile(rf"(?<![^\W\d_]){re.escape(name)}(?![^\W\d_])")
        self._expression = self._compiled(rf"(?<![^\W\d_]){re.escape(name)}[=:_-]?(?:{regex})")

    def find(self, path: Path) -> Condition:
        """Names and values in the name of a file or of a folder above it."""
        folders = Path(os.path.abspath(path)).parts
        stem = _SUFFIX.sub("", folders[-1])
        for part in (stem, *reversed(folders[1:-1])):
            if found := self._matches(self._expression, part):
                return self._only(path, part, found)
        if self._alone is not None and not self._word.search(stem):
            bare = _drop_step(stem)
            if found := self._matches(self._alone, bare):
                return self._only(path, bare, found)
        raise ConditionError(
            str(path), f"nothing that {self.text!r} fits", f"{' and '.join(self.names)} in its name or a folder's"
        )

    def _only(self, path: Path, part: str, found: Sequence[tuple[str, ...]]) -> Condition:
        if len(found) > 1:
            there = " and ".join(", ".join(values) for values in found[:4])
            raise ConditionError(
                str(path),
                f"{there} for {', '.join(self.names)} in {part!r}",
                f"one: let {self.text!r} say what stands before or after it",
            )
        return dict(zip(self.names, map(parse_value, found[0]), strict=True))

    def _matches(self, expression: re.Pattern[str], part: str) -> list[tuple[str, ...]]:
        """Values of each match, each once; where a group took no part it is none."""
        groups: Iterable[str | int] = self.names if expression.groupindex else [1]
        found = [tuple(match[group] for group in groups) for match in expression.finditer(part)]
        return list(dict.fromkeys(values for values in found if all(values)))

    def _compiled(self, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise ConfigError("condition", self.text, f"must be a regular expression ({error})") from error
