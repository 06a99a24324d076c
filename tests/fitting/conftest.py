"""Small stores, made without any training."""

import json
import subprocess
import sys

import pytest
import torch

from pdiff_plugin import WeightGenerator
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore, TrajectoryWriter

LAYOUT = Layout(
    (
        TensorSpec("norm.weight", (8,), "float32", "parameter"),
        TensorSpec("norm.running_var", (8,), "float32", "buffer"),
        TensorSpec("head.weight", (3, 8), "float32", "parameter"),
    )
)


RANK_OF_A_FIT = """
import json, sys
from pathlib import Path
from torch import distributed
from pdiff_plugin import FitConfig, SnapshotStore
from pdiff_plugin.fitting.fit import run_stages
from pdiff_plugin.fitting.run import Run
from pdiff_plugin.fitting.runtime import GroupRuntime

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
store, config = SnapshotStore.open(sys.argv[3]), FitConfig.from_json(json.loads(sys.argv[4]))
run = Run.open(store, config, folder / "fit" if rank == 0 else None, fresh=False)
run_stages(store, config, run, GroupRuntime(folder / "fit"))
distributed.destroy_process_group()
"""


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


@pytest.fixture
def fit_in_a_group(tmp_path):
    """Fit in two processes without Ray: ``fit_in_a_group(store, config)`` is the generator of rank 0."""

    def fit_with_two(store, config):
        (tmp_path / "fit").mkdir()
        arguments = [str(tmp_path), str(store.path), json.dumps(config.to_json())]
        started = [subprocess.Popen([sys.executable, "-c", RANK_OF_A_FIT, str(rank), *arguments]) for rank in (0, 1)]
        assert [process.wait(120) for process in started] == [0, 0]
        return WeightGenerator.load(tmp_path / "fit")

    return fit_with_two
