"""How far and in how many directions the snapshots of a run move: whether there is anything to learn from them.

Of a training that has converged, and of one that is recorded too briefly, the snapshots lie along one line. Whatever is
made of them lies on it too and predicts as they do. A random walk, the most drawn-out of noises, has 61 % of its
movement along its first line (6/π²), the walks of trainings with a high rate 70 to 95 %.

Shapes: N snapshots, D values in a row, c columns.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.statistics import measure
from pdiff_plugin.snapshots.store import SnapshotStore

LINE_SHARE = 0.98
# Fewer snapshots lie close to a line by themselves.
_MIN_SNAPSHOTS = 10
_MAX_SNAPSHOTS = 1000
# Of a large store as many values are read, 16 MiB, in pieces of a page of 4 KiB each.
_MAX_VALUES = 1 << 22
_PIECE = 1024

ADVICE = (
    "Record snapshots that differ: with a higher or a cyclic learning rate, by collect() with a high rate, "
    "or in several branches or runs."
)


@dataclass(frozen=True)
class Movement:
    """Of the run that moves in most directions, about its own mean.

    Attributes:
        num_directions: that carry the movement: (sum of variances)^2 / sum of their squares over principal directions.
        line_share: share of the movement along the first of them.
        noise: root mean square step-to-step noise (second differences) over that of the movement: 1 for independent
            snapshots, 0 where they lie on a smooth path.
    """

    num_directions: float
    line_share: float
    noise: float

    @property
    def is_line(self) -> bool:
        return self.line_share >= LINE_SHARE

    @property
    def text(self) -> str:
        """As part of a sentence."""
        return f"{self.line_share:.1%} of the movement within a run lies along one line"

    @property
    def warning(self) -> str | None:
        """What to tell where there is little to learn from the snapshots."""
        if not self.is_line:
            return None
        return (
            f"the snapshots hardly differ: {self.text}, step-to-step noise is {self.noise:.1%} of it. The training has "
            f"converged and drifts, or was recorded too briefly; what is made of them lies on that line. {ADVICE}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def movement(gram: Tensor, trajectory: Tensor) -> Movement | None:
    """Measure how snapshots move within their runs.

    Args:
        gram: inner products of snapshots about any common centre, (N, N) float64.
        trajectory: the run of each, (N,), in order of time within each.

    Returns:
        None where no run has ten snapshots, or none of those moves.
    """
    members = [trajectory == run for run in sorted(set(trajectory.tolist()))]
    found = [_of_run(gram[mine][:, mine]) for mine in members if int(mine.sum()) >= _MIN_SNAPSHOTS]
    return min((one for one in found if one is not None), key=lambda one: one.line_share, default=None)


def _of_run(gram: Tensor) -> Movement | None:
    N = len(gram)
    gram = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
    variances = torch.linalg.eigvalsh(gram).clamp_min(0)
    total = float(variances.sum())
    if not total > 0:
        return None
    # x[t] - 2 x[t+1] + x[t+2] of white noise has six times its variance.
    bend = torch.eye(N, dtype=gram.dtype)
    bend = bend[:-2] - 2 * bend[1:-1] + bend[2:]
    noise = float(((bend @ gram) * bend).sum(dim=1).mean()) / 6
    return Movement(
        total**2 / float(variances.square().sum()),
        float(variances[-1]) / total,
        math.sqrt(max(noise, 0.0) / (total / N)),
    )


def movement_in(store: SnapshotStore, seed: int = 0) -> Movement | None:
    """The same of a store, without a pass over all of it.

    At most four million values are read, 16 MiB, in pieces of 1024 columns chosen at random; and of more than a
    thousand snapshots the last ones of each run. Those with NaN or Inf there are left out.
    """
    rows = _some_rows(store.trajectory_index)
    values, layout = _some_columns(store, rows, seed)
    are_finite = values.isfinite().all(dim=1)
    values, rows = values[are_finite], rows[are_finite]
    if len(rows) < _MIN_SNAPSHOTS:
        return None
    everything = torch.arange(len(rows))
    statistics = measure(lambda lo, hi: values[:, lo:hi], layout, block_values=layout.num_values, train_rows=everything)
    return movement(statistics.gram, store.trajectory_index[rows])


def _some_rows(trajectory: Tensor) -> Tensor:
    """The last snapshots of each run, or of as many runs as there is room for, in order."""
    runs = sorted(set(trajectory.tolist()))[: _MAX_SNAPSHOTS // _MIN_SNAPSHOTS]
    if not runs:
        return torch.zeros(0, dtype=torch.int64)
    return torch.cat([(trajectory == run).nonzero().squeeze(1)[-(_MAX_SNAPSHOTS // len(runs)) :] for run in runs])


def _some_columns(store: SnapshotStore, rows: Tensor, seed: int) -> tuple[Tensor, Layout]:
    """Values (len(rows), c) of columns in order, and a layout of what was taken of each tensor."""
    pieces = [
        (spec, lo, min(lo + _PIECE, place.stop))
        for spec in store.layout
        for place in [store.layout.slices[spec.name]]
        for lo in range(place.start, place.stop, _PIECE)
    ]
    count = max(1, _MAX_VALUES // (_PIECE * max(len(rows), 1)))
    if count < len(pieces):
        chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:count]
        pieces = [pieces[place] for place in chosen.sort().values.tolist()]
    taken: dict[str, TensorSpec] = {}
    for spec, lo, hi in pieces:
        so_far = taken[spec.name].numel if spec.name in taken else 0
        taken[spec.name] = TensorSpec(spec.name, (so_far + hi - lo,), spec.dtype, spec.kind)
    values = [store.rows(lo, hi, rows) for _, lo, hi in pieces]
    return torch.cat(values, dim=1) if values else torch.zeros(len(rows), 0), Layout(tuple(taken.values()))
