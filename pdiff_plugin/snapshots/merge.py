"""Trajectories of many stores in one.

On one disk their files are linked, which takes neither room nor time: no file of a store is ever changed, only replaced
as a whole or deleted, so that whatever becomes of the one name, the other keeps what it has. From elsewhere they are
copied. A trajectory is put together in a temporary folder of the store, which readers do not look into, and appears by
one rename.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from pdiff_plugin.errors import (
    ConditionError,
    ConfigError,
    FolderInUseError,
    FormatError,
    LayoutMismatchError,
    StoresDifferError,
    TrajectoryInUseError,
    UnmergeableStoreError,
)
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.base import BASE_NAME
from pdiff_plugin.snapshots.conditions import FILE_NAME as CONDITION_NAME
from pdiff_plugin.snapshots.conditions import Condition, check_same_kind, read_condition
from pdiff_plugin.snapshots.content import Content, is_within, read_content
from pdiff_plugin.snapshots.files import TEMP_MARK, storage_error, temporary
from pdiff_plugin.snapshots.fingerprint import watched_columns
from pdiff_plugin.snapshots.layout import LAYOUT_NAME, Layout, read_layout
from pdiff_plugin.snapshots.ownership import BEAT_S, Ownership, recorder_of
from pdiff_plugin.snapshots.remote import copy_whole_store
from pdiff_plugin.snapshots.shards import World, layout_files
from pdiff_plugin.snapshots.sources import Source, as_id, find_sources
from pdiff_plugin.snapshots.trajectory import create_layout

logger = logging.getLogger(__name__)

_TEMP_NAME = "merge"


@dataclass
class MergeReport:
    """What :func:`merge_stores` did.

    Attributes:
        path: the store.
        num_stores: stores that were read.
        added: trajectory of the store -> the one that it is of, as STORE/trajectories/ID.
        num_snapshots: rows of what was added.
        linked_bytes: size of the files that were linked, and so take no room.
        copied_bytes: size of those that were copied.
        duplicates: a trajectory that was there already, as STORE/trajectories/ID -> trajectory of the store.
        left_out: a sentence for everything else that was not taken.
    """

    path: Path
    num_stores: int = 0
    added: dict[str, str] = field(default_factory=dict)
    num_snapshots: int = 0
    linked_bytes: int = 0
    copied_bytes: int = 0
    duplicates: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "path": str(self.path)}


def merge_stores(
    sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Put the trajectories of several stores into one, with their conditions and whole models.

    Killed at any moment it leaves whole trajectories alone, and the same call goes on from there. The sources are read,
    and never changed. A trajectory that is being recorded is left out: the same call takes it once it has ended.

    Args:
        sources: folders of stores, glob patterns that match some, and URLs of stores in a bucket.
        out: folder of the merged store, made if missing; what it holds already stays.
        on_progress: told after every trajectory.

    Returns:
        What was added and what was not. Trajectories keep their names where these are free.

    Raises:
        ConfigError: there is no source but ``out`` itself.
        StoreNotFoundError: one of the sources is none, or a pattern matches none.
        StoresDifferError: two of them hold other tensors.
        UnmergeableStoreError: rows of another dtype, or parts that the ranks of a sharded model wrote.
        ConditionError: runs of two of them have other conditions.
        FolderInUseError: another merge into ``out`` is going on.
    """
    out = Path(out)
    found = find_sources([sources] if isinstance(sources, str | os.PathLike) else sources, out)
    if not found:
        raise ConfigError("sources", [str(out)], "must name a store other than the one to merge into")
    with _owned(out) as ownership:
        merge = _Merge(out, ownership.check)
        local = {}
        for number, source in enumerate(found, start=1):
            if not source.is_remote:
                local[source] = merge.read(Path(source.path), source)
            _tell(on_progress, "read stores", number, len(found), source.path)
        for number, source in enumerate(found, start=1):
            if source.is_remote:
                with _downloaded(source, out) as folder:
                    merge.add(merge.read(folder, source), source)
            else:
                merge.add(local[source], source)
            _tell(on_progress, "merge stores", number, len(found), source.path)
    return merge.report


def is_merge_of(out: Path, sources: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether a store holds all trajectories of these stores as they are at present, and no others.

    Those that are being recorded, or that hold nothing, do not count. Errors are those of :func:`merge_stores`.
    """
    if not layout_files(out):
        return False
    merge = _Merge(out)
    return merge.is_of([run for one in find_sources(sources, out) for run in merge.read(Path(one.path), one)])


def _tell(on_progress: OnProgress | None, stage: str, step: int, total: int, text: str) -> None:
    if on_progress is not None:
        on_progress(Progress(stage, step, total, text=text))


@contextmanager
def _owned(out: Path) -> Iterator[Ownership]:
    """The right to merge into ``out``."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        ownership = Ownership(out)
    except TrajectoryInUseError as error:
        raise FolderInUseError(str(out), error.writer) from error
    for path in out.glob(f"{TEMP_MARK}*-{_TEMP_NAME}"):
        shutil.rmtree(path)  # another merge's, which was killed
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S / 10):
            ownership.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield ownership
    finally:
        stop.set()
        thread.join()
        ownership.release()
        if is_new and not any(out.iterdir()):  # nothing came of it
            out.rmdir()


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
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


@contextmanager
def _downloaded(source: Source, out: Path) -> Iterator[Path]:
    with _temporary_folder(out) as folder:
        yield copy_whole_store(source.path, folder)


@dataclass(frozen=True)
class _Run:
    """A trajectory of a source."""

    where: str  # for people
    name: str
    folder: Path
    content: Content
    condition: Condition | None
    recorder: str | None  # who was recording it when it was read


class _Merge:
    """A merge into ``out``: what it has read, and what it has done."""

    def __init__(self, out: Path, check_ours: Callable[[], None] = lambda: None) -> None:
        self.out, self.report, self._check_ours = out, MergeReport(out), check_ours
        self._kind: tuple[Layout, torch.dtype, str] | None = None  # of all stores, and the first that has it
        self._condition: tuple[Condition, str] | None = None  # that all must be like, and whose it is
        self._runs: dict[str, _Run] = {}  # in the store, by name
        self._names: dict[tuple[int, bytes], list[str]] = {}  # step and digest of a row -> of those that have it
        for run in self._read(out, str(out)) if layout_files(out) else []:
            self._keep(run)

    def read(self, folder: Path, source: Source) -> list[_Run]:
        """The trajectories of a store, at ``folder``, that is not the one merged into."""
        self.report.num_stores += 1
        return self._read(folder, source.path)

    def _read(self, folder: Path, where: str) -> list[_Run]:
        if layout_files(folder) != [folder / LAYOUT_NAME]:
            reason = "the ranks of a sharded model wrote it, each a part of every row"
            raise UnmergeableStoreError(where, reason, "Fit it on its own (`pdiff fit STORE`), and leave it out here")
        layout, row_dtype = read_layout(folder)
        self._check_kind(layout, row_dtype, where)
        columns = watched_columns(layout)
        runs = []
        for name in World([folder]).trajectories:
            path, shown = folder / "trajectories" / name, f"{where}/trajectories/{name}"
            recorder = recorder_of(path)  # before its files: once it has ended, they are all there
            content, problems = read_content(path, layout, row_dtype, columns)
            condition = self._read_condition(path, shown, problems)
            runs.append(_Run(shown, name, path, content, condition, recorder))
            if folder != self.out:
                self.report.left_out += problems
        return runs

    def _check_kind(self, layout: Layout, row_dtype: torch.dtype, where: str) -> None:
        if self._kind is None:
            self._kind = layout, row_dtype, where
        first, dtype, other = self._kind
        try:
            first.check_same(layout)
        except LayoutMismatchError as error:
            raise StoresDifferError(error.name, error.expected, error.found, other, where) from error
        if row_dtype != dtype:
            raise UnmergeableStoreError(
                where,
                f"its rows are {row_dtype}, and those of {other} are {dtype}",
                "Merge stores of one dtype, each kind into a store of its own",
            )

    def _read_condition(self, folder: Path, where: str, problems: list[str]) -> Condition | None:
        try:
            condition = read_condition(folder)
        except (FormatError, ConditionError) as error:
            problems.append(f"{error} The condition of {where} is left out.")
            return None
        if condition is not None:
            self._condition = self._condition or (condition, where)
            check_same_kind(condition, where, *self._condition)
        return condition

    def _keep(self, run: _Run) -> None:
        self._runs[run.name] = run
        for row in run.content.digests.items():
            self._names.setdefault(row, []).append(run.name)

    def add(self, runs: Sequence[_Run], source: Source) -> None:
        """Add those trajectories of a source that are to be added."""
        for run in runs:
            if run.recorder is not None:
                self.report.left_out.append(
                    f"{run.where} is being recorded by {run.recorder}: run the same command again when that has ended"
                )
            elif not len(run.content):
                self.report.left_out.append(f"{run.where} holds no snapshots")
            elif (twin := self._twin(run)) is not None:
                self._leave_out(run, twin)
            else:
                try:
                    self._add(run, source)
                except FileNotFoundError:
                    self.report.left_out.append(f"{run.where} has changed meanwhile: run the same command again")

    def is_of(self, runs: Sequence[_Run]) -> bool:
        """Whether the store holds those of ``runs`` that :meth:`add` would take, and no others."""
        found = set()
        for run in runs:
            if run.recorder is None and len(run.content):
                twin = self._twin(run)
                if twin is None or len(twin.content) < len(run.content):
                    return False
                found.add(twin.name)
        return found == self._runs.keys()

    def _twin(self, run: _Run) -> _Run | None:
        """The trajectory of the store that holds all of ``run``, or else one that ``run`` holds all of."""
        assert self._kind is not None
        layout, row_dtype, _ = self._kind
        names = {name for row in run.content.digests.items() for name in self._names.get(row, ())}
        alike = [self._runs[name] for name in sorted(names)]
        for one in alike:
            if is_within(run.content, one.content, layout, row_dtype):
                return one
        return next((one for one in alike if is_within(one.content, run.content, layout, row_dtype)), None)

    def _leave_out(self, run: _Run, twin: _Run) -> None:
        folder = self.out / "trajectories" / twin.name
        if len(run.content) > len(twin.content):
            self.report.left_out.append(
                f"{run.where} has {len(run.content)} snapshots, {len(twin.content)} of which are there as {twin.name}: "
                f"remove {folder} and run the same command again to have them all"
            )
            return
        self.report.duplicates[run.where] = twin.name
        if run.condition is not None and run.condition != twin.condition:
            self.report.left_out.append(
                f"{run.where} is there as {twin.name}, at another condition, which stays: `pdiff condition {self.out} "
                f"--set {twin.name} NAME=VALUE ...` changes it"
            )

    def _add(self, run: _Run, source: Source) -> None:
        assert self._kind is not None
        create_layout(self.out, *self._kind[:2])
        extra = [BASE_NAME] if (run.folder / BASE_NAME).is_file() else []
        extra += [CONDITION_NAME] if run.condition is not None else []
        with _temporary_folder(self.out) as temp:
            linked = copied = 0
            for file in (*run.content.files, *(run.folder / name for name in extra)):
                is_linked = _carry(file, temp / file.name) and not source.is_remote
                size = (temp / file.name).stat().st_size
                linked, copied = (linked + size, copied) if is_linked else (linked, copied + size)
            name = self._appear(temp, run.name, source.label)
        folder = self.out / "trajectories" / name
        places = {step: (folder / path.name, row) for step, (path, row) in run.content.places.items()}
        files = tuple(folder / path.name for path in run.content.files)
        self._keep(_Run(str(folder), name, folder, Content(files, run.content.digests, places), run.condition, None))
        self.report.added[name] = run.where
        self.report.num_snapshots += len(run.content)
        self.report.linked_bytes += linked
        self.report.copied_bytes += copied

    def _appear(self, temp: Path, name: str, label: str) -> str:
        """Rename a folder to the trajectory that it is to be; returns its name."""
        parent = self.out / "trajectories"
        parent.mkdir(exist_ok=True)
        wanted = as_id(name)
        for free in chain([wanted, f"{label}-{wanted}"], (f"{label}-{wanted}-{number}" for number in count(2))):
            if os.path.lexists(parent / free):
                continue
            self._check_ours()
            try:
                os.rename(temp, parent / free)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                continue  # a training that has just begun was first
            return free
        raise AssertionError("there are endless names")


def _carry(file: Path, target: Path) -> bool:
    """Link a file, or copy it where that cannot be: whether it was linked."""
    with suppress(OSError):  # another disk, one without links, or somebody else's file
        os.link(file.resolve(), target)  # os.link makes links to symbolic links, too
        return True
    shutil.copyfile(file, target)
    with open(target, "rb+") as copy:
        os.fsync(copy.fileno())
    return False
