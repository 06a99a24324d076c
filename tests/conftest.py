"""Shared pieces of the test suite."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pdiff_plugin import WeightGenerator
from pdiff_plugin.snapshots.conditions import set_condition
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter


@pytest.fixture(autouse=True)
def global_rng_is_left_alone() -> Iterator[None]:
    """Library code may not draw from the global generator; tests that do restore it here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def write_walk(path: Path, num_snapshots: int = 60, *, seed: int = 0, trajectory: str | None = None) -> Path:
    """A store of a mean-reverting walk of 48 values in two tensors; returns its path."""
    layout = Layout(
        (
            TensorSpec("norm.weight", (8, 5), "float32", "parameter"),
            TensorSpec("norm.bias", (8,), "float32", "parameter"),
        )
    )
    rng = torch.Generator().manual_seed(seed)
    value, rows = torch.zeros(layout.num_values), []
    for _ in range(num_snapshots):
        value = 0.9 * value + 0.1 * torch.randn(layout.num_values, generator=rng)
        rows.append(1.0 + value)
    writer = TrajectoryWriter(path, layout, trajectory=trajectory)
    if rows:
        writer.write_chunk(torch.stack(rows), range(1, num_snapshots + 1))
    return path


class RecordingLogger:
    """A logger that keeps what it is told: name -> step -> value."""

    def __init__(self) -> None:
        self.curves: dict[str, dict[int, float]] = {}
        self.settings: dict[str, Any] = {}
        self.num_calls, self.is_closed = 0, False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.num_calls += 1
        for name, value in metrics.items():
            self.curves.setdefault(name, {})[step] = value

    def log_config(self, config: Mapping[str, Any]) -> None:
        self.settings |= config

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def recorder() -> RecordingLogger:
    return RecordingLogger()


@pytest.fixture
def walk_store(tmp_path: Path) -> Path:
    return write_walk(tmp_path / "store")


@pytest.fixture(scope="session")
def sweep_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve runs of four snapshots, moved by the angle at which they were recorded; to be read only."""
    folder = tmp_path_factory.mktemp("sweep") / "store"
    walk = SnapshotStore.open(write_walk(folder.parent / "walk", 4))
    direction = torch.randn(walk.layout.num_values, generator=torch.Generator().manual_seed(3))
    for number in range(12):
        writer = TrajectoryWriter(folder, walk.layout)
        writer.write_chunk(walk.rows() + math.sin(math.radians(30 * number)) * direction, walk.steps.tolist())
        set_condition(folder, writer.trajectory, {"angle": 30.0 * number, "style": "ink" if number % 2 else "oil"})
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two CPUs for all tests that need one."""
    ray = pytest.importorskip("ray")
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_AUTH_MODE"] = "disabled"  # or Ray writes a token into the home folder
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # a socket's path has at most 107 characters
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=150 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


LAYOUT = Layout(
    (
        TensorSpec("norm.weight", (8,), "float32", "parameter"),
        TensorSpec("norm.running_var", (8,), "float32", "buffer"),
        TensorSpec("head.weight", (3, 8), "float32", "parameter"),
    )
)


RANK_OF_A_FIT = """
import json, sys
from torch import distributed
from pdiff_plugin import FitConfig
from pdiff_plugin.fitting.ranks import fit_on_ranks

rank, meeting, store, out, config = int(sys.argv[1]), *sys.argv[2:]


class Lines:
    def log(self, metrics, step):
        with open(f"{meeting}-rank-{rank}.log", "a") as file:
            file.write(json.dumps([step, metrics]) + "\\n")

    def log_config(self, config):
        self.log({}, -1)


distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
generator = fit_on_ranks(store, FitConfig.from_json(json.loads(config)), out=out, loggers=[Lines()])
assert (generator is None) == (rank == 1)
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
    """Fit in two processes without Ray: ``fit_in_a_group(store, config)`` is the generator of rank 0, in ``fit``."""

    def fit_with_two(store, config, *, source=None, out=None):
        out = out or tmp_path / "fit"
        meeting = tempfile.mktemp(prefix="meet-", dir=tmp_path)
        arguments = [meeting, str(source or store.path), str(out), json.dumps(config.to_json())]
        started = [subprocess.Popen([sys.executable, "-c", RANK_OF_A_FIT, str(rank), *arguments]) for rank in (0, 1)]
        assert [process.wait(120) for process in started] == [0, 0]
        return WeightGenerator.load(tmp_path / "fit")

    return fit_with_two
