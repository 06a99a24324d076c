"""The snapshot store: a folder that training runs append to and that a fit reads.

    STORE/layout.json                                  names, shapes, dtypes, kinds; written once by the first writer
    STORE/trajectories/<id>/chunk-000001.safetensors   see chunks.py
    STORE/trajectories/<id>/base.safetensors           the whole model at the end of the recording window (optional)
    STORE/shards/                                      parts that the ranks of a sharded model wrote, see shards.py

Every file appears by an atomic rename; names that do not match are ignored. Nothing is pickled.

Shapes: N snapshots in the store, D values in a row.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pdiff_plugin.errors import StoreNotFoundError
from pdiff_plugin.snapshots.chunks import FORMAT, FORMAT_VERSION, Chunk, read_base_header, read_chunks
from pdiff_plugin.snapshots.files import read_json
from pdiff_plugin.snapshots.layout import DTYPES, Layout

logger = logging.getLogger(__name__)


class SnapshotStore:
    """Read access to a store as it was when opened.

    ``len(store)`` is N. Rows are ordered by trajectory, then by step.

    Attributes:
        path: the folder.
        layout: the tensors of a row.
        row_dtype: dtype of the rows on disk.
        trajectories: ids, in the order of the rows.
        problems: one sentence per file that could not be read; its rows are left out.
    """

    def __init__(self, path: Path, layout: Layout, row_dtype: torch.dtype) -> None:
        self.path, self.layout, self.row_dtype = path, layout, row_dtype
        self.problems: list[str] = []
        self.trajectories: list[str] = []
        self._chunks: list[tuple[int, Chunk]] = []
        for folder in sorted(p for p in (path / "trajectories").glob("*") if p.is_dir()):
            chunks, problems = read_chunks(folder, layout)
            self.problems += problems
            if chunks:
                self._chunks += [(len(self.trajectories), chunk) for chunk in chunks]
                self.trajectories.append(folder.name)
        for problem in self.problems:
            logger.warning(problem)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SnapshotStore:
        """Open an existing store for reading.

        Raises:
            StoreNotFoundError: no such folder, or one without ``layout.json``.
            FormatVersionError: written by a newer release.
        """
        path = Path(path)
        if not path.is_dir():
            raise StoreNotFoundError(str(path), "it is a file" if path.exists() else "there is no such folder")
        if (path / "shards").is_dir():
            from pdiff_plugin.snapshots.shards import join_shards  # builds on this module

            join_shards(path)
        if not (path / "layout.json").is_file():
            raise StoreNotFoundError(str(path), "it has no layout.json")
        document = read_json(path / "layout.json", FORMAT, FORMAT_VERSION)
        return cls(path, Layout.from_json(document["tensors"]), DTYPES[document["row_dtype"]])

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
        return torch.tensor([0, *(len(chunk.steps) for _, chunk in self._chunks)]).cumsum(0)

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
        for chunk, places, own in self._pieces(wanted):
            if isinstance(places, slice) and len(own) == len(chunk.steps):
                out[places] = chunk.rows[:, lo:hi]
            else:
                out[places] = chunk.rows[:, lo:hi][own].to(dtype)
        return out

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

    def _pieces(self, wanted: Tensor) -> Iterator[tuple[Chunk, Tensor | slice, Tensor]]:
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
        for chunk, places, own in self._pieces(wanted):
            out[places] = chunk.rows.index_select(1, columns)[own].to(out.dtype)
        return out

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Snapshot ``index`` as name -> tensor (*shape), in the dtypes of the recorded model."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"snapshot {index} of a store that holds {len(self)}")
        return self.layout.unflatten(self.rows(indices=[index % len(self)])[0])

    def base(self, trajectory: str | None = None) -> dict[str, Tensor] | None:
        """The whole model at the end of a trajectory's window (the last one's unless named), or None."""
        names = [trajectory] if trajectory else list(reversed(self.trajectories))
        for name in names:
            path = self.path / "trajectories" / name / "base.safetensors"
            if path.is_file():
                tensors = load_file(path)
                with safe_open(path, framework="pt") as file:
                    aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
                return tensors | {alias: tensors[name] for alias, name in aliases.items()}
        return None

    def base_header(self, trajectory: str) -> dict[str, str]:
        """What a trajectory's base file says of itself (``rest_drift`` among it), empty without one."""
        return read_base_header(self.path / "trajectories" / trajectory)
