"""The condition of a trajectory: the setting that its run was trained at, as a JSON mapping of names to values.

    STORE/trajectories/<id>/condition.json
    {"format": "pdiff-condition", "format_version": 1, "condition": {NAME: value}}

A value is a number, a string, true or false, or a list of numbers. All conditions of a store have the same names, and
under each name values of one type (numbers of one length): what does not fit is refused when it is recorded, by an
error that names both. A trajectory without the file has no condition. The file of a run whose ranks wrote shards stands
in the same place, so that there is one for a trajectory, whoever recorded it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pdiff_plugin.errors import ConditionError, FormatError, FormatVersionError, StoreNotFoundError
from pdiff_plugin.snapshots.files import check_regular, parse_json, read_json, write_json
from pdiff_plugin.snapshots.shards import layout_files

FORMAT = "pdiff-condition"
FORMAT_VERSION = 1
FILE_NAME = "condition.json"

Value = float | int | str | bool | list[float]
Condition = dict[str, Value]

_MAX_NAMES = 1000
_MAX_LENGTH = 100_000


def parse_condition(given: object, where: str) -> Condition:
    """A condition as plain JSON: tensors and arrays become numbers or lists of them.

    Args:
        given: a mapping of names to values, as a user or a file gives it.
        where: whose it is, for errors.

    Raises:
        ConditionError: something else, an empty mapping or name, a number that is not finite.
    """
    if not isinstance(given, Mapping) or not given:
        raise ConditionError(where, _kind_of(given), "a mapping of one or more names to values")
    if len(given) > _MAX_NAMES:
        raise ConditionError(where, f"{len(given)} names", f"at most {_MAX_NAMES}")
    for name in given:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ConditionError(where, f"the name {name!r}", "names of printable text")
    return {name: _parse_value(value, name, where) for name, value in given.items()}


def parse_value(text: str) -> Value:
    """A value as it is typed: a number, true or false, numbers with commas between or after them, else text.

    What stands in double quotes is text, whatever it looks like.
    """
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    numbers = [_number(part) for part in text.removesuffix(",").split(",")]
    if any(number is None for number in numbers):
        return text
    found = [number for number in numbers if number is not None]
    return [float(number) for number in found] if "," in text else found[0]


def read_pairs(pairs: Sequence[str], where: str) -> Condition:
    """A condition as it is typed: ``NAME=VALUE`` each, values by :func:`parse_value` or ``@FILE.npy`` for a list.

    Raises:
        ConditionError: a pair without ``=``, a name given twice, a file that is no list of numbers.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, is_pair, text = pair.partition("=")
        if not is_pair or not name:
            raise ConditionError(where, repr(pair), "NAME=VALUE, as in angle=45")
        if name in found:
            raise ConditionError(where, f"{name!r} twice", "each name once")
        found[name] = _read_vector(Path(text[1:]), where) if text.startswith("@") else parse_value(text)
    return parse_condition(found, where)


def read_condition_lines(path: Path) -> list[Condition]:
    """Conditions from a file with one JSON mapping of names to values a line; empty lines are left out.

    Raises:
        ConditionError: no such file, no condition in it, or a line that is none, by its number.
    """
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError, FormatError) as error:
        raise ConditionError(str(path), f"no text that can be read ({error})", "a JSON mapping a line") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                document = parse_json(line, where, "a JSON mapping")
            except FormatError as error:
                raise ConditionError(where, line[:60], 'a JSON mapping, as in {"angle": 45}') from error
            found.append(parse_condition(document, where))
    if not found:
        raise ConditionError(str(path), "no condition", 'a JSON mapping a line, as in {"angle": 45}')
    return found


def _read_vector(path: Path, where: str) -> Any:
    import numpy as np

    try:
        check_regular(path)
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConditionError(where, f"@{path}, which cannot be read ({error})", "a .npy file of numbers") from error
    return values.reshape(-1).tolist()


def kind_of(value: Value) -> str:
    """Type of a value in words: ``a number``, ``text``, ``true or false`` or ``a list of 3 numbers``."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    return f"a list of {len(value)} numbers" if isinstance(value, list) else "a number"


def describe_condition(condition: Mapping[str, Value]) -> str:
    """A condition in a line, as it is typed: ``angle=45.0 style=ink``; of long lists the first three numbers."""

    def text(value: Value) -> str:
        if isinstance(value, list):
            return ",".join(f"{number:g}" for number in value[:3]) + (",..." if len(value) > 3 else "")
        return (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )

    return " ".join(f"{name}={text(value)}" for name, value in condition.items())


def check_same_kind(condition: Condition, where: str, other: Condition, other_where: str) -> None:
    """Check that two conditions have the same names, and values of the same types and lengths under them.

    Raises:
        ConditionError: naming the first difference and both places.
    """
    for name in sorted(condition.keys() ^ other.keys()):
        has, lacks = (where, other_where) if name in condition else (other_where, where)
        raise ConditionError(where, f"{name!r} in {has} alone", f"the same names as in {other_where}; {lacks} lacks it")
    for name, value in condition.items():
        if kind_of(value) != kind_of(other[name]):
            raise ConditionError(
                where, f"{kind_of(value)} under {name!r}", f"{kind_of(other[name])}, as in {other_where}"
            )


def check_fits(condition: Condition, where: str, others: Mapping[str, Condition]) -> None:
    """Check a condition against those of other trajectories, by :func:`check_same_kind`.

    Raises:
        ConditionError: naming the first difference, ``where`` and the trajectory.
    """
    for name, other in others.items():
        check_same_kind(condition, where, other, name)


def matching(conditions: Mapping[str, Condition], wanted: Sequence[str], where: str) -> list[str]:
    """Trajectories that are named, each by its own name or with others as ``NAME=VALUE,VALUE``.

    Args:
        conditions: trajectory -> condition.
        wanted: what a user asks for.
        where: of the request, for errors.

    Returns:
        In the order of ``conditions``.

    Raises:
        ConditionError: no such trajectory, name or value.
    """
    found: set[str] = set()
    for text in wanted:
        name, is_pair, values = text.partition("=")
        if text in conditions:
            found.add(text)
            continue
        if not is_pair:
            raise ConditionError(where, f"no run {text!r}", f"one of {_some(conditions)}, or NAME=VALUE,VALUE")
        for one in values.split(","):
            value = parse_value(one)
            mine = {run for run, condition in conditions.items() if condition.get(name) in (value, one)}
            if not mine:
                known = sorted({str(condition[name]) for condition in conditions.values() if name in condition})
                there = (
                    f"recorded values: {_some(known)}" if known else f"names: {_some(next(iter(conditions.values())))}"
                )
                raise ConditionError(where, f"no run with {name}={one}", there)
            found |= mine
    return [run for run in conditions if run in found]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def folder_of(store: Path, trajectory: str) -> Path:
    """Where the condition of a trajectory is kept."""
    return store / "trajectories" / trajectory


def write_condition(folder: Path, condition: Condition) -> None:
    """Keep the condition of a trajectory beside its chunks, atomically."""
    folder.mkdir(parents=True, exist_ok=True)  # ranks with shards have their chunks elsewhere
    write_json(folder / FILE_NAME, {"format": FORMAT, "format_version": FORMAT_VERSION, "condition": dict(condition)})


def read_condition(folder: Path) -> Condition | None:
    """The condition of a trajectory, None without one.

    Raises:
        FormatError: the file is not a condition's.
        FormatVersionError: written by a newer release.
        ConditionError: its values are not.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    return parse_condition(read_json(path, FORMAT, FORMAT_VERSION).get("condition"), str(path))


def read_conditions(store: Path) -> tuple[dict[str, Condition], list[str]]:
    """Trajectory -> condition for those that have one, and a sentence for each file that cannot be read or that does
    not fit the first; what does not fit is among the conditions still.
    """
    found: dict[str, Condition] = {}
    problems: list[str] = []
    for path in sorted(store.glob(f"trajectories/*/{FILE_NAME}")):
        try:
            condition = read_condition(path.parent)
            if condition is not None:
                found[path.parent.name] = condition
                check_fits(condition, path.parent.name, dict(list(found.items())[:1]))
        except (FormatError, FormatVersionError, ConditionError, OSError) as error:
            problems.append(str(error))
    return found, problems


def set_condition(store: str | os.PathLike[str], trajectory: str, condition: Mapping[str, Any]) -> None:
    """Give a recorded trajectory a condition, in place of the one that it may have. See :func:`set_conditions`."""
    set_conditions(store, {trajectory: condition})


def set_conditions(store: str | os.PathLike[str], conditions: Mapping[str, Mapping[str, Any]]) -> None:
    """Give recorded trajectories conditions, in place of those that they may have.

    Together they may have other names than before, as long as all trajectories that have a condition then agree.
    Nothing is written unless all of them fit.

    Args:
        store: the store's folder.
        conditions: trajectory -> names -> values.

    Raises:
        StoreNotFoundError: there is no store.
        ConditionError: a trajectory that the store does not have, or a condition that is none or does not fit the
            others.
    """
    store = Path(store)
    if not layout_files(store):
        raise StoreNotFoundError(str(store), "it has no layout.json" if store.is_dir() else "there is no such folder")
    known = {path.name for pattern in ("", "shards/*/") for path in store.glob(f"{pattern}trajectories/*")}
    parsed: dict[str, Condition] = {}
    for name, condition in conditions.items():
        if name not in known:
            raise ConditionError(repr(name), "no such trajectory", f"one of those in {store}: {_some(sorted(known))}")
        parsed[name] = parse_condition(condition, name)
    others = {name: condition for name, condition in read_conditions(store)[0].items() if name not in parsed}
    for name, condition in parsed.items():
        check_fits(condition, name, others)
        others[name] = condition
    for name, condition in parsed.items():
        write_condition(folder_of(store, name), condition)


def _parse_value(value: Any, name: str, where: str) -> Value:
    if hasattr(value, "tolist"):  # a tensor, an array, or one of numpy's numbers
        value = value.tolist()
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        if not _is_finite(value):
            raise ConditionError(where, f"{value!r} under {name!r}", "a finite number")
        return value
    if isinstance(value, list | tuple) and 0 < len(value) <= _MAX_LENGTH:
        if all(isinstance(one, int | float) and not isinstance(one, bool) and _is_finite(one) for one in value):
            return [float(one) for one in value]
        raise ConditionError(where, f"a list under {name!r} that holds other things", "a list of finite numbers")
    raise ConditionError(
        where,
        f"{_kind_of(value)} under {name!r}",
        "a number, text, true or false, or a list of numbers (flatten what is nested, leave out what is not a setting)",
    )


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text) if "_" not in text else None  # Python's 1_000 is somebody's text
    return None


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _kind_of(value: object) -> str:
    return "an empty mapping" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"
