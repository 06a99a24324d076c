"""Small stores, made without any training."""

import pytest
import torch

from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore, TrajectoryWriter

LAYOUT = Layout(
    (
        TensorSpec("norm.weight", (8,), "float32", "parameter"),
        TensorSpec("norm.running_var", (8,), "float32", "buffer"),
        TensorSpec("head.weight", (3, 8), "float32", "parameter"),
    )
)


def wandering(num_snapshots, num_values, seed=0):
    """Rows of one run: a walk that is drawn back to where it began, (num_snapshots, num_values), all positive."""
    rng = torch.Generator().manual_seed(seed)
    start = torch.rand(num_values, generator=rng) + 1.0
    directions = torch.randn(4, num_values, generator=rng)
    place, rows = torch.zeros(4), []
    for _ in range(num_snapshots):
        place = 0.9 * place + torch.randn(4, generator=rng) * torch.tensor([1.0, 0.5, 0.3, 0.2])
        rows.append(start + 0.05 * place @ directions)
    return torch.stack(rows)


@pytest.fixture
def make_store(tmp_path):
    """Write a store: ``make_store(rows=(N, D) or None, trajectories=R)``; rows of R runs are different walks."""

    def make(rows=None, *, trajectories=1, num_snapshots=40, name="store", layout=LAYOUT):
        for number in range(trajectories):
            mine = wandering(num_snapshots, layout.num_values, seed=number) if rows is None else rows
            writer = TrajectoryWriter(tmp_path / name, layout)
            if len(mine):
                writer.write_chunk(mine, list(range(1, len(mine) + 1)))
        return SnapshotStore.open(tmp_path / name)

    return make
