"""Stores and run folders in a bucket (``s3://``, ``gs://``, any URL that fsspec knows).

Of a store all but the rows is copied, into sparse files of the same shape, which open as a store on a local disk does;
rows are read from the bucket by :mod:`pdiff_plugin.snapshots.bucket_store`. A run folder is a local one whose files are
put into the bucket as they change.
"""

from __future__ import annotations

import json
import logging
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
# Of a chunk file, read before its header says how long that is; that of one snapshot has some hundred bytes.
_HEAD_BYTES = 4096
_MAX_HEAD_BYTES = 100 << 20  # more, safetensors does not read
_HEADS_AT_ONCE = 1024
# Names under which file systems of fsspec tell whether an object is the same still.
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")


def is_remote(path: object) -> bool:
    """Whether a path is the URL of a bucket rather than a folder."""
    return "://" in str(path)


@dataclass(frozen=True)
class RemoteRows:
    """Where the rows of a chunk file are in a bucket.

    Attributes:
        path: of the object.
        first_byte: of the first row; the others follow on it.
    """

    path: str
    first_byte: int


class RangeReader:
    """Reads ranges of the objects in a folder of a bucket, many at once, and counts the bytes.

    Args:
        url: of the folder.

    Raises:
        BucketError: the bucket refuses us, or does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._num_bytes, self._lock = 0, threading.Lock()
        with _asking(url, Path()):
            self.fs, self.root = _open(url)

    def read(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes [start, stop) of each (path, start, stop); where the bucket is busy, what is missing is asked again.

        Raises:
            BucketError: the bucket refuses us, or does not answer, or an object is gone or shorter than it was.
        """
        found: dict[int, bytes] = {}

        def ask() -> None:
            left = [number for number in range(len(ranges)) if number not in found]
            paths, starts, stops = (list(part) for part in zip(*(ranges[number] for number in left), strict=True))
            pieces = self.fs.cat_ranges(paths, starts, stops, on_error="return")
            failures: list[Exception] = []
            for number, piece in zip(left, pieces, strict=True):
                path, start, stop = ranges[number]
                if isinstance(piece, FileNotFoundError):
                    raise BucketError(self.url, f"{path} is gone since the store was opened") from piece
                if isinstance(piece, Exception):
                    failures.append(piece)
                elif len(piece) != stop - start:
                    failures.append(OSError(f"{len(piece)} bytes of {path} where {stop - start} were asked for"))
                else:
                    found[number] = piece
                    with self._lock:
                        self._num_bytes += len(piece)
            if failures:
                raise failures[0]

        if ranges:
            with _asking(self.url, Path()):
                _patiently(ask, f"read {self.url}")
        return [found[number] for number in range(len(ranges))]

    def take_num_bytes(self) -> int:
        """Bytes that were read since this was asked last."""
        with self._lock:
            taken, self._num_bytes = self._num_bytes, 0
        return taken


def copy_without_rows(reader: RangeReader, folder: Path) -> tuple[dict[Path, RemoteRows], int]:
    """Copy of a store in a bucket what is small: layouts, conditions, and of its chunks all but the rows.

    Args:
        reader: of the store's folder.
        folder: to copy to; made if missing. It opens as a store whose rows are zeros and take no room.

    Returns:
        Path of each chunk in ``folder`` -> where its rows are, and the size of all chunks in bytes.

    Raises:
        StoreNotFoundError: there is none.
        BucketError: the bucket refuses us, or does not answer.
        FormatError: a layout cannot be read, or a rank's snapshots are missing.
    """
    fs, root = reader.fs, reader.root
    with _asking(reader.url, folder):
        _copy_documents(fs, root, reader.url, folder)
        found: dict[str, dict[str, Any]] = {}
        for place in chain.from_iterable(world.folders for world in read_worlds(folder)[0]):
            inside = PurePosixPath(root, place.relative_to(folder))
            for kind in ("chunk", "sparse"):
                found |= fs.glob(f"{inside}/trajectories/*/{kind}-*.safetensors", detail=True)
        sizes = {str(path): int(about["size"]) for path, about in found.items()}
        rows: dict[Path, RemoteRows] = {}
        for first in range(0, len(sizes), _HEADS_AT_ONCE):
            some = dict(sorted(sizes.items())[first : first + _HEADS_AT_ONCE])
            for path, origin in _copy_heads(reader, some, folder).items():
                rows[_local_path(path, root, folder)] = RemoteRows(path, origin)
    return rows, sum(sizes.values())


def copy_whole_store(url: str, folder: Path, trajectories: Collection[str]) -> Path:
    """Copy some trajectories of a store, with the whole model of each; what ranks wrote is left out.

    Raises:
        StoreNotFoundError: there is none.
        BucketError: the bucket refuses us, or does not answer.
    """
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


def _copy_heads(reader: RangeReader, sizes: Mapping[str, int], folder: Path) -> dict[str, int]:
    """Copy chunk files without their rows; path -> first byte of the rows, of those that are not damaged."""
    heads = _read_heads(reader, {path: min(size, _HEAD_BYTES) for path, size in sizes.items()})
    # https://github.com/huggingface/safetensors#format: a length, a JSON header, and the tensors, row by row.
    lengths = {path: 8 + int.from_bytes(head[:8], "little") for path, head in heads.items()}
    most = {path: min(size, _MAX_HEAD_BYTES) for path, size in sizes.items()}
    longer = {path: length for path, length in lengths.items() if len(heads[path]) < length <= most[path]}
    heads |= _read_heads(reader, longer)
    origins: dict[str, int] = {}
    steps: dict[str, tuple[int, int]] = {}
    for path, head in heads.items():
        try:
            header, start = json.loads(head[8 : lengths[path]]), lengths[path]
            first, last = (start + int(offset) for offset in header["steps"]["data_offsets"])
            origin = start + int(header["rows"]["data_offsets"][0])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # damaged: whoever opens the copy says so
        if start <= first < last <= sizes[path]:
            origins[path], steps[path] = origin, (first, last)
    behind = {path: places for path, places in steps.items() if places[1] > len(heads[path])}
    pieces = reader.read([(path, first, last) for path, (first, last) in behind.items()])
    values = {path: heads[path][first:last] for path, (first, last) in steps.items()}
    values |= dict(zip(behind, pieces, strict=True))
    for path, size in sizes.items():
        with open(_local_path(path, reader.root, folder), "wb") as file:
            file.truncate(size)
            file.write(heads[path][: lengths[path]])
            if path in steps:
                file.seek(steps[path][0])
                file.write(values[path])
    return origins


def _read_heads(reader: RangeReader, lengths: Mapping[str, int]) -> dict[str, bytes]:
    """The first bytes of objects."""
    asked = [(path, 0, length) for path, length in lengths.items() if length]
    return dict.fromkeys(lengths, b"") | dict(zip((path for path, _, _ in asked), reader.read(asked), strict=True))


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
