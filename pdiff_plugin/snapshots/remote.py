"""Stores and run folders in a bucket (``s3://``, ``gs://``, any URL that fsspec knows).

A store is read through memory maps, which a bucket cannot serve: the columns that are wanted are copied first, into
sparse files of the same shape, so that everything else works as on a local disk. A run folder is a local one whose
files are put into the bucket as they change.
"""

from __future__ import annotations

import json
import logging
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pdiff_plugin.errors import StoreNotFoundError
from pdiff_plugin.snapshots.conditions import FILE_NAME as CONDITION_NAME
from pdiff_plugin.snapshots.files import TEMP_MARK
from pdiff_plugin.snapshots.layout import LAYOUT_NAME
from pdiff_plugin.snapshots.scratch import keep, scratch_folder
from pdiff_plugin.snapshots.shards import SHAPES_NAME, read_worlds

logger = logging.getLogger(__name__)

_PUSH_EVERY_S = 2.0
_LAST_TRIES = 5  # 30 s in all
# Ranges asked for at once: one per snapshot, and buckets answer many at a time.
_BATCH_BYTES = 64 << 20


def is_remote(path: object) -> bool:
    """Whether a path is the URL of a bucket rather than a folder."""
    return "://" in str(path)


def copy_store(url: str, folder: Path, share: Callable[[int], slice] | None = None) -> Path:
    """Copy a store from a bucket: headers, steps, conditions, and the wanted columns of every chunk.

    Args:
        url: of the store.
        folder: to copy to; made if missing.
        share: the columns that are wanted, given their number; all unless given. The others read as zeros and take no
            room on disk.

    Returns:
        ``folder``, which opens as a store.

    Raises:
        StoreNotFoundError: there is none.
        FormatError: a layout cannot be read, or a rank's snapshots are missing.
    """
    fs, root = _open(url)
    layouts = [name for name in (LAYOUT_NAME, f"shards/*/{LAYOUT_NAME}") for name in fs.glob(f"{root}/{name}")]
    if not layouts:
        raise StoreNotFoundError(url, f"it has no {LAYOUT_NAME}")
    small = [f"shards/*/{SHAPES_NAME}", f"trajectories/*/{CONDITION_NAME}"]
    for remote in [*layouts, *(path for pattern in small for path in fs.glob(f"{root}/{pattern}"))]:
        local = folder / PurePosixPath(str(remote)).relative_to(root)
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(fs.cat_file(str(remote)))
    for world in read_worlds(folder):
        columns = share(world.layout.num_values) if share else slice(0, world.layout.num_values)
        for rank, place in enumerate(world.folders):
            own = [(lo, hi) for owner, lo, hi in world.ranges(columns.start, columns.stop) if owner == rank]
            inside = PurePosixPath(root, place.relative_to(folder))
            for remote in sorted(fs.glob(f"{inside}/trajectories/*/chunk-*.safetensors")):
                local = folder / PurePosixPath(str(remote)).relative_to(root)
                local.parent.mkdir(parents=True, exist_ok=True)
                _copy_chunk(fs, str(remote), local, own)
    return folder


def _copy_chunk(fs: Any, remote: str, local: Path, columns: Sequence[tuple[int, int]]) -> None:
    """Copy a chunk file, of its rows the ``columns`` [lo, hi) alone."""
    # https://github.com/huggingface/safetensors#format: a length, a JSON header, and the tensors, row by row.
    size = int(fs.size(remote))
    length = int.from_bytes(fs.cat_file(remote, start=0, end=8), "little")
    head = fs.cat_file(remote, start=0, end=8 + length)
    origin = 8 + length
    try:
        header = json.loads(head[8:])
        begin, end = header["rows"]["data_offsets"]
        n, D = header["rows"]["shape"]
        others = [spec["data_offsets"] for name, spec in header.items() if name not in ("rows", "__metadata__")]
    except (ValueError, KeyError, TypeError):
        local.write_bytes(fs.cat_file(remote))  # damaged: whoever opens the copy says so
        return
    width = (end - begin) // max(1, n * D)
    ranges = [(origin + start, origin + stop) for start, stop in others]
    for row in range(n):
        start = origin + begin + row * D * width
        ranges += [(start + lo * width, start + hi * width) for lo, hi in columns if lo < hi]
    with open(local, "wb") as file:
        file.truncate(size)
        file.write(head)
        at_once = max(1, _BATCH_BYTES // max(1, *(stop - start for start, stop in ranges)))
        for first in range(0, len(ranges), at_once):
            starts, stops = map(list, zip(*ranges[first : first + at_once], strict=True))
            for start, piece in zip(starts, fs.cat_ranges([remote] * len(starts), starts, stops), strict=True):
                if isinstance(piece, Exception):
                    raise piece
                file.seek(start)
                file.write(piece)


@contextmanager
def mirrored(url: str) -> Iterator[Path]:
    """Yield a local copy of a run folder in a bucket; what changes in it is put back, at the latest on leaving.

    Raises:
        OSError: the bucket does not take what changed last, even when asked again; the local copy then stays.
    """
    with scratch_folder() as folder:
        mirror = _Mirror(url, folder)
        mirror.pull()
        stop = threading.Event()
        thread = threading.Thread(target=mirror.push_until, args=(stop,), daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            stop.set()
            thread.join()
            mirror.push_last()


class _Mirror:
    """A folder and its copy in a bucket."""

    def __init__(self, url: str, folder: Path) -> None:
        self.fs, self.root = _open(url)
        self.folder = folder
        self.seen: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Copy what the bucket has."""
        for remote in self.fs.glob(f"{self.root}/*"):
            if self.fs.isfile(remote):
                name = PurePosixPath(str(remote)).name
                self.fs.get_file(str(remote), str(self.folder / name))
        self.seen = self._state()

    def push(self) -> None:
        """Put new and changed files, and delete those that are gone here."""
        state = self._state()
        for name in sorted(state):
            if state[name] != self.seen.get(name):
                self.fs.makedirs(self.root, exist_ok=True)
                self.fs.put_file(str(self.folder / name), f"{self.root}/{name}")
        for name in self.seen.keys() - state.keys():
            self.fs.rm_file(f"{self.root}/{name}")
        self.seen = state

    def push_until(self, stop: threading.Event) -> None:
        """Push every few seconds; a bucket that does not answer for a while costs nothing but a warning."""
        while not stop.wait(_PUSH_EVERY_S):
            try:
                self.push()
            except OSError as error:
                logger.warning("could not write to %s, trying again (%s)", self.root, error)

    def push_last(self) -> None:
        """Push, with more patience and, in vain, with an error that says where everything still is."""
        for attempt in range(_LAST_TRIES):
            try:
                self.push()
                return
            except Exception as error:  # not every bucket raises OSError
                if attempt + 1 == _LAST_TRIES:
                    keep(self.folder)
                    raise OSError(
                        f"could not write to {self.root} ({error}). All files are in {self.folder}: "
                        "copy them there yourself, then remove that folder."
                    ) from error
                logger.warning("could not write to %s, trying again (%s)", self.root, error)
                time.sleep(_PUSH_EVERY_S * 2**attempt)

    def _state(self) -> dict[str, tuple[int, int]]:
        state = {}
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # replaced or dropped meanwhile
                found = path.stat()
                if stat.S_ISREG(found.st_mode) and not path.name.startswith(TEMP_MARK):
                    state[path.name] = (found.st_mtime_ns, found.st_size)
        return state


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    return fs, str(root).rstrip("/")
