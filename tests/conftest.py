"""Shared pieces of the test suite."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import TrajectoryWriter


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


@pytest.fixture
def walk_store(tmp_path: Path) -> Path:
    return write_walk(tmp_path / "store")


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
