"""The snapshot store: a folder that training runs append to and that a fit reads.

    STORE/layout.json                                  names, shapes, dtypes, kinds; written once by the first writer
    STORE/trajectories/<id>/chunk-000001.safetensors   see chunks.py
    STORE/trajectories/<id>/sparse-000001.safetensors  see chunks.py (of a run that did not get to its window)
    STORE/trajectories/<id>/base.safetensors           see base.py (optional)
    STORE/trajectories/<id>/condition.json             see conditions.py (optional)
    STORE/shards/                                      parts that the ranks of a sharded model wrote, see shards.py

Every file appears by an atomic rename; names that do not match are ignored. Nothing is pickled.

Shapes: N snapshots in the store, D values in a row.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.errors import FormatError, FormatVersionError, StoreNotFoundError
from pdiff_plugin.snapshots.chunks import Chunk, PlannedWindow
from pdiff_plugin.snapshots.conditions import read_conditions
from pdiff_plugin.snapshots.shards import JoinedChunk, World, read_trajectory, read_worlds

logger = logging.getLogger(__name__)


class SnapshotStore:
    """Read access to a store as it was when opened.

    ``len(store)`` is N. Rows are ordered by trajectory, then by step.

    Attributes:
        path: the folder.
        layout: the tensors of a row.
        row_dtype: dtype of the rows on disk.
        trajectories: ids, in the order of the rows.
        conditions: trajectory -> names -> values of the setting that it was recorded at, of those that have one.
        sparse: trajectory -> its planned window, of those that have rows from before it.
        stopped_early: trajectory -> the step that its last row was planned for, of those whose newest is from before
            (also of those that are left out): training was stopped, or is not over.
        left_out: one sentence per trajectory that has nothing else, while others have rows of their windows: what
            lies far from the end of a training is to stand in for these rows, not beside them.
        problems: one sentence per file that could not be read; what it holds is left out.
    """

    def __init__(self, path: Path, worlds: Sequence[World], problems: Sequence[str] = ()) -> None:
        self.path, self.layout, self._worlds = path, worlds[0].layout, worlds
        self.row_dtype: torch.dtype = reduce(torch.promote_types, (world.row_dtype for world in worlds))
        self.problems: list[str] = list(problems)
        self.trajectories: list[str] = []
        self._chunks: list[tuple[int, Chunk | JoinedChunk]] = []
        self._base_headers: dict[str, dict[str, str]] = {}
        self.sparse: dict[str, PlannedWindow] = {}
        self.stopped_early: dict[str, int] = {}
        self.left_out: list[str] = []
        for name, chunks in self._read_trajectories().items():
            if chunks:
                self._chunks += [(len(self.trajectories), chunk) for chunk in chunks]
                self.trajectories.append(name)
                planned = chunks[-1].planned_last_step
                if planned is not None and max(chunks[-1].steps, default=0) < planned:
                    self.stopped_early[name] = planned
            try:
                self._base_headers[name] = self._find_base(name)[1]
            except (FormatError, FormatVersionError) as error:
                self.problems.append(f"{error} The whole model of {name} is left out.")
        conditions, problems = read_conditions(path)
        self.conditions = {name: conditions[name] for name in self.trajectories if name in conditions}
        self.problems += problems
        for problem in self.problems:
            logger.warning(problem)
        for sentence in self.left_out:
            logger.info(sentence)

    def _read_trajectories(self) -> dict[str, Sequence[Chunk | JoinedChunk]]:
        """The chunks of every trajectory, by name. Rows from before a window count while no run has got to its own."""
        found: dict[str, Sequence[Chunk | JoinedChunk]] = {}
        short: dict[str, PlannedWindow] = {}
        for name in sorted({name for world in self._worlds for name in world.trajectories}):
            found[name], problems = read_trajectory(self._worlds, name)
            self.problems += problems
            try:
                window = next(filter(None, (world.planned_window(name) for world in self._worlds)), None)
            except (FormatError, FormatVersionError) as error:
                self.problems.append(f"{error} What was recorded of {name} before its window is left out.")
            else:
                if window is not None and sum(map(len, found[name])) < window.num_enough:
                    short[name] = window
        are_alone = not any(found[name] for name in found.keys() - short.keys())
        for name, window in short.items():
            chunks, problems = read_trajectory(self._worlds, name, with_sparse=True)
            if chunks:
                self.stopped_early[name] = window.total_steps
            if are_alone:
                self.problems += [problem for problem in problems if problem not in self.problems]
                found[name], self.sparse[name] = chunks, window
            elif chunks:
                num_sparse = sum(map(len, chunks)) - sum(map(len, found[name]))
                self.left_out.append(
                    f"{name} has snapshots up to step {chunks[-1].steps[-1]} of {window.total_steps}, and its window "
                    f"begins at step {window.first_step}: its {num_sparse} sparse snapshots from before that are left "
                    "out, since other runs have those of their windows"
                )
        return found

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SnapshotStore:
        """Open an existing store for reading. Nothing is written.

        Raises:
            StoreNotFoundError: no such folder, or one without ``layout.json`` and shards.
            FormatError: its layout cannot be read, or a rank's snapshots are missing, and nothing else is there.
            FormatVersionError: written by a newer release.
        """
        path = Path(path)
        if not path.is_dir():
            raise StoreNotFoundError(str(path), "it is a file" if path.exists() else "there is no such folder")
        worlds, problems = read_worlds(path)
        if not worlds:
            raise StoreNotFoundError(str(path), "it has no layout.json")
        return cls(path, worlds, problems)

    def only(self, trajectories: Sequence[str]) -> SnapshotStore:
        """The same store as if it held these trajectories alone, in its own order.

        Raises:
            KeyError: it has none of such a name.
        """
        for name in trajectories:
            if name not in self.trajectories:
                raise KeyError(name)
        kept = [name for name in self.trajectories if name in set(trajectories)]
        places = {self.trajectories.index(name): number for number, name in enumerate(kept)}
        part = object.__new__(type(self))  # copy.copy would open the files again, as unpickling does
        part.__dict__ |= self.__dict__
        for name in ("steps", "trajectory_index", "_chunk_starts", "epochs", "metrics"):
            part.__dict__.pop(name, None)  # computed from the chunks when asked for
        part.trajectories = kept
        part._chunks = [(places[number], chunk) for number, chunk in self._chunks if number in places]
        part._base_headers = {name: header for name, header in self._base_headers.items() if name in kept}
        part.conditions = {name: condition for name, condition in self.conditions.items() if name in kept}
        part.sparse = {name: window for name, window in self.sparse.items() if name in kept}
        part.stopped_early = {name: planned for name, planned in self.stopped_early.items() if name in kept}
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the same files: no snapshot is pickled."""
        return _opened_again, (self.path.absolute(), self.trajectories, len(self))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return (
            f"SnapshotStore({str(self.path)!r}, {len(self)} snapshots of {self.layout.num_values} values, "
            f"{len(self.trajectories)} trajectories)"
        )

    @cached_property
    def steps(self) -> Tensor:
        """Optimizer step of each snapshot, (N,) int64."""
        return torch.tensor([s for _, chunk in self._chunks for s in chunk.steps], dtype=torch.int64)

    @cached_property
    def trajectory_index(self) -> Tensor:
        """Place in ``trajectories`` of each snapshot's run, (N,) int64."""
        return torch.tensor([t for t, chunk in self._chunks for _ in chunk.steps], dtype=torch.int64)

    @cached_property
    def _chunk_starts(self) -> Tensor:
        """Place of the first row of each chunk, and N."""
        return torch.tensor([0, *(len(chunk) for _, chunk in self._chunks)]).cumsum(0)

    @cached_property
    def epochs(self) -> list[float | None]:
        """Epoch of each snapshot, as far as its trainer knew."""
        return [e for _, chunk in self._chunks for e in chunk.epochs]

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Metrics that the trainer had logged at each snapshot."""
        return [m for _, chunk in self._chunks for m in chunk.metrics]

    def rows(self, lo: int = 0, hi: int | None = None, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """Columns [lo, hi) of all snapshots, or of those at ``indices``.

        Args:
            lo: first column.
            hi: column after the last; D unless given.
            indices: snapshots to read, in the order wanted, or a mask (N,) of them; all unless given. Negative ones
                count from the end.

        Returns:
            (N or len(indices), hi - lo), float32 (float64 if the rows are). Only this much is read and held.

        Raises:
            IndexError: a snapshot or a column that the store does not have.
        """
        hi = self.layout.num_values if hi is None else hi
        if not 0 <= lo <= hi <= self.layout.num_values:
            raise IndexError(f"columns {lo} to {hi} of a store whose rows have {self.layout.num_values}")
        dtype = torch.float64 if self.row_dtype == torch.float64 else torch.float32
        wanted = self._numbers(indices)
        out = torch.empty(len(wanted), hi - lo, dtype=dtype)
        self._read(out, lo, hi, wanted)
        return out

    def _read(self, out: Tensor, lo: int, hi: int, wanted: Tensor) -> None:
        """Fill ``out`` (m, hi - lo) with columns [lo, hi) of the snapshots ``wanted`` (m,)."""
        for chunk, places, own in self._pieces(wanted):
            is_whole = isinstance(places, slice) and len(own) == len(chunk)
            values = chunk.columns(lo, hi, None if is_whole else own)
            out[places] = values if isinstance(places, slice) else values.to(out.dtype)

    def _numbers(self, indices: Sequence[int] | Tensor | None) -> Tensor:
        """``indices`` as int64 from 0 to N - 1, as :meth:`_pieces` takes them."""
        if indices is None:
            return torch.arange(len(self))
        numbers = torch.as_tensor(indices)
        if numbers.dtype == torch.bool:
            if numbers.shape != (len(self),):
                raise IndexError(f"a mask of shape {tuple(numbers.shape)} for a store that holds {len(self)}")
            return numbers.nonzero().squeeze(1)
        numbers = numbers.to(torch.int64)
        outside = numbers[(numbers < -len(self)) | (numbers >= len(self))]
        if len(outside):
            raise IndexError(f"snapshot {int(outside[0])} of a store that holds {len(self)}")
        return torch.where(numbers < 0, numbers + len(self), numbers)

    def _pieces(self, wanted: Tensor) -> Iterator[tuple[Chunk | JoinedChunk, Tensor | slice, Tensor]]:
        """Each chunk that holds some of the snapshots ``wanted`` (m,), where they are among these, and its rows.

        Places are a slice where ``wanted`` rises throughout.
        """
        # A snapshot of a large model is a chunk of its own: what is done for each of them counts.
        ordered, order = wanted.sort()
        are_rising = torch.equal(order, torch.arange(len(wanted))) and bool((ordered.diff() > 0).all())
        starts = self._chunk_starts
        borders = torch.searchsorted(ordered, starts).tolist()
        for (_, chunk), start, first, last in zip(self._chunks, starts.tolist(), borders, borders[1:], strict=False):
            if last > first:
                places = slice(first, last) if are_rising else order[first:last]
                yield chunk, places, ordered[first:last] - start

    def gather(self, columns: Tensor, indices: Tensor) -> Tensor:
        """Values at any ``columns`` (c,) of the snapshots at ``indices`` (m,), both int64 and in the order wanted.

        Returns:
            (m, c), in the dtype of :meth:`rows`. They are picked from the memory maps: only this much is held.
        """
        wanted = self._numbers(indices)
        out = torch.empty(len(wanted), len(columns), dtype=self.rows(0, 0).dtype)
        self._pick(out, columns, wanted)
        return out

    def _pick(self, out: Tensor, columns: Tensor, wanted: Tensor) -> None:
        """Fill ``out`` (m, c) with ``columns`` (c,) of the snapshots ``wanted`` (m,)."""
        for chunk, places, own in self._pieces(wanted):
            out[places] = chunk.gather(columns, own).to(out.dtype)

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Snapshot ``index`` as name -> tensor (*shape), in the dtypes of the recorded model."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"snapshot {index} of a store that holds {len(self)}")
        return self.layout.unflatten(self.rows(indices=[index % len(self)])[0])

    def base(self, trajectory: str | None = None) -> dict[str, Tensor] | None:
        """The whole model at the end of a trajectory's window (the last one's unless named), or None.

        Raises:
            FormatError: it cannot be read.
            FormatVersionError: written by a newer release.
        """
        for name in [trajectory] if trajectory else reversed(self.trajectories):
            world, _ = self._find_base(name)
            if world is not None:
                return world.base(name)
        return None

    def base_header(self, trajectory: str) -> dict[str, str]:
        """What a trajectory's base file says of itself (``rest_drift`` among it), empty without a readable one."""
        return self._base_headers.get(trajectory, {})

    def _find_base(self, trajectory: str) -> tuple[World | None, dict[str, str]]:
        """Whose base counts, and its header: the latest of shards, else what was recorded whole."""
        found = [(world, header) for world in self._worlds if (header := world.base_header(trajectory))]
        return max(found, key=lambda one: (one[0].is_sharded, int(one[1].get("step", 0))), default=(None, {}))


def _opened_again(path: Path, trajectories: list[str], num_rows: int) -> SnapshotStore:
    """The store of a pickle.

    Raises:
        StoreNotFoundError: it is not there.
        FormatError: it does not hold what it did.
    """
    store = SnapshotStore.open(path)
    if trajectories != store.trajectories and set(trajectories) <= set(store.trajectories):
        store = store.only(trajectories)
    if store.trajectories != trajectories or len(store) != num_rows:
        found = f"{len(store)} snapshots of {len(store.trajectories)} trajectories"
        expected = f"{num_rows} of {len(trajectories)}, as when it was opened"
        raise FormatError(str(path), found, expected, "Is it being recorded into? Begin again when that is done.")
    return store
