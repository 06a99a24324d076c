"""Temporary folders that a killed process leaves behind no longer than until the next one starts.

The process that made a folder holds a lock on a file in it, which the system takes back however that process ends. A
folder whose file can be locked is therefore nobody's, whatever process id, container or machine it came from.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pdiff_plugin.snapshots.files import TEMP_MARK

_PREFIX = "pdiff-"
_OWNER_NAME = f"{TEMP_MARK}owner"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files, gone afterwards; those that killed processes have left go at once."""
    remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with _owned(folder / _OWNER_NAME):
            yield folder
    finally:
        if (folder / _OWNER_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)  # what does not go is tried again by the next process


@contextmanager
def _owned(path: Path) -> Iterator[None]:
    """Hold the lock on a file, which is made."""
    if os.name != "posix":
        path.touch()
        yield
        return
    # Under another name until it is locked, or it would be taken for abandoned.
    unlocked = path.with_name(f"{path.name}-new")
    with open(unlocked, "wb") as owner:
        _lock(owner)
        unlocked.rename(path)
        yield


def keep(folder: Path) -> None:
    """Have a folder of :func:`scratch_folder` stay for its user, for good."""
    (folder / _OWNER_NAME).unlink()


def remove_abandoned() -> None:
    """Remove the temporary folders of this user's processes that are no more."""
    if os.name != "posix":
        return
    for mark in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER_NAME}"):
        with suppress(OSError):  # another's, or it has just gone
            if mark.parent.stat().st_uid != os.getuid():
                continue
            with open(mark, "rb+") as owner:
                if _lock(owner):
                    shutil.rmtree(mark.parent, ignore_errors=True)


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; False where another process has, or where files cannot be locked."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
