"""Shared pieces of the test suite."""

from __future__ import annotations

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
