"""Trajectories of many stores in one.

On one disk their files are linked, which takes neither room nor time: no file of a store is ever changed, only replaced
as a whole or deleted, so that whatever becomes of the one name, the other keeps what it has. From elsewhere they are
copied. A trajectory is put together in a temporary folder of the store, which readers do not look into, and appears by
one rename.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from pdiff_plugin.errors import (
    ConditionError,
    ConfigError,
    FormatError,
    FormatVersionError,
    LayoutMismatchError,
    StoresDifferError,
    UnmergeableStoreError,
)
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.base import BASE_NAME, read_base_header
from pdiff_plugin.snapshots.conditions import FILE_NAME as CONDITION_NAME
from pdiff_plugin.snapshots.conditions import Condition, check_same_kind, read_condition
from pdiff_plugin.snapshots.content import Content, is_within, read_content
from pdiff_plugin.snapshots.layout import LAYOUT_NAME, Layout, read_layout
from pdiff_plugin.snapshots.merge_folder import carry, owned, temporary_folder
from pdiff_plugin.snapshots.origin import Origin, read_origin, write_origin
from pdiff_plugin.snapshots.ownership import recorder_of
from pdiff_plugin.snapshots.remote import copy_whole_store, is_remote, list_trajectories
from pdiff_plugin.snapshots.shards import World, layout_files
from pdiff_plugin.snapshots.sources import Source, as_id, find_sources
from pdiff_plugin.snapshots.trajectory import create_layout


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_stores` did.

    Attributes:
        path: the store.
        num_stores: stores that were read.
        added: trajectory of the store -> the one that it is of, as STORE/trajectories/ID.
        extended: the same for trajectories that were there in part: a run that went on since. They keep their names and
            conditions.
        num_snapshots: rows of both.
        linked_bytes: size of the files that were linked, and so take no room.
        copied_bytes: size of those that were copied.
        duplicates: a trajectory that was there already, or more of it, as STORE/trajectories/ID -> that of the store.
        left_out: a sentence for everything else that was not taken.
    """

    path: Path
    num_stores: int = 0
    added: dict[str, str] = field(default_factory=dict)
    extended: dict[str, str] = field(default_factory=dict)
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
    and never changed. A trajectory that is being recorded is left out: the same call takes it once it has ended. What
    is there already is left out, too, and told by its snapshots, whatever it is called; of a run that went on since,
    the whole replaces the part.

    Args:
        sources: folders of stores, glob patterns that match some, and URLs of stores in a bucket.
        out: folder of the merged store, made if missing; what it holds already stays.
        on_progress: told after every store.

    Returns:
        What was added and what was not. Trajectories keep their names where these are free.

    Raises:
        ConfigError: there is no source but ``out`` itself, or that is in a bucket.
        StoreNotFoundError: one of the sources is none, or a pattern matches none.
        StoresDifferError: two of them hold other tensors.
        UnmergeableStoreError: rows of another dtype, or parts that the ranks of a sharded model wrote.
        ConditionError: runs of two of them have other conditions.
        FolderInUseError: another merge into ``out`` is going on.
    """
    if is_remote(out):
        raise ConfigError("out", str(out), "must be a folder on disk; copy it to the bucket when it is whole")
    out = Path(out)
    found = find_sources([sources] if isinstance(sources, str | os.PathLike) else sources, out)
    if not found:
        raise ConfigError("sources", [str(out)], "must name a store other than the one to merge into")
    with owned(out) as check_ours:
        merge = _Merge(out, check_ours)
        local = {}
        for number, source in enumerate(found, start=1):
            if not source.is_remote:
                local[source] = merge.read(Path(source.path), source)
            _tell(on_progress, "read stores", number, len(found), source.path)
        for number, source in enumerate(found, start=1):
            if source.is_remote:
                with merge.downloaded(source) as runs:
                    merge.add(runs, source)
            else:
                merge.add(local[source], source)
            _tell(on_progress, "merge stores", number, len(found), source.path)
    return merge.report()


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


@dataclass(frozen=True)
class _Run:
    """A trajectory of a store."""

    where: str  # for people
    name: str
    folder: Path
    content: Content
    condition: Condition | None
    has_base: bool
    recorder: str | None = None  # who was recording it when it was read
    origin: Origin | None = None  # of one in a bucket, or that was copied from there


class _Merge:
    """A merge into ``out``: what it has read, and what it has done."""

    def __init__(self, out: Path, check_ours: Callable[[], None] = lambda: None) -> None:
        self.out, self._check_ours = out, check_ours
        self.totals: Counter[str] = Counter()
        self.added: dict[str, str] = {}
        self.extended: dict[str, str] = {}
        self.duplicates: dict[str, str] = {}
        self.left_out: list[str] = []
        self._kind: tuple[Layout, torch.dtype, str] | None = None  # of all stores, and the first that has it
        self._condition: tuple[Condition, str] | None = None  # that all must be like, and whose it is
        self._runs: dict[str, _Run] = {}  # in the store, by name
        self._origins: dict[Origin, str] = {}  # of those in the store
        self._names: dict[tuple[int, bytes], list[str]] = {}  # step and digest of a row -> of those that have it
        for run in self._read(out, str(out)) if layout_files(out) else []:
            self._keep(run)

    def report(self) -> MergeReport:
        return MergeReport(
            self.out,
            added=self.added,
            extended=self.extended,
            duplicates=self.duplicates,
            left_out=self.left_out,
            **self.totals,
        )

    def read(self, folder: Path, source: Source) -> list[_Run]:
        """The trajectories of a store, at ``folder``, that is not the one merged into."""
        self.totals["num_stores"] += 1
        return self._read(folder, source.path)

    @contextmanager
    def downloaded(self, source: Source) -> Iterator[list[_Run]]:
        """The trajectories of a store in a bucket, copied for as long as this lasts, without those known."""
        found = list_trajectories(source.path)
        origins = {name: Origin.of(f"{source.path}/trajectories/{name}", files) for name, files in found.items()}
        known = {name: self._origins[origin] for name, origin in origins.items() if origin in self._origins}
        for name, there in known.items():
            self.duplicates[origins[name].where] = there
        with temporary_folder(self.out) as folder:
            copy_whole_store(source.path, folder, origins.keys() - known.keys())
            runs = self.read(folder, source)
            yield [replace(run, origin=origins.get(run.name)) for run in runs if run.name not in known]

    def _read(self, folder: Path, where: str) -> list[_Run]:
        if layout_files(folder) != [folder / LAYOUT_NAME]:
            reason = "the ranks of a sharded model wrote it, each a part of every row"
            raise UnmergeableStoreError(where, reason, "Fit it on its own (`pdiff fit STORE`), and leave it out here")
        layout, row_dtype = read_layout(folder)
        self._check_kind(layout, row_dtype, where)
        runs = []
        for name in World([folder]).trajectories:
            path, shown = folder / "trajectories" / name, f"{where}/trajectories/{name}"
            recorder = recorder_of(path)  # before its files: once it has ended, they are all there
            content, problems = read_content(path, layout, row_dtype)
            condition = self._read_condition(path, shown, problems)
            has_base = _has_base(path, shown, problems)
            runs.append(_Run(shown, name, path, content, condition, has_base, recorder, read_origin(path)))
            if folder != self.out:
                self.left_out += problems
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
        except (FormatError, FormatVersionError, ConditionError) as error:
            problems.append(f"{error} The condition of {where} is left out.")
            return None
        if condition is not None:
            self._condition = self._condition or (condition, where)
            check_same_kind(condition, where, *self._condition)
        return condition

    def _keep(self, run: _Run) -> None:
        self._runs[run.name] = run
        if run.origin is not None:
            self._origins[run.origin] = run.name
        for row in run.content.digests.items():
            self._names.setdefault(row, []).append(run.name)

    def add(self, runs: Sequence[_Run], source: Source) -> None:
        """Add those trajectories of a source that are to be added."""
        for run in runs:
            try:
                self._take(run, source)
            except FileNotFoundError:
                self.left_out.append(f"{run.where} has changed meanwhile: run the same command again")

    def _take(self, run: _Run, source: Source) -> None:
        if run.recorder is not None:
            self.left_out.append(
                f"{run.where} is being recorded by {run.recorder}: run the same command again when that has ended"
            )
            return
        if not len(run.content):
            self.left_out.append(f"{run.where} holds no snapshots")
            return
        twin = self._twin(run)
        if twin is not None and len(twin.content) >= len(run.content):
            self.duplicates[run.where] = twin.name
            self._tell_of_condition(run, twin)
        elif twin is not None and (writer := recorder_of(self._folder_of(twin.name))) is not None:
            self.left_out.append(f"{run.where} goes on after {twin.name}, into which {writer} is recording")
        else:
            self._add(run, source, twin)

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

    def _tell_of_condition(self, run: _Run, twin: _Run) -> None:
        if run.condition is not None and run.condition != twin.condition:
            self.left_out.append(
                f"{run.where} is there as {twin.name}, at another condition, which stays: `pdiff condition {self.out} "
                f"--set {twin.name} NAME=VALUE ...` changes it"
            )

    def _folder_of(self, name: str) -> Path:
        return self.out / "trajectories" / name

    def _add(self, run: _Run, source: Source, part: _Run | None) -> None:
        """Add a trajectory, in place of ``part`` if it goes on after that."""
        assert self._kind is not None
        create_layout(self.out, *self._kind[:2])
        condition_of = run if part is None else part
        extra = [run.folder / BASE_NAME] if run.has_base else []
        extra += [condition_of.folder / CONDITION_NAME] if condition_of.condition is not None else []
        sizes: Counter[str] = Counter()
        with temporary_folder(self.out) as temp:
            for file in (*run.content.files, *extra):
                is_linked = carry(file, temp / file.name) and not source.is_remote
                sizes["linked_bytes" if is_linked else "copied_bytes"] += (temp / file.name).stat().st_size
            if run.origin is not None and source.is_remote:
                write_origin(temp, run.origin)
            name = self._appear(temp, run.name, source.label) if part is None else self._replace(part.name, temp)
        self.totals.update(sizes, num_snapshots=len(run.content))
        if part is None:
            self.added[name] = run.where
        else:
            self.extended[name] = run.where
            self._tell_of_condition(run, part)
        folder = self._folder_of(name)
        content = replace(
            run.content,
            files=tuple(folder / path.name for path in run.content.files),
            places={step: (folder / path.name, row) for step, (path, row) in run.content.places.items()},
        )
        origin = run.origin if source.is_remote else None
        self._keep(_Run(str(folder), name, folder, content, condition_of.condition, run.has_base, origin=origin))

    def _replace(self, name: str, temp: Path) -> str:
        """Put a folder in the place of a trajectory, whose snapshots it has. Killed between, the next merge adds it."""
        with temporary_folder(self.out) as old:
            self._check_ours()
            os.rename(self._folder_of(name), old / name)
            try:
                os.rename(temp, self._folder_of(name))
            except OSError:
                os.rename(old / name, self._folder_of(name))
                raise
        return name

    def _appear(self, temp: Path, name: str, label: str) -> str:
        """Rename a folder to the trajectory that it is to be; returns its name."""
        (self.out / "trajectories").mkdir(exist_ok=True)
        wanted = as_id(name)
        for free in chain([wanted, f"{label}-{wanted}"], (f"{label}-{wanted}-{number}" for number in count(2))):
            if os.path.lexists(self._folder_of(free)):
                continue
            self._check_ours()
            try:
                os.rename(temp, self._folder_of(free))
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                continue  # a training that has just begun was first
            return free
        raise AssertionError("there are endless names")


def _has_base(folder: Path, where: str, problems: list[str]) -> bool:
    """Whether a trajectory has a whole model that can be read; a sentence where it has another."""
    try:
        return bool(read_base_header(folder))
    except (FormatError, FormatVersionError) as error:
        problems.append(f"{error} The whole model of {where} is left out.")
        return False
