"""The folder that stores are merged into: who may write there, what is not finished yet, and how files get there."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pdiff_plugin.errors import FolderInUseError, TrajectoryInUseError
from pdiff_plugin.snapshots.files import TEMP_MARK, storage_error, temporary
from pdiff_plugin.snapshots.ownership import BEAT_S, Ownership

_TEMP_NAME = "merge"


@contextmanager
def owned(out: Path) -> Iterator[Callable[[], None]]:
    """The right to merge into ``out``, and what makes sure of it before something is written there."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _told_as_folder(out):
        ownership = Ownership(out)
    for path in out.glob(f"{TEMP_MARK}*-{_TEMP_NAME}"):
        shutil.rmtree(path)  # another merge's, which was killed
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S / 10):
            ownership.beat()

    def check_ours() -> None:
        with _told_as_folder(out):
            ownership.check()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield check_ours
    finally:
        stop.set()
        thread.join()
        ownership.release()
        if is_new and not any(out.iterdir()):  # nothing came of it
            out.rmdir()


@contextmanager
def _told_as_folder(out: Path) -> Iterator[None]:
    try:
        yield
    except TrajectoryInUseError as error:
        raise FolderInUseError(str(out), error.writer) from error


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A folder in the store that readers do not look into; gone afterwards, unless it was renamed."""
    folder = temporary(out / _TEMP_NAME)
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        told = storage_error(error, out)
        if told is None:
            raise
        raise told from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what does not go, the next merge removes


def carry(file: Path, target: Path) -> bool:
    """Link a file, or copy it where that cannot be: whether it was linked."""
    with suppress(OSError):  # another disk, one without links, or somebody else's file
        os.link(file.resolve(), target)  # os.link makes links to symbolic links, too
        return True
    shutil.copyfile(file, target)
    with open(target, "rb+") as copy:
        os.fsync(copy.fileno())
    return False
