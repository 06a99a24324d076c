"""Snapshots of a model that is sharded over processes (FSDP2's ``fully_shard``).

Each rank writes the part of every tensor that it holds, which needs no communication, into a store of its own:

    STORE/shards/rank-00000-of-00002/             layout.json, trajectories/ as in any store; local shapes
    STORE/shards/rank-00000-of-00002/shard.json   {"format": "pdiff-shard", "shapes": {NAME: whole shape}}

Tensors that are not sharded (buffers) are in rank 0's store alone. Tensors are cut along dimension 0, so that the flat
values of a whole one are the ranks' parts one after another: whole rows are read from the files of all ranks as columns
are asked for, and nothing is ever joined on disk.

Shapes: m rows wanted, D values in a row of the whole, c columns, R ranks.
"""

from __future__ import annotations

import re
import reprlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import FormatError, UnsupportedTensorError
from pdiff_plugin.snapshots.base import read_base, read_base_header
from pdiff_plugin.snapshots.chunks import Chunk, PlannedWindow, read_chunks, read_window
from pdiff_plugin.snapshots.files import read_json, write_json
from pdiff_plugin.snapshots.layout import LAYOUT_NAME, Layout, TensorSpec, read_layout

FORMAT = "pdiff-shard"
FORMAT_VERSION = 1
SHAPES_NAME = "shard.json"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of ``tensor``."""
    return hasattr(tensor, "device_mesh")  # DTensor, without importing torch.distributed where it is not built in


def local_part(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds, the same memory; the tensor itself if it is whole."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def check_sharding(model: nn.Module) -> None:
    """Refuse a model that is sharded, but not by ``fully_shard``: what a process sees of it is no part of a tensor.

    Raises:
        UnsupportedTensorError: naming the first parameter.
    """
    parameters = dict(model.named_parameters())
    # fully_shard marks modules in the same way, but its parameters are DTensors.
    by_fsdp1 = any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules())
    by_fsdp1 = by_fsdp1 and not any(map(is_sharded, parameters.values()))
    for name, parameter in parameters.items():
        if by_fsdp1 or hasattr(parameter, "ds_id"):
            raise UnsupportedTensorError(
                name,
                "sharded by FullyShardedDataParallel or DeepSpeed ZeRO-3",
                "models are recorded under fully_shard (FSDP2), DistributedDataParallel and ZeRO up to stage 2",
            )


def shard_folder(store: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Where this process writes its part of ``tensors``.

    Raises:
        UnsupportedTensorError: naming the first tensor that is not simply cut along its first dimension.
    """
    meshes = []
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            placements = tensor.placements  # type: ignore[attr-defined]  # DTensor's
            if len(placements) != 1 or not placements[0].is_shard(0):
                raise UnsupportedTensorError(
                    name,
                    f"laid out as {placements}",
                    "only shards along dimension 0 of one mesh dimension can be joined",
                )
            meshes.append(tensor.device_mesh)  # type: ignore[attr-defined]
    return store / "shards" / f"rank-{meshes[0].get_local_rank():05d}-of-{meshes[0].size():05d}"


def write_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Keep the whole shapes of the sharded tensors, chosen or not."""
    document = {name: list(shape) for name, shape in shapes.items()}
    write_json(folder / SHAPES_NAME, {"format": FORMAT, "format_version": FORMAT_VERSION, "shapes": document})


def next_free_trajectory(store: Path) -> str:
    """A name that no rank has used. All ranks find the same one if they ask before any of them writes."""
    used = {path.name for path in [*store.glob("trajectories/*"), *store.glob("shards/*/trajectories/*")]}
    return next(name for number in range(1, len(used) + 2) if (name := f"run-{number:03d}") not in used)


def layout_files(store: Path) -> list[Path]:
    """The layout files of a store: its own, and those of its ranks."""
    return [path for path in (store / LAYOUT_NAME, *sorted(store.glob(f"shards/*/{LAYOUT_NAME}"))) if path.is_file()]


def read_worlds(store: Path) -> tuple[list[World], list[str]]:
    """Those who wrote into ``store``: ranks that trained together, the smallest number first, after those that had
    the whole model. And a sentence for each that cannot be read, if others can.

    Raises:
        FormatError: nothing can be read: a layout that is none, folders of ranks that are missing or do not belong
            together.
        FormatVersionError: from a newer release.
        LayoutMismatchError: they recorded other tensors.
    """
    by_size: dict[int, dict[int, Path]] = {}
    for path in layout_files(store):
        if path.parent != store and (match := re.fullmatch(r"rank-(\d+)-of-(\d+)", path.parent.name)):
            by_size.setdefault(int(match[2]), {})[int(match[1])] = path.parent
    makers = [partial(World, [store])] if (store / LAYOUT_NAME).is_file() else []
    makers += [partial(_read_ranks, store, size, folders) for size, folders in sorted(by_size.items())]
    worlds: list[World] = []
    errors: list[FormatError] = []
    for make in makers:
        try:
            worlds.append(make())
        except FormatError as error:
            errors.append(error)
    if errors and not worlds:
        raise errors[0]
    for world in worlds[1:]:
        worlds[0].layout.check_same(world.layout, f"the store {store}")
    return worlds, [f"{error} What was recorded there is left out." for error in errors]


def _read_ranks(store: Path, size: int, folders: Mapping[int, Path]) -> World:
    """The world of ``size`` ranks, of which these folders are there."""
    # The size stands in the name of a folder: it may be anything.
    missing = next((rank for rank in range(size) if rank not in folders), None)
    if missing is not None or not size:
        raise FormatError(
            str(store / "shards"), f"no snapshots of rank {missing}", f"one folder for each of {size} ranks"
        )
    return World([folders[rank] for rank in range(size)], _read_shapes(folders[0] / SHAPES_NAME))


class World:
    """The stores of R ranks that trained together; an ordinary store is that of one rank, which had everything.

    Args:
        folders: of the ranks, in order.
        shapes: whole shapes of the sharded tensors, by name.

    Attributes:
        folders: of the ranks.
        layout: the tensors of a row of the whole.
        row_dtype: the narrowest dtype in which the rows of all ranks are exact.
    """

    def __init__(self, folders: Sequence[Path], shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.folders, self._shapes = list(folders), shapes or {}
        self.is_sharded = shapes is not None
        self._layouts, self._row_dtypes = zip(*map(read_layout, folders), strict=True)
        self.row_dtype: torch.dtype = reduce(torch.promote_types, self._row_dtypes)
        self.layout = Layout(
            tuple(TensorSpec(s.name, self._shapes.get(s.name, s.shape), s.dtype, s.kind) for s in self._layouts[0])
        )
        self._pieces = list(self._cut())
        self._starts = torch.tensor([piece.start for piece in self._pieces], dtype=torch.int64)
        self._start_list = self._starts.tolist()
        self._ranks = torch.tensor([piece.rank for piece in self._pieces], dtype=torch.int64)
        self._shifts = torch.tensor([piece.shift for piece in self._pieces], dtype=torch.int64)

    @property
    def trajectories(self) -> list[str]:
        found = (path for path in (self.folders[0] / "trajectories").glob("*") if path.is_dir())
        # A name that cannot be printed is none that a writer takes, and would be in every warning.
        return sorted(path.name for path in found if path.name.isprintable())

    def planned_window(self, trajectory: str) -> PlannedWindow | None:
        """The window of a trajectory that has rows from before it, else None. Errors are those of :meth:`base_header`.

        Such rows are there until the run gets to its window.
        """
        path = self.folders[0] / "trajectories" / trajectory
        return read_window(path) if path.is_dir() else None

    def chunks(self, trajectory: str, with_sparse: bool) -> tuple[list[list[Chunk]], list[str]]:
        """The chunks of a trajectory that each rank has written, and a sentence for each that cannot be read."""
        chunks: list[list[Chunk]] = []
        problems: list[str] = []
        for folder, layout, row_dtype in zip(self.folders, self._layouts, self._row_dtypes, strict=True):
            path = folder / "trajectories" / trajectory
            read = partial(read_chunks, path, layout, row_dtype, with_sparse=with_sparse)
            found, unread = read() if path.is_dir() else ([], [])
            chunks.append(found)
            problems += unread
        return chunks, problems

    def base_header(self, trajectory: str) -> dict[str, str]:
        """What a trajectory's base says of itself, empty unless all ranks have written that of one step.

        Raises:
            FormatError: it cannot be read.
            FormatVersionError: from a newer release.
        """
        headers = [read_base_header(folder / "trajectories" / trajectory) for folder in self.folders]
        return headers[0] if all(headers) and len({header.get("step") for header in headers}) == 1 else {}

    def base(self, trajectory: str) -> dict[str, Tensor] | None:
        """The whole model at the end of a trajectory's window, or None. Errors are those of :meth:`base_header`."""
        bases = [read_base(folder / "trajectories" / trajectory) for folder in self.folders]
        parts = [base for base in bases if base is not None]
        if len(parts) < len(self.folders):
            return None
        for name in sorted(self._shapes.keys() & parts[0]):
            first = parts[0][name]
            for folder, part in zip(self.folders, parts, strict=True):
                own = part.get(name, torch.empty(()))
                if not own.ndim or own.shape[1:] != first.shape[1:] or own.dtype != first.dtype:
                    found = f"{own.dtype} {tuple(own.shape)}" if name in part else "nothing"
                    expected = f"a part as rank 0 has it, {first.dtype} {tuple(first.shape)}"
                    path = str(folder / "trajectories" / trajectory)
                    raise FormatError(path, f"a base with {found} for {name}", expected)
        return {
            name: torch.cat([part[name] for part in parts]) if name in self._shapes else tensor
            for name, tensor in parts[0].items()
        }

    def ranges(self, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        """Where columns [lo, hi) of the whole are: rank and columns [first, last) of its own rows, in order."""
        for piece in self._pieces[max(0, bisect_right(self._start_list, lo) - 1) :]:
            if piece.start >= hi:
                return
            yield piece.rank, max(lo, piece.start) + piece.shift, min(hi, piece.stop) + piece.shift

    def locate(self, columns: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where any ``columns`` (c,) are: rank, a mask (c,) of those that it has, and these among its own columns."""
        pieces = torch.searchsorted(self._starts, columns, right=True) - 1  # (c,)
        ranks, own = self._ranks[pieces], columns + self._shifts[pieces]
        for rank in torch.unique(ranks).tolist():
            is_own = ranks == rank
            yield rank, is_own, own[is_own]

    def _cut(self) -> Iterator[_Piece]:
        for spec in self.layout:
            start, rows = self.layout.slices[spec.name].start, 0
            for rank, layout in enumerate(self._layouts if spec.name in self._shapes else self._layouts[:1]):
                place = layout.slices.get(spec.name)
                part = layout.shapes.get(spec.name, ())
                if place is None or part[1:] != spec.shape[1:]:
                    found = "no such tensor" if place is None else str(part)
                    raise FormatError(str(self.folders[rank] / LAYOUT_NAME), f"{spec.name}: {found}", str(spec))
                rows += part[0] if part else 0
                if place.stop > place.start:
                    yield _Piece(start, start + place.stop - place.start, rank, place.start - start)
                start += place.stop - place.start
            if spec.name in self._shapes and rows != spec.shape[0]:
                path = str(self.folders[0] / SHAPES_NAME)
                raise FormatError(path, f"{spec.name} of shape {spec.shape}", f"the {rows} rows of all its parts")


@dataclass(frozen=True)
class _Piece:
    """Columns [start, stop) of the whole, which a rank has ``shift`` columns further on in its own rows."""

    start: int
    stop: int
    rank: int
    shift: int


@dataclass(frozen=True)
class JoinedChunk:
    """Whole rows, each rank's part of them in one chunk of its own, read as far as asked for. See :class:`Chunk`."""

    steps: list[int]
    epochs: list[float | None]
    metrics: list[dict[str, float]]
    _world: World
    _parts: Sequence[tuple[Chunk, Tensor]]  # of each rank: a chunk, and places (n,) in it

    @property
    def planned_last_step(self) -> int | None:
        return self._parts[0][0].planned_last_step

    def __len__(self) -> int:
        return len(self.steps)

    def columns(self, lo: int, hi: int, rows: Tensor | None = None) -> Tensor:
        """Columns [lo, hi) of the rows at ``rows`` (m,), or of all: (m, hi - lo)."""
        parts = []
        for rank, first, last in self._world.ranges(lo, hi):
            chunk, places = self._parts[rank]
            is_whole = rows is None and len(chunk) == len(self)
            parts.append(chunk.columns(first, last, None if is_whole else places if rows is None else places[rows]))
        if not parts:
            return torch.empty(len(self if rows is None else rows), 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def gather(self, columns: Tensor, rows: Tensor) -> Tensor:
        """Values at any ``columns`` (c,) of the rows at ``rows`` (m,), both int64: (m, c)."""
        out = torch.empty(len(rows), len(columns), dtype=self._world.row_dtype)
        for rank, is_own, own in self._world.locate(columns):
            chunk, places = self._parts[rank]
            out[:, is_own] = chunk.gather(own, places[rows]).to(out.dtype)
        return out

    def parts(self, lo: int, hi: int, rows: Tensor) -> Iterator[tuple[Chunk, Tensor, int, int]]:
        """As those of :class:`Chunk`."""
        for rank, first, last in self._world.ranges(lo, hi):
            chunk, places = self._parts[rank]
            yield chunk, places[rows], first, last


def read_trajectory(
    worlds: Sequence[World], trajectory: str, *, with_sparse: bool = False
) -> tuple[Sequence[Chunk | JoinedChunk], list[str]]:
    """The rows of a trajectory in order, those from before its window if asked for, and a sentence for each chunk that
    cannot be read.

    Steps that some rank lacks are left out. A run that was resumed on another number of ranks was written by several
    worlds: where steps overlap, the one that got further counts. What was recorded whole counts before the first step
    of the shards: after it, it may be a copy of them that an earlier release made.
    """
    problems: list[str] = []
    whole: Sequence[Chunk] = []
    rows: _Rows = {}
    sharded: list[_Rows] = []
    for world in worlds:
        chunks, unread = world.chunks(trajectory, with_sparse)
        problems += unread
        if world.is_sharded:
            sharded.append(_common_rows(world, chunks))
        else:
            whole, rows = chunks[0], _common_rows(world, chunks)
    if not any(sharded):
        return whole, problems
    first = min(step for steps in sharded for step in steps)
    rows = {step: place for step, place in rows.items() if step < first}
    for steps in sorted(filter(None, sharded), key=max):
        rows |= steps
    return list(_joined(rows)), problems


# Step -> who wrote it, and of each rank a chunk and the number of a row in it.
_Rows = dict[int, tuple[World, list[tuple[Chunk, int]]]]


def _common_rows(world: World, chunks: Sequence[Sequence[Chunk]]) -> _Rows:
    """The rows that all ranks of a world have in their ``chunks``."""
    places = [{step: (chunk, row) for chunk in own for row, step in enumerate(chunk.steps)} for own in chunks]
    return {step: (world, [own[step] for own in places]) for step in set.intersection(*map(set, places))}


def _joined(rows: _Rows) -> Iterator[JoinedChunk]:
    """``rows`` in order, in runs of those that lie in the same chunks."""

    def files(step: int) -> list[int]:
        return [id(chunk) for chunk, _ in rows[step][1]]

    for _, group in groupby(sorted(rows), key=files):
        steps = list(group)
        world, parts = rows[steps[0]]
        places = list(zip(*([row for _, row in rows[step][1]] for step in steps), strict=True))  # of each rank
        chunks = [chunk for chunk, _ in parts]
        yield JoinedChunk(
            steps,
            [chunks[0].epochs[row] for row in places[0]],
            [chunks[0].metrics[row] for row in places[0]],
            world,
            [(chunk, torch.tensor(own)) for chunk, own in zip(chunks, places, strict=True)],
        )


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        shapes = read_json(path, FORMAT, FORMAT_VERSION).get("shapes")
    except FileNotFoundError as error:
        raise FormatError(str(path), "no such file", "the whole shapes of sharded tensors") from error
    if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
        raise FormatError(str(path), f"shapes {reprlib.repr(shapes)}", "an object of name -> sizes")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _is_shape(found: object) -> bool:
    return isinstance(found, list) and bool(found) and all(type(size) is int and size >= 0 for size in found)
