"""Writing files so that a reader, or a kill, never meets half of one."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard
from uuid import uuid4

from pdiff_plugin.errors import FormatError, FormatVersionError, StorageError
from pdiff_plugin.snapshots.processes import Process, this_process

TEMP_MARK = ".tmp-"
_TEMP_NAME = re.compile(rf"{re.escape(TEMP_MARK)}([0-9a-f]{{12}})-(\d{{1,9}})-(\d{{1,18}})-.*")
# Nobody takes this long between two writes to one file.
ABANDONED_S = 24 * 3600.0
# What a document of ours needs is a tenth of this; whoever walks through one may call itself for every level.
_MAX_DEPTH = 64
_MAX_DIGITS = 308  # of a whole number: a longer one is no float


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other writer uses, be it a thread or a process on another machine.

    It tells whose it is, so that what a killed process has left can be told from what is being written.
    """
    mine = this_process()
    return path.with_name(f"{TEMP_MARK}{mine.machine}-{mine.pid}-{mine.started}-{uuid4().hex[:12]}-{path.name}")


def remove_strays(folder: Path, *, min_age_s: float = math.inf) -> None:
    """Delete the temporary files in ``folder`` whose writers are known to be gone.

    Args:
        folder: alone, without those below it.
        min_age_s: after which those are deleted, too, whose writer is not known, or is on another machine. Only for
            folders where nobody else keeps files.
    """
    for path in folder.glob(f"{TEMP_MARK}*"):
        match = _TEMP_NAME.fullmatch(path.name)
        ended = Process("", match[1], int(match[2]), int(match[3])).has_ended() if match else None
        with suppress(FileNotFoundError):  # another one cleans up, too
            if path.is_dir() and not path.is_symlink():
                continue  # none of ours
            if ended or (ended is None and time.time() - path.lstat().st_mtime >= min_age_s):
                path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success its content is on disk and has replaced ``path``.

    On any exception the temporary file is removed and ``path`` is as it was.

    Raises:
        StorageError: there is no room, or the disk can only be read.
    """
    temp = temporary(path)
    with _written(path, temp):
        # safetensors makes its file readable by its owner alone; others who share the folder must read it too.
        temp.touch()
        mode = temp.stat().st_mode
        yield temp
        temp.chmod(mode)
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)


@contextmanager
def _written(path: Path, temp: Path) -> Iterator[None]:
    """Tell what to do where ``path`` cannot be written, and leave no ``temp``."""
    try:
        yield
    except OSError as error:
        told = storage_error(error, path, temp)
        if told is None:
            raise
        raise told from error
    finally:
        if temp.exists():  # on a disk that can only be read, even removing nothing is an error
            temp.unlink()


def storage_error(error: OSError, path: str | os.PathLike[str], temp: Path | None = None) -> StorageError | None:
    """What to do where a disk has no room, or can only be read; None for any other error.

    Args:
        error: of the system, on writing.
        path: what was to be written.
        temp: what there is of it; room for tensors is declared before they are written, so that its size is the whole.
    """
    elsewhere = "choose a folder elsewhere"
    if error.errno == errno.EROFS:
        return StorageError(str(path), "this disk can only be read", elsewhere.capitalize())
    if error.errno == errno.EFBIG:
        reason = "the file would be larger than its disk or `ulimit -f` allows"
        return StorageError(str(path), reason, f"Raise that limit, or {elsewhere}")
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    reason = "the disk is full" if error.errno == errno.ENOSPC else "the quota there is used up"
    if temp is not None and temp.exists() and (found := temp.stat()).st_size:
        free = shutil.disk_usage(temp.parent).free + found.st_blocks * 512
        reason += f" (it takes {found.st_size / 1e6:,.3f} MB or more, and {free / 1e6:,.3f} MB are free)"
    return StorageError(str(path), reason, f"Free room in {Path(path).parent}, or {elsewhere}")


def created(path: Path, text: str) -> bool:
    """Write a new file, if there is none: whether this was done. Of several writers at once one does.

    Raises:
        StorageError: there is no room, or the disk can only be read.
    """
    temp = temporary(path)
    with _written(path, temp):
        temp.write_text(text, encoding="utf-8")
        try:
            # A hard link appears whole and fails if another writer was first; os.replace would overwrite its file.
            os.link(temp, path)
        except FileExistsError:
            return False
        except OSError:
            return _created_without_links(path, text)
    return True


def _created_without_links(path: Path, text: str) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` as indented JSON, atomically."""
    with replacing(path) as temp:
        temp.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def json_safe(value: Any, digits: int | None = None) -> Any:
    """``value`` as JSON can hold it, at any depth: null for NaN and infinity, floats rounded to ``digits`` if given."""
    if isinstance(value, Mapping):
        return {key: json_safe(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item, digits) for item in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def read_json(path: Path, name: str, version: int) -> dict[str, Any]:
    """Read a JSON document whose ``"format"`` is ``name`` and whose ``"format_version"`` is at most ``version``.

    Raises:
        FormatError: not JSON, or another format.
        FormatVersionError: from a newer release.
    """
    check_regular(path)
    document = parse_json(path.read_bytes(), str(path), f"a {name} document")
    check_format(str(path), document if isinstance(document, dict) else {}, name, version)
    return dict(document)


def parse_json(text: str | bytes, path: str, expected: str) -> Any:
    """What a JSON text of at most 64 levels and whole numbers of at most 308 digits says.

    Raises:
        FormatError: it is no such text; ``path`` says where it stands.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        document = json.loads(text, parse_int=_parse_int)
        if "\\ud" in text.lower():  # half of a surrogate pair can be escaped, but neither printed nor written
            json.dumps(document, ensure_ascii=False).encode("utf-8")
        _check_depth(document)
    except (ValueError, RecursionError) as error:  # a text that is no UTF-8 is a ValueError, too
        raise FormatError(path, f"unreadable JSON ({error})", expected) from error
    return document


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"more than {_MAX_DEPTH} levels")


@contextmanager
def reading(path: str, expected: str) -> Iterator[None]:
    """Rebuild something from a document: what Python says of one that is of another shape names the file.

    Raises:
        FormatError: in place of what a wrong type, a missing key or a number out of range leads to.
    """
    try:
        yield
    except (FormatError, FormatVersionError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        found = f"what cannot be read ({type(error).__name__}: {error})"
        raise FormatError(path, found, expected) from error


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a document is a number, which fits into 64 bits if it is whole."""
    return isinstance(value, float) or (type(value) is int and -(2**63) <= value < 2**63)


def number_in(value: object) -> float:
    """A figure of a document, in which null stands for what is undefined.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        return math.nan
    if not is_number(value):
        raise ValueError(f"a figure that is a {type(value).__name__}")
    return value


def check_regular(path: Path) -> None:
    """Check that there is a file: to open a FIFO waits until somebody writes into it, and a device need never end.

    Raises:
        FileNotFoundError: there is nothing.
        FormatError: there is something else.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
        found = next((text for is_one, text in kinds if is_one(mode)), "a device")
        raise FormatError(str(path), found, "a file")


def check_format(path: str, header: Mapping[str, object], name: str, version: int) -> None:
    """Check the two keys that every file of ours carries; a header may hold them as text.

    Raises:
        FormatError: another format, or no version.
        FormatVersionError: from a newer release.
    """
    if header.get("format") != name:
        raise FormatError(path, f"format {header.get('format')!r}", f"format {name!r}")
    found = str(header.get("format_version"))
    if not re.fullmatch(r"[0-9]{1,9}", found):
        raise FormatError(path, f"format_version {found}", "a whole number")
    if int(found) > version:
        raise FormatVersionError(path, int(found), version)
