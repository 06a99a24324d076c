"""Which snapshots of a store are used, and which of them are held out.

Shapes: N snapshots in use, n of them for training, D values in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pdiff_plugin.snapshots.store import SnapshotStore

# Reads columns [lo, hi) of the snapshots at some places of a store: (lo, hi, indices) -> (len(indices), hi - lo).
StoreReader = Callable[[int, int, Tensor], Tensor]

# Share of a trajectory, to each side of a snapshot, that is too close in time to be a reference for it: +-20 of 300.
# A snapshot is 0.06 from the step before it and 0.84 from what lies outside +-20 steps (CIFAR-10 MLP, 300 snapshots).
BLOCK_SHARE = 1 / 15


@dataclass(frozen=True)
class Split:
    """The snapshots of a store that are used, chosen once and handed to everything that reads them.

    Attributes:
        store: where they are.
        rows: their places in the store, (N,) int64.
        trajectory: the run of each, its place in ``store.trajectories``, (N,) int64.
        heldout: those kept from training, (N,) bool.
        reader: reads the store; in another order of columns where trajectories are aligned.
        is_pooled: all snapshots count as one cloud, since conditions tell them apart; none are held out by their time.
    """

    store: SnapshotStore
    rows: Tensor
    trajectory: Tensor
    heldout: Tensor
    reader: StoreReader
    is_pooled: bool = False

    @classmethod
    def choose(cls, store: SnapshotStore, rows: Tensor, heldout_fraction: float, *, is_pooled: bool = False) -> Split:
        """The snapshots at ``rows`` (N,), of which contiguous blocks of every trajectory are held out."""
        trajectory = store.trajectory_index[rows]
        held = choose_heldout(trajectory, 0.0 if is_pooled else heldout_fraction)
        return cls(store, rows, trajectory, held, store.rows, is_pooled)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def clouds(self) -> Tensor:
        """Which snapshots lie about one centre, (N,) int64: those of one run, or all."""
        return torch.zeros_like(self.trajectory) if self.is_pooled else self.trajectory

    @cached_property
    def train_rows(self) -> Tensor:
        """Places of the training snapshots among the N, (n,) int64."""
        return (~self.heldout).nonzero().squeeze(1)

    @cached_property
    def judged_rows(self) -> Tensor:
        """Places among the N of those that tell how well training went: the held-out ones, or all if there are none."""
        return self.heldout.nonzero().squeeze(1) if bool(self.heldout.any()) else self.train_rows

    def read(self, lo: int, hi: int, places: Tensor | None = None) -> Tensor:
        """Columns [lo, hi) of the snapshots at ``places`` among the N, of all unless given: (any, hi - lo) float32."""
        return self.reader(lo, hi, self.rows if places is None else self.rows[places])

    def block_values(self, memory_gb: float) -> int:
        """Columns to hold at a time: each value costs 4 bytes as read and 8 in each of three working copies."""
        # A working copy of more than 32 MiB is mapped anew every time (glibc's mmap threshold): its page faults double
        # the time of the pass. 16 MiB are 6990 columns of 300 snapshots.
        return max(1, min(16384, (16 << 20) // (8 * len(self)), int(memory_gb * 1e9 / (28 * len(self)))))


def choose_heldout(trajectory: Tensor, fraction: float) -> Tensor:
    """Which snapshots of the trajectories (N,) are held out, (N,) bool; blocks in every trajectory."""
    held = torch.zeros(len(trajectory), dtype=torch.bool)
    for number in sorted(set(trajectory.tolist())):
        mine = trajectory == number
        held[mine] = heldout_blocks(int(mine.sum()), fraction)
    return held


def heldout_blocks(num_snapshots: int, fraction: float) -> Tensor:
    """Choose contiguous blocks of one trajectory to hold out.

    Neighbours on a trajectory are nearly equal, so single snapshots picked at random would test nothing.

    Returns:
        (num_snapshots,) bool, True where held out: up to three evenly spaced blocks, none at the ends.
    """
    held = torch.zeros(num_snapshots, dtype=torch.bool)
    count = round(num_snapshots * fraction)
    if count == 0:
        return held
    num_blocks = max(1, min(3, count // 5))
    for block in range(num_blocks):
        size = count // num_blocks + (block < count % num_blocks)
        start = round((block + 0.5) / num_blocks * num_snapshots - size / 2)
        held[start : start + size] = True
    return held
