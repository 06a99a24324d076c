"""The usable snapshots of a store, and how far other weights are from them.

Distances are taken after running variances became logarithms and each tensor was divided by its standard deviation over
the snapshots: root mean square over the coordinates. A distance of 1 is as far as one typical deviation of a snapshot
from the mean; two unrelated snapshots are about sqrt(2) apart. Tensors that never moved are left out.

Shapes: N usable snapshots, M members, D values in a row, b columns in a block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pdiff_plugin.errors import UnusableSnapshotsError
from pdiff_plugin.evaluation.scratch import Empty, in_memory
from pdiff_plugin.generator.alignment import Alignment, RowReader, reader
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.names import check_fits
from pdiff_plugin.snapshots.fingerprint import fingerprint
from pdiff_plugin.snapshots.layout import DTYPES, Layout
from pdiff_plugin.snapshots.split import BLOCK_SHARE
from pdiff_plugin.snapshots.statistics import (
    LOG_SUFFIX,
    Statistics,
    column_blocks,
    measure,
    transform,
    without_nonfinite,
)
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

BLOCK_VALUES = 16384
# Of a block in float64: its values, centred, standardised, and what its moments take.
_BLOCK_COPIES = 5
# Values of members read at a time.
_READ_VALUES = 1 << 23
# Stores up to this size are read once and kept; larger ones are read again, block by block, for each set.
_KEEP_BYTES = 1 << 30
# Snapshots nearer than this are one snapshot, recorded twice.
_DUPLICATE_DISTANCE = 1e-6


@dataclass(frozen=True)
class _Kept:
    """Some rows of a store by columns, from memory (N, D) where there is room for them."""

    source: RowReader
    indices: Tensor
    values: Tensor | None

    def read(self, lo: int, hi: int) -> Tensor:
        return self.source(lo, hi, indices=self.indices) if self.values is None else self.values[:, lo:hi]

    def of(self, indices: Tensor) -> _Kept:
        """Those at ``indices`` of the store, which are among them."""
        if len(indices) == len(self.indices):
            return self
        values = None if self.values is None else self.values[torch.isin(self.indices, indices)]
        return _Kept(self.source, indices, values)


class SnapshotRows:
    """Snapshots without NaN or Inf, read by columns and measured; :meth:`measure` makes them of a store.

    Hidden units are in the order of a generator's alignment, where one was given.

    Attributes:
        store: where they are.
        layout: of a row.
        indices: places in the store, (N,) int64.
        trajectory: place in ``store.trajectories`` of each, (N,) int64.
        num_skipped: rows left out because they hold NaN or Inf.
        statistics: Gram matrix (N, N) and scales of the standardised rows.
        block_values: columns at most in a block.
    """

    def __init__(
        self, store: SnapshotStore, read: RowReader, kept: _Kept, statistics: Statistics, block_values: int
    ) -> None:
        self.store, self.layout, self.statistics = store, store.layout, statistics
        self._read, self._kept, self.block_values = read, kept, block_values
        self.indices = kept.indices
        self.num_skipped = len(store) - len(self.indices)
        self.trajectory = store.trajectory_index[self.indices]
        self._num_moving = float(statistics.gram.diagonal().mean())

    @classmethod
    def measure(
        cls, store: SnapshotStore, alignment: Alignment | None = None, *, memory_gb: float = 2.0
    ) -> SnapshotRows:
        """Read all snapshots of ``store`` and measure them; those with NaN or Inf are left out.

        They are kept in memory where they take no more than half of ``memory_gb``, nor more than 1 GiB.

        Raises:
            UnusableSnapshotsError: fewer than two are left, or all are equal.
        """
        if len(store) < 2:
            raise UnusableSnapshotsError(
                str(store.path), f"{len(store)} snapshots", "at least 2", "Record more steps of the training run."
            )
        read = reader(store, alignment)
        element = 8 if store.row_dtype == torch.float64 else 4
        keep = len(store) * store.layout.num_values * element <= min(_KEEP_BYTES, memory_gb * 1e9 / 2)
        kept = _Kept(read, torch.arange(len(store)), read() if keep else None)
        block_values = int(min(BLOCK_VALUES, max(64, memory_gb * 1e9 / 4 / (_BLOCK_COPIES * 8 * len(store)))))

        def attempt(indices: Tensor) -> tuple[_Kept, Statistics]:
            mine = kept.of(indices)
            everything = torch.arange(len(indices))
            return mine, measure(mine.read, store.layout, block_values=block_values, train_rows=everything)

        def on_dropped(left: Tensor, lost: Tensor) -> None:
            if len(left) < 2:
                raise UnusableSnapshotsError(
                    str(store.path),
                    f"{len(store) - len(left)} of {len(store)} snapshots with NaN or Inf",
                    "at least 2 without",
                    "The recorded training diverged. Lower its learning rate and record again.",
                )
            logger.warning("%d snapshots hold NaN or Inf and are left out", len(lost))

        usable, statistics = without_nonfinite(len(store), attempt, on_dropped)
        if not float(statistics.gram.diagonal().mean()) > 0:
            raise UnusableSnapshotsError(
                str(store.path),
                f"{len(usable.indices)} snapshots that are all equal",
                "weights that move",
                "Record while the chosen layers train, with a learning rate above 0.",
            )
        return cls(store, read, usable, statistics, block_values)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, lo: int, hi: int) -> Tensor:
        """Columns [lo, hi), (N, hi - lo)."""
        return self._kept.read(lo, hi)

    def blocks(self) -> Iterator[Block]:
        """All columns of the snapshots, a few at a time; a block is of use until the next one is asked for."""
        # Written over and over: the system takes large tensors back, and faulting their pages in again takes as long
        # as the arithmetic.
        size = len(self) * min(self.block_values, self.layout.num_values)
        buffers = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
        return (Block(self, place, buffers) for place in column_blocks(self.layout, self.block_values))

    def members(self, positions: Tensor, empty: Empty = in_memory) -> WeightSet:
        """The snapshots at ``positions`` (M,) among the N, in memory that ``empty`` gives."""
        tensors, indices = empty(self.layout, len(positions)), self.indices[positions]
        for number, lo, hi in column_blocks(self.layout, max(1, _READ_VALUES // len(positions))):
            spec = self.layout.tensors[number]
            start = self.layout.slices[spec.name].start
            own = tensors[spec.name].view(len(positions), -1)
            own[:, lo - start : hi - start] = self._read(lo, hi, indices=indices)
        return WeightSet(tensors)

    @cached_property
    def squared_distances(self) -> Tensor:
        """Squared distances between snapshots, (N, N) float64."""
        gram = self.statistics.gram
        squares = gram.diagonal()
        return (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0).fill_diagonal_(0) / self._num_moving

    @cached_property
    def same_block(self) -> Tensor:
        """Pairs too close in time to be compared, (N, N) bool; the diagonal always is.

        Same trajectory, and at most a fifteenth of its snapshots apart.
        """
        same = self.trajectory[:, None] == self.trajectory[None, :]
        places = torch.arange(len(self))
        counts = torch.bincount(self.trajectory)[self.trajectory]
        width = (counts * BLOCK_SHARE).round().long()
        return same & ((places[:, None] - places[None, :]).abs() <= width[:, None])

    @cached_property
    def runs(self) -> list[Tensor]:
        """Places among the N of each trajectory's snapshots, in order of time."""
        return [(self.trajectory == number).nonzero().squeeze(1) for number in sorted(set(self.trajectory.tolist()))]

    @property
    def num_duplicates(self) -> int:
        """Snapshots that repeat another one that comes before them in the store."""
        repeated = (self.squared_distances <= _DUPLICATE_DISTANCE**2).tril(diagonal=-1)
        return int(repeated.any(dim=1).sum())

    def products(self, weights: WeightSet) -> tuple[Tensor, Tensor]:
        """Inner products of members with the snapshots, both standardised and centred on the snapshots' mean.

        Returns:
            (M, N) float64, and the members' own squared norms, (M,) float64.
        """
        found = Products(weights.num_members, len(self))
        for block in self.blocks():
            found.add(block, block.of(weights))
        return found.cross, found.squares

    @cached_property
    def plane(self) -> tuple[Tensor, Tensor]:
        """The two leading principal directions as combinations of snapshots, (N, 2), and their share of variance, (2,).

        Products of anything with the snapshots, times the first, are its coordinates, in deviations per coordinate.
        """
        values, vectors = torch.linalg.eigh(self.statistics.gram)
        values, vectors = values.flip(0)[:2].clamp_min(0), vectors.flip(1)[:, :2]
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()  # a sign is arbitrary
        scale = (values * self._num_moving).sqrt().clamp_min(1e-300)
        return vectors / scale, values / self.statistics.gram.diagonal().sum()

    def distances(self, products: tuple[Tensor, Tensor]) -> Tensor:
        """Distance of each member to each snapshot, (M, N) float64, from the members' :meth:`products`."""
        cross, squares = products
        own = self.statistics.gram.diagonal()
        return ((squares[:, None] + own[None, :] - 2 * cross).clamp_min(0) / self._num_moving).sqrt()

    def check(self, weights: WeightSet, where: str) -> None:
        """Raise :class:`LayoutMismatchError` at the first tensor that ``weights`` lacks or has in another shape."""
        found = {name: tuple(stacked.shape[1:]) for name, stacked in weights.items()}
        check_fits(self.layout.shapes, found, where, "these weights")

    @cached_property
    def moves(self) -> list[bool]:
        """Whether each tensor differs between any two snapshots."""

        def moves(number: int) -> bool:
            if self.statistics.scales[number] != 1:
                return True
            # A scale of one stands for a tensor that never moved, but may also be what was measured.
            only = Layout((self.layout.tensors[number],))
            start = self.layout.slices[only.names[0]].start
            blocks = (self.read(start + lo, start + hi) for _, lo, hi in column_blocks(only, self.block_values))
            return any(bool((block != block[:1]).any()) for block in blocks)

        return [moves(number) for number in range(len(self.layout.tensors))]


class Block:
    """Columns [lo, hi) of all snapshots, of one tensor; what is made of them is made once for all sets.

    Attributes:
        name: of the tensor.
        dtype: in which it was recorded.
        place: of the columns in the flattened tensor.
    """

    def __init__(self, rows: SnapshotRows, place: tuple[int, int, int], buffers: tuple[Tensor, Tensor]) -> None:
        number, lo, hi = place
        self._rows, self._number, self._columns = rows, number, (lo, hi)
        self._buffers = tuple(buffer[: len(rows) * (hi - lo)].view(len(rows), hi - lo) for buffer in buffers)
        self._moments: dict[bool, tuple[Tensor, Tensor]] = {}
        spec = rows.layout.tensors[number]
        start = rows.layout.slices[spec.name].start
        self.name, self.dtype, self.place = spec.name, DTYPES[spec.dtype], slice(lo - start, hi - start)

    def of(self, members: WeightSet) -> Tensor:
        """These columns of other weights, (M, b)."""
        return members[self.name].detach().cpu().reshape(members.num_members, -1)[:, self.place]

    @cached_property
    def values(self) -> Tensor:
        """As recorded, (N, b)."""
        return self._rows.read(*self._columns)

    @cached_property
    def doubles(self) -> Tensor:
        """The same in float64."""
        return self._buffers[0].copy_(self.values)

    @cached_property
    def transformed(self) -> Tensor:
        """The same with the logarithm of running variances."""
        return transform(self.values, self.name).double() if self.name.endswith(LOG_SUFFIX) else self.doubles

    def moments(self, per_run: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the transformed values, over all snapshots or each run, both (groups, b)."""
        if per_run not in self._moments:
            groups = self._rows.runs if per_run and len(self._rows.runs) > 1 else [slice(None)]
            values = [self.transformed[group] for group in groups]
            mean = torch.stack([own.mean(dim=0) for own in values])
            std = torch.stack([own.std(dim=0, correction=min(1, len(own) - 1)) for own in values])
            self._moments[per_run] = mean, std
        return self._moments[per_run]

    @property
    def moves(self) -> bool:
        """Whether the tensor differs between any two snapshots."""
        return self._rows.moves[self._number]

    @cached_property
    def standardised(self) -> Tensor:
        """Centred on the snapshots' mean and divided by the scale of the tensor, (N, b) float64."""
        return torch.sub(self.transformed, self._mean, out=self._buffers[1]).div_(self._scale)

    def standardise(self, values: Tensor) -> Tensor:
        """Columns (M, b) of other weights by the same mean and scale."""
        return (transform(values.to(self.values.dtype), self.name).double() - self._mean) / self._scale

    @cached_property
    def _mean(self) -> Tensor:
        return self.transformed.mean(dim=0)

    @property
    def _scale(self) -> Tensor:
        return self._rows.statistics.scales[self._number]


class Products:
    """Inner products of M members with the N snapshots, gathered block by block.

    Attributes:
        cross: of the standardised members and snapshots, (M, N) float64.
        squares: of the members with themselves, (M,) float64.
    """

    def __init__(self, num_members: int, num_snapshots: int) -> None:
        self.cross = torch.zeros(num_members, num_snapshots, dtype=torch.float64)
        self.squares = torch.zeros(num_members, dtype=torch.float64)

    def add(self, block: Block, values: Tensor) -> None:
        """Columns (M, b) of the members, which count where the snapshots move."""
        if block.moves:
            theirs = block.standardise(values)
            self.cross += theirs @ block.standardised.T
            self.squares += theirs.square().sum(dim=1)


def change_since_fit(rows: SnapshotRows, generator: WeightGenerator) -> str | None:
    """What tells that a store is not, or no longer, the one that a generator was fitted on; None where nothing does."""
    trajectories = rows.store.trajectories
    if generator.trajectories != trajectories:
        was, now = (", ".join(names) for names in (generator.trajectories, trajectories))
        return f"the generator was fitted on the runs {was}, the store holds {now}; fit again"
    count = generator.provenance.get("num_snapshots", len(rows))
    if count != len(rows):
        return f"the generator was fitted on {count} snapshots, the store holds {len(rows)}; fit again"
    known = generator.provenance.get("fingerprint")  # which generators of old do not have
    if known is not None and known != fingerprint(rows.store):
        return "the generator was fitted on other snapshots of the same names and number; fit again"
    return None


def evenly_spaced(num_snapshots: int, num_members: int) -> Tensor:
    """At most ``num_members`` different places among ``num_snapshots``, the first and the last included."""
    count = min(num_snapshots, num_members)
    if count == 1:
        return torch.tensor([num_snapshots - 1])
    return torch.linspace(0, num_snapshots - 1, count, dtype=torch.float64).round().long()
