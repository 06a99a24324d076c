"""The usable snapshots of a store, and how far other weights are from them.

Distances are taken after running variances became logarithms and each tensor was divided by its standard deviation over
the snapshots: root mean square over the coordinates. A distance of 1 is as far as one typical deviation of a snapshot
from the mean; two unrelated snapshots are about sqrt(2) apart. Tensors that never moved are left out.

Shapes: N usable snapshots, M members, D values in a row, b columns in a block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pdiff_plugin.errors import UnusableSnapshotsError
from pdiff_plugin.generator.alignment import Alignment, RowReader, reader
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.names import check_fits
from pdiff_plugin.snapshots.fingerprint import fingerprint
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.split import BLOCK_SHARE
from pdiff_plugin.snapshots.statistics import NonFiniteRowsError, Statistics, column_blocks, measure, transform
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

BLOCK_VALUES = 16384
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

    def without(self, rows: list[int]) -> _Kept:
        keep = torch.ones(len(self.indices), dtype=torch.bool)
        keep[rows] = False
        return _Kept(self.source, self.indices[keep], None if self.values is None else self.values[keep])


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
    """

    def __init__(self, store: SnapshotStore, read: RowReader, kept: _Kept, statistics: Statistics) -> None:
        self.store, self.layout, self.statistics = store, store.layout, statistics
        self._read, self._kept = read, kept
        self.indices = kept.indices
        self.num_skipped = len(store) - len(self.indices)
        self.trajectory = store.trajectory_index[self.indices]
        self._num_moving = float(statistics.gram.diagonal().mean())

    @classmethod
    def measure(cls, store: SnapshotStore, alignment: Alignment | None = None) -> SnapshotRows:
        """Read all snapshots of ``store`` and measure them; those with NaN or Inf are left out.

        Raises:
            UnusableSnapshotsError: fewer than two are left, or all are equal.
        """
        if len(store) < 2:
            raise UnusableSnapshotsError(
                str(store.path), f"{len(store)} snapshots", "at least 2", "Record more steps of the training run."
            )
        read = reader(store, alignment)
        element = 8 if store.row_dtype == torch.float64 else 4
        keep = len(store) * store.layout.num_values * element <= _KEEP_BYTES
        kept = _Kept(read, torch.arange(len(store)), read() if keep else None)
        statistics = None
        while statistics is None:
            try:
                everything = torch.arange(len(kept.indices))
                statistics = measure(kept.read, store.layout, block_values=BLOCK_VALUES, train_rows=everything)
            except NonFiniteRowsError as error:
                kept = kept.without(error.rows)
                if len(kept.indices) < 2:
                    raise UnusableSnapshotsError(
                        str(store.path),
                        f"{len(store) - len(kept.indices)} of {len(store)} snapshots with NaN or Inf",
                        "at least 2 without",
                        "The recorded training diverged. Lower its learning rate and record again.",
                    ) from error
                logger.warning("%d snapshots hold NaN or Inf and are left out", len(error.rows))
        if not float(statistics.gram.diagonal().mean()) > 0:
            raise UnusableSnapshotsError(
                str(store.path),
                f"{len(kept.indices)} snapshots that are all equal",
                "weights that move",
                "Record while the chosen layers train, with a learning rate above 0.",
            )
        return cls(store, read, kept, statistics)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, lo: int, hi: int) -> Tensor:
        """Columns [lo, hi), (N, hi - lo)."""
        return self._kept.read(lo, hi)

    def members(self, positions: Tensor) -> WeightSet:
        """The snapshots at ``positions`` (M,) among the N."""
        return WeightSet.from_flat(self._read(indices=self.indices[positions]), self.layout)

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
        cross = torch.zeros(weights.num_members, len(self), dtype=torch.float64)
        squares = torch.zeros(weights.num_members, dtype=torch.float64)
        for number, lo, hi in column_blocks(self.layout, BLOCK_VALUES):
            if not self._moves[number]:
                continue
            spec = self.layout.tensors[number]
            start = self.layout.slices[spec.name].start
            tensor = weights[spec.name].detach().cpu().reshape(weights.num_members, -1)
            rows = self.read(lo, hi)
            theirs = transform(tensor[:, lo - start : hi - start].to(rows.dtype), spec.name).double()
            mine = transform(rows, spec.name).double()
            mean = mine.mean(dim=0)
            scale = self.statistics.scales[number]
            theirs = (theirs - mean) / scale
            cross += theirs @ ((mine - mean) / scale).T
            squares += theirs.square().sum(dim=1)
        return cross, squares

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
    def _moves(self) -> list[bool]:
        """Whether each tensor differs between any two snapshots."""

        def moves(number: int) -> bool:
            if self.statistics.scales[number] != 1:
                return True
            # A scale of one stands for a tensor that never moved, but may also be what was measured.
            only = Layout((self.layout.tensors[number],))
            start = self.layout.slices[only.names[0]].start
            blocks = (self.read(start + lo, start + hi) for _, lo, hi in column_blocks(only, BLOCK_VALUES))
            return any(bool((block != block[:1]).any()) for block in blocks)

        return [moves(number) for number in range(len(self.layout.tensors))]


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
