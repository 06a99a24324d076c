"""The snapshot store: a folder that training runs append to and that a fit reads.

    STORE/layout.json                                  names, shapes, dtypes, kinds; written once by the first writer
    STORE/trajectories/<id>/chunk-000001.safetensors   "rows" (n, D) in layout order, "steps" (n,) int64
    STORE/trajectories/<id>/base.safetensors           the whole model at the end of the recording window (optional)
    STORE/shards/                                      parts that the ranks of a sharded model wrote, see shards.py

A chunk's header holds, as text, ``format``, ``format_version`` and two JSON lists, ``epochs`` and ``metrics``, with one
entry per row. Every file appears by an atomic rename; names that do not match are ignored. Nothing is pickled.

Shapes: N snapshots in the store, n rows in a chunk, D values in a row.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdiff_plugin.errors import FormatError, StoreNotFoundError, TrajectoryExistsError
from pdiff_plugin.snapshots.files import TEMP_MARK, check_format, read_json, replacing, temporary
from pdiff_plugin.snapshots.layout import DTYPE_NAMES, DTYPES, Layout

logger = logging.getLogger(__name__)

FORMAT = "pdiff-snapshots"
FORMAT_VERSION = 1
_CHUNK = re.compile(r"chunk-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Chunk:
    """One open chunk file; ``handle`` is its memory map."""

    path: Path
    handle: Any
    steps: list[int]
    epochs: list[float | None]
    metrics: list[dict[str, float]]

    @cached_property
    def rows(self) -> Tensor:
        """(n, D), mapped: only what is copied out of it is read."""
        rows: Tensor = self.handle.get_tensor("rows")
        return rows


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


class TrajectoryWriter:
    """Adds chunks to one trajectory of a store, which it creates where needed. One writer per trajectory.

    Args:
        path: the store's folder.
        layout: the tensors of a row; must be the store's own if it has one.
        row_dtype: of the rows on disk; an existing store's own dtype wins.
        trajectory: id; the next free ``run-001``, ``run-002``, ... unless given.
        resume_step: continue that trajectory after this step; rows past it are dropped.

    Raises:
        LayoutMismatchError: the store holds snapshots of other tensors.
        TrajectoryExistsError: the trajectory holds snapshots and ``resume_step`` was not given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Layout,
        row_dtype: torch.dtype = torch.float32,
        trajectory: str | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.row_dtype = _create_layout(self.path, layout, row_dtype)
        self.trajectory, self.folder = _claim_trajectory(self.path / "trajectories", trajectory)
        for stray in self.folder.glob(f"{TEMP_MARK}*"):
            stray.unlink(missing_ok=True)
        chunks, problems = read_chunks(self.folder, layout)
        if chunks and resume_step is None:
            raise TrajectoryExistsError(str(self.folder), sum(len(chunk.steps) for chunk in chunks))
        for problem in problems:
            logger.warning(problem)
        numbers = [int(m[1]) for m in map(_CHUNK.fullmatch, os.listdir(self.folder)) if m]
        self._next_chunk = max(numbers, default=0) + 1
        self._chunks = [(chunk.path, list(chunk.steps)) for chunk in chunks]
        if resume_step is not None:
            num_found = self.num_rows
            self._keep_rows(lambda steps: [i for i, step in enumerate(steps) if step <= resume_step])
            if num_found > self.num_rows and resume_step >= 0:
                num_dropped = num_found - self.num_rows
                logger.warning("dropped %d snapshots past step %d from %s", num_dropped, resume_step, self.folder)

    @property
    def num_rows(self) -> int:
        return sum(len(steps) for _, steps in self._chunks)

    @property
    def last_step(self) -> int:
        """Step of the newest row, 0 when there is none."""
        return self._chunks[-1][1][-1] if self._chunks else 0

    def write_chunk(
        self,
        rows: Tensor,
        steps: Sequence[int],
        epochs: Sequence[float | None] | None = None,
        metrics: Sequence[Mapping[str, float]] | None = None,
    ) -> Path:
        """Write ``rows`` (n, D) as the next chunk and return its path. It exists whole or not at all."""
        path = self.folder / f"chunk-{self._next_chunk:06d}.safetensors"
        save_chunk(path, rows.to(self.row_dtype), steps, epochs, metrics)
        self._next_chunk += 1
        self._chunks.append((path, list(steps)))
        return path

    def drop_oldest(self, keep: int, *, exactly: bool = False) -> None:
        """Delete the oldest chunks that the newest ``keep`` rows do not need; ``exactly`` also cuts into one."""
        while self._chunks and self.num_rows - len(self._chunks[0][1]) >= keep:
            self._chunks.pop(0)[0].unlink(missing_ok=True)
        surplus = self.num_rows - keep
        if exactly and surplus > 0:
            first = self._chunks[0][1][surplus]
            self._keep_rows(lambda steps: [i for i, step in enumerate(steps) if step >= first])

    def write_base(self, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
        """Write the whole model, as :func:`write_base` does."""
        write_base(self.folder, state, header)

    def _keep_rows(self, keep: Any) -> None:
        kept = []
        for path, steps in self._chunks:
            rows = keep(steps)
            if not rows:
                path.unlink(missing_ok=True)
                continue
            if len(rows) < len(steps):
                chunk = read_chunk(path, self.layout)
                save_chunk(
                    path,
                    chunk.rows[rows],
                    [steps[i] for i in rows],
                    [chunk.epochs[i] for i in rows],
                    [chunk.metrics[i] for i in rows],
                )
            kept.append((path, [steps[i] for i in rows]))
        self._chunks = kept


def save_chunk(
    path: Path,
    rows: Tensor,
    steps: Sequence[int],
    epochs: Sequence[float | None] | None = None,
    metrics: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Write one chunk file, rows (n, D)."""
    tensors = {"rows": rows.contiguous(), "steps": torch.tensor(list(steps), dtype=torch.int64)}
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "epochs": json.dumps(list(epochs) if epochs else [None] * len(steps)),
        "metrics": json.dumps([dict(m) for m in metrics] if metrics else [{}] * len(steps)),
    }
    with replacing(path) as temp:
        save_file(tensors, temp, header)


def write_base(folder: Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write the whole model; tensors that share memory are stored once and their other names in the header."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    text = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "aliases": json.dumps(aliases),
        **header,
    }
    with replacing(folder / "base.safetensors") as temp:
        save_file(unique, temp, text)


def read_base_header(folder: Path) -> dict[str, str]:
    """What the base file of a trajectory says of itself, empty without one."""
    path = folder / "base.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_chunk(path: Path, layout: Layout) -> Chunk:
    """Open one chunk.

    Raises:
        FormatError: truncated, of another format, or of another width than ``layout``.
        FormatVersionError: from a newer release.
    """
    try:
        handle: Any = safe_open(path, framework="pt")
        header = handle.metadata() or {}
        check_format(str(path), header, FORMAT, FORMAT_VERSION)
        steps = handle.get_tensor("steps").tolist()
        shape = handle.get_slice("rows").get_shape()
        epochs, metrics = json.loads(header["epochs"]), json.loads(header["metrics"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise FormatError(str(path), f"an unreadable chunk ({error})", "a complete safetensors file") from error
    if list(shape) != [len(steps), layout.num_values]:
        raise FormatError(str(path), f"rows of shape {shape}", f"({len(steps)}, {layout.num_values})")
    return Chunk(path, handle, steps, epochs, metrics)


def read_chunks(folder: Path, layout: Layout) -> tuple[list[Chunk], list[str]]:
    """All readable chunks of a trajectory in order, and a sentence for each that is not.

    Anything else in the folder (temporary files of a killed writer, strays) is ignored.
    """
    chunks, problems = [], []
    for path in sorted((p for p in folder.iterdir() if _CHUNK.fullmatch(p.name)), key=lambda p: (len(p.name), p.name)):
        try:
            chunks.append(read_chunk(path, layout))
        except FormatError as error:
            problems.append(f"{error} Its snapshots are left out.")
    return chunks, problems


def _create_layout(path: Path, layout: Layout, row_dtype: torch.dtype) -> torch.dtype:
    path.mkdir(parents=True, exist_ok=True)
    target = path / "layout.json"
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "row_dtype": DTYPE_NAMES[row_dtype],
        "num_values": layout.num_values,
        "tensors": layout.to_json(),
    }
    if not target.exists():
        temp = temporary(target)
        temp.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        try:
            # A hard link appears whole and fails if another writer was first; os.replace would overwrite its file.
            os.link(temp, target)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(temp, target)
        finally:
            temp.unlink(missing_ok=True)
    found = read_json(target, FORMAT, FORMAT_VERSION)
    Layout.from_json(found["tensors"]).check_same(layout, f"the store {path}")
    return DTYPES[found["row_dtype"]]


def _claim_trajectory(parent: Path, trajectory: str | None) -> tuple[str, Path]:
    parent.mkdir(exist_ok=True)
    if trajectory is not None:
        if not re.fullmatch(r"[\w.+=-]+", trajectory) or trajectory.startswith("."):
            raise FormatError(str(parent), f"trajectory id {trajectory!r}", "letters, digits and . _ + = - only")
        (parent / trajectory).mkdir(exist_ok=True)
        return trajectory, parent / trajectory
    number = 1
    while True:
        name = f"run-{number:03d}"
        try:
            (parent / name).mkdir()
            return name, parent / name
        except FileExistsError:
            number += 1
