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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from pdiff_plugin.errors import BucketError, FolderInUseError, PDiffError, StoreNotFoundError
from pdiff_plugin.snapshots.base import BASE_NAME
from pdiff_plugin.snapshots.bucket_owner import OWNER_NAME, BucketOwner
from pdiff_plugin.snapshots.conditions import FILE_NAME as CONDITION_NAME
from pdiff_plugin.snapshots.files import TEMP_MARK, storage_error
from pdiff_plugin.snapshots.layout import LAYOUT_NAME
from pdiff_plugin.snapshots.scratch import keep, scratch_folder
from pdiff_plugin.snapshots.shards import SHAPES_NAME, read_worlds

logger = logging.getLogger(__name__)

_PUSH_EVERY_S = 2.0
_LAST_TRIES = 5  # 30 s in all
# Ranges asked for at once: one per snapshot, and buckets answer many at a time.
_BATCH_BYTES = 64 << 20
# Names under which file systems of fsspec tell whether an object is the same still.
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


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
        BucketError: the bucket refuses us, or does not answer.
        FormatError: a layout cannot be read, or a rank's snapshots are missing.
    """
    with _asking(url, folder):
        return _copy_store(url, folder, share)


def copy_whole_store(url: str, folder: Path, trajectories: Collection[str]) -> Path:
    """As :func:`copy_store`, of some trajectories all columns and the whole model; what ranks wrote is left out."""
    with _asking(url, folder):
        fs, root = _open(url)
        _copy_documents(fs, root, url, folder)
        for remote in _files_of_trajectories(fs, root):
            if PurePosixPath(remote).parent.name in trajectories:
                fs.get_file(remote, str(_local_path(remote, root, folder)))
    return folder


def list_trajectories(url: str) -> dict[str, dict[str, str]]:
    """What a store in a bucket holds: trajectory -> name of a file -> a text that changes when the file does.

    Raises:
        BucketError: the bucket refuses us, or does not answer.
    """
    found: dict[str, dict[str, str]] = {}
    with _asking(url, Path()):
        fs, root = _open(url)
        for remote, about in _files_of_trajectories(fs, root).items():
            path = PurePosixPath(remote)
            # Each service has its own name for it. Where it has none, nothing is ever the same: no time comes twice.
            version = next((about[name] for name in _VERSIONS if about.get(name)), time.time_ns())
            found.setdefault(path.parent.name, {})[path.name] = f"{about.get('size')} {version}"
    return found


def _files_of_trajectories(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """Path -> what the bucket tells of it."""
    names = ("chunk-*.safetensors", "sparse-*.safetensors", BASE_NAME, CONDITION_NAME)
    found = [fs.glob(f"{root}/trajectories/*/{name}", detail=True) for name in names]
    return {str(path): about for part in found for path, about in part.items()}


def find_stores_in_bucket(url: str) -> list[str]:
    """The URL of a store itself, or those of the stores that it matches as a pattern, by their names.

    Raises:
        StoreNotFoundError: it matches none.
        BucketError: the bucket refuses us, or does not answer.
    """
    if "*" not in url:  # of other characters in a pattern there are some in URLs
        return [url]
    with _asking(url, Path()):
        fs, root = _open(url)
        layouts = [str(path) for path in fs.glob(f"{root}/{LAYOUT_NAME}")]
        if not layouts:
            raise StoreNotFoundError(url, "the pattern matches no store")
        return [fs.unstrip_protocol(path.removesuffix(f"/{LAYOUT_NAME}")) for path in sorted(layouts)]


def _copy_documents(fs: Any, root: str, url: str, folder: Path) -> None:
    """Copy all but the chunks and the whole models."""
    layouts = [name for name in (LAYOUT_NAME, f"shards/*/{LAYOUT_NAME}") for name in fs.glob(f"{root}/{name}")]
    if not layouts:
        raise StoreNotFoundError(url, f"it has no {LAYOUT_NAME}")
    small = [f"shards/*/{SHAPES_NAME}", f"trajectories/*/{CONDITION_NAME}"]
    for remote in [*layouts, *(path for pattern in small for path in fs.glob(f"{root}/{pattern}"))]:
        _local_path(str(remote), root, folder).write_bytes(fs.cat_file(str(remote)))


def _local_path(remote: str, root: str, folder: Path) -> Path:
    """Where in ``folder`` an object below ``root`` belongs."""
    local = folder / PurePosixPath(remote).relative_to(root)
    local.parent.mkdir(parents=True, exist_ok=True)
    return local


def _copy_store(url: str, folder: Path, share: Callable[[int], slice] | None) -> Path:
    fs, root = _open(url)
    _copy_documents(fs, root, url, folder)
    for world in read_worlds(folder)[0]:
        columns = share(world.layout.num_values) if share else slice(0, world.layout.num_values)
        for rank, place in enumerate(world.folders):
            own = [(lo, hi) for owner, lo, hi in world.ranges(columns.start, columns.stop) if owner == rank]
            inside = PurePosixPath(root, place.relative_to(folder))
            chunks = [fs.glob(f"{inside}/trajectories/*/{kind}-*.safetensors") for kind in ("chunk", "sparse")]
            for remote in sorted(chain.from_iterable(chunks)):
                _copy_chunk(fs, str(remote), _local_path(str(remote), root, folder), own)
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
def mirrored(
    url: str, *, last: str, always: Sequence[str] = (), is_final: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """Yield a local copy of a run folder in a bucket; what changes in it is put back, at the latest on leaving.

    Args:
        url: of the folder.
        last: name of the file that tells what is in the others: it is put when they have been.
        always: names that are asked for whatever a listing says, which may lag behind.
        is_final: whether a copy is of a folder that will not change; others are claimed for this process at once.

    Raises:
        BucketError: the bucket refuses us, or does not answer.
        FolderInUseError: another process writes to the folder.
        OSError: the bucket does not take what changed last, even when asked again; the local copy then stays.
    """
    with scratch_folder() as folder:
        with _asking(url, folder):
            mirror = _Mirror(url, folder, last)
            _patiently(lambda: mirror.pull(always), f"read {url}")
            if not is_final(folder):
                _patiently(mirror.owner.claim, f"write to {url}")
        stop = threading.Event()
        thread = threading.Thread(target=mirror.push_until, args=(stop,), daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            stop.set()
            thread.join()
            mirror.push_last()


@contextmanager
def _asking(url: str, folder: Path) -> Iterator[None]:
    """Turn what a bucket's library raises into an error of ours."""
    try:
        yield
    except PDiffError:
        raise
    except Exception as error:  # not every bucket raises OSError
        told = storage_error(error, folder) if isinstance(error, OSError) else None
        raise told or BucketError(url, str(error).rstrip(".") or type(error).__name__) from error


def _patiently(action: Callable[[], None], what: str) -> None:
    """Try again, a few times, where a bucket is busy; not where it refuses us."""
    for attempt in range(_LAST_TRIES):
        try:
            return action()
        except (PDiffError, PermissionError):
            raise
        except Exception as error:  # not every bucket raises OSError
            if attempt + 1 == _LAST_TRIES or (isinstance(error, OSError) and storage_error(error, what)):
                raise
            logger.warning("could not %s, trying again (%s)", what, error)
            time.sleep(_PUSH_EVERY_S * 2**attempt)


class _Mirror:
    """A local folder and the place in a bucket that follows it."""

    def __init__(self, url: str, folder: Path, last: str) -> None:
        self.fs, self.root = _open(url)
        self.url, self.folder, self.last = url, folder, last
        self.owner = BucketOwner(self.fs, self.root, url)
        self.seen: dict[str, tuple[int, int]] = {}

    def pull(self, always: Sequence[str]) -> None:
        """Copy what the bucket has."""
        listed = {PurePosixPath(str(path)).name for path in self.fs.glob(f"{self.root}/*") if self.fs.isfile(path)}
        for name in sorted((listed | set(always)) - {OWNER_NAME}):
            try:
                self.fs.get_file(f"{self.root}/{name}", str(self.folder / name))
            except FileNotFoundError:
                (self.folder / name).unlink(missing_ok=True)
        self.seen = self._state()

    def push(self) -> None:
        """Put new and changed files, delete those that are gone here, and put the last file.

        Whatever moment this ends at, what the bucket's last file tells of is there: it was read before the others.
        """
        before = self._state()
        document = (self.folder / self.last).read_bytes() if self.last in before else None
        state = {name: found for name, found in self._state().items() if name != self.last}
        if document is not None:
            state[self.last] = before[self.last]  # it may be newer by now, and is then put the next time
        if state == self.seen:
            return
        self.owner.claim()
        for name in sorted(state.keys() - {self.last}):
            if state[name] != self.seen.get(name):
                self.fs.put_file(str(self.folder / name), f"{self.root}/{name}")
        for name in self.seen.keys() - state.keys():
            self.fs.rm_file(f"{self.root}/{name}")
        if document is not None:
            self.owner.check()
            self.fs.pipe_file(f"{self.root}/{self.last}", document)
        self.seen = state

    def push_until(self, stop: threading.Event) -> None:
        """Push every few seconds; a bucket that does not answer for a while costs nothing but a warning."""
        while not stop.wait(_PUSH_EVERY_S):
            try:
                self.push()
            except FolderInUseError:
                return  # told by who found it; pushing the last files raises it
            except Exception as error:  # not every bucket raises OSError
                logger.warning("could not write to %s, trying again (%s)", self.root, error)

    def push_last(self) -> None:
        """Push, with more patience and, in vain, with an error that says where everything still is."""
        try:
            _patiently(self.push, f"write to {self.root}")
            _patiently(self.owner.release, f"write to {self.root}")
        except FolderInUseError:
            if self.owner.is_claimed:  # it was this process's, and there may be hours of work in it
                keep(self.folder)
                logger.warning("what was not put into %s is in %s", self.url, self.folder)
            raise
        except Exception as error:
            keep(self.folder)
            raise OSError(
                f"could not write to {self.root} ({error}). All files are in {self.folder}: "
                "copy them there yourself, then remove that folder."
            ) from error

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
    fs.invalidate_cache()  # other processes have written since
    return fs, str(root).rstrip("/")
