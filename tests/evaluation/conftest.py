"""A small network on the handwritten digits, and stores of its snapshots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

NUM_TRAIN = 200


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    return x, torch.tensor(data.target, dtype=torch.int64)


def new_model(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def recorded(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named_tensors(model).items() if tensor.is_floating_point()}


def train_and_record(store: Path, seed: int, num_snapshots: int = 60) -> nn.Module:
    """Train 100 steps, then record each of ``num_snapshots`` more, as one trajectory."""
    x, y = digits()
    x, y = x[:NUM_TRAIN], y[:NUM_TRAIN]
    model = new_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(seed)
    layout = Layout.from_tensors(recorded(model))
    rows = []
    for step in range(100 + num_snapshots):
        pick = torch.randint(NUM_TRAIN, (32,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
        if step >= 100:
            rows.append(layout.flatten(recorded(model)))
    TrajectoryWriter(store, layout).write_chunk(torch.stack(rows), range(1, num_snapshots + 1))
    return model


@pytest.fixture(scope="session")
def eval_loader() -> DataLoader[tuple[Tensor, ...]]:
    x, y = digits()
    return DataLoader(TensorDataset(x[NUM_TRAIN:], y[NUM_TRAIN:]), batch_size=400)


@pytest.fixture(scope="session")
def one_run(
    tmp_path_factory: pytest.TempPathFactory, eval_loader: DataLoader[tuple[Tensor, ...]]
) -> tuple[Task, SnapshotStore]:
    path = tmp_path_factory.mktemp("one") / "store"
    model = train_and_record(path, seed=0)
    return Task(model, eval_loader, name="digits"), SnapshotStore.open(path)


@pytest.fixture(scope="session")
def three_runs(
    tmp_path_factory: pytest.TempPathFactory, eval_loader: DataLoader[tuple[Tensor, ...]]
) -> tuple[Task, SnapshotStore]:
    path = tmp_path_factory.mktemp("three") / "store"
    model = [train_and_record(path, seed) for seed in range(3)][-1]
    return Task(model, eval_loader, name="digits, three runs"), SnapshotStore.open(path)


@pytest.fixture
def store_of(tmp_path: Path) -> Callable[..., SnapshotStore]:
    """Write named tensors with a leading axis of snapshots as one store of one or more trajectories."""

    def write(*trajectories: dict[str, Tensor]) -> SnapshotStore:
        for tensors in trajectories:
            layout = Layout.from_tensors({name: tensor[0] for name, tensor in tensors.items()})
            flat = layout.flatten(tensors)
            TrajectoryWriter(tmp_path / "store", layout).write_chunk(flat, range(1, len(flat) + 1))
        return SnapshotStore.open(tmp_path / "store")

    return write
