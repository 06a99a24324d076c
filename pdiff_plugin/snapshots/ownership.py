"""One writer per trajectory: a file says whose it is, and a second writer is told so.

    .writer-000001.json   "host", "machine", "pid", "started": the process (see processes.py); "token": of the writer

The writer touches it every few seconds. It counts as gone when its process is (on the same machine), or when the file
has not been touched for a minute (from other machines, by the clock of the storage). Whoever then comes makes the file
of the next number, which only one can, so that of several that come at once one gets the trajectory.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
import weakref
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pdiff_plugin.errors import FormatError, FormatVersionError, TrajectoryInUseError
from pdiff_plugin.snapshots.files import created, read_json, temporary
from pdiff_plugin.snapshots.processes import Process, this_process

FORMAT = "pdiff-writer"
FORMAT_VERSION = 1

BEAT_S = 10.0
STALE_S = 60.0
_POLL_S = 1.0
_NAME = re.compile(r"\.writer-(\d{6})\.json")


class Ownership:
    """The right to write into a trajectory's folder, until :meth:`release` or the end of the process.

    Raises:
        TrajectoryInUseError: another writer has it. To find out about one on another machine may take a minute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._beaten = folder, time.monotonic()
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(this_process()),
            "token": uuid.uuid4().hex,
        }
        self._text = json.dumps(document) + "\n"
        while True:
            seen = _files(folder)
            for path in seen:
                if _is_alive(path):
                    raise TrajectoryInUseError(str(folder), _name_of(path))
            number = max((int(path.name[8:14]) for path in seen), default=0) + 1
            self._path = folder / f".writer-{number:06d}.json"
            if not created(self._path, self._text):
                continue  # another one was first
            self.release = weakref.finalize(self, _release, self._path, self._text, os.getpid())
            if _files(folder) == [*seen, self._path]:
                break
            self.release()  # while this one looked, another came and went
        for path in seen:
            path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Say that the writer lives, if that was long ago."""
        if time.monotonic() - self._beaten >= BEAT_S:
            self._beaten = time.monotonic()
            with suppress(OSError):  # taken over, which check() tells, or a disk in trouble, which the next write tells
                os.utime(self._path)

    def check(self) -> None:
        """Make sure of it before something is written.

        Raises:
            TrajectoryInUseError: somebody took it over, since this process stood still for too long.
        """
        try:
            if self._path.read_text(encoding="utf-8") == self._text:
                return
        except FileNotFoundError:
            pass
        others = _files(self.folder)
        raise TrajectoryInUseError(str(self.folder), _name_of(others[-1]) if others else "another process")


def holder(folder: Path) -> str | None:
    """Who is known, without waiting, to write into a trajectory at present."""
    for path in _files(folder):
        process = _process(path)
        if process is not None and process.has_ended() is False:
            return str(process)
    return None


def recorder_of(folder: Path) -> str | None:
    """Who seems to write into a trajectory at present; found out without waiting, and without writing there.

    Of those on other machines it is whoever has touched the file within a minute, by the clock of this one.
    """
    for path in _files(folder):
        process = _process(path)
        ended = process.has_ended() if process is not None else None
        with suppress(FileNotFoundError):  # it was given back meanwhile
            if ended is False or (ended is None and time.time() - path.stat().st_mtime < STALE_S):
                return str(process or "another process")
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)) if folder.is_dir() else []


def _process(path: Path) -> Process | None:
    """Whose file it is; None if it is gone or says nothing that can be understood."""
    try:
        return Process.from_json(read_json(path, FORMAT, FORMAT_VERSION))
    except (FileNotFoundError, FormatError, FormatVersionError):
        return None


def _name_of(path: Path) -> str:
    return str(_process(path) or "another process")


def _is_alive(path: Path) -> bool:
    process = _process(path)
    ended = process.has_ended() if process is not None else None
    if ended is not None:
        return not ended
    try:
        first = path.stat().st_mtime
        while _storage_time(path) - path.stat().st_mtime < STALE_S:
            time.sleep(_POLL_S)
            if path.stat().st_mtime != first:
                return True
    except FileNotFoundError:
        pass  # it was given back meanwhile
    return False


def _storage_time(path: Path) -> float:
    """The time by the clock that the files beside ``path`` are stamped with."""
    probe = temporary(path)
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _release(path: Path, text: str, pid: int) -> None:
    """Give a trajectory back, unless it was taken over, or this is a forked child of its writer."""
    with suppress(OSError):  # also called when the interpreter ends, or the folder is gone
        if os.getpid() == pid and path.read_text(encoding="utf-8") == text:
            path.unlink()
