from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pdiff_plugin import DiffusionConfig, FitConfig, Task, check_alignment, evaluate, fit, sweep
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.alignment import Alignment, recognise
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

Run = tuple[Task, SnapshotStore]
ALIGNED = FitConfig(align="rebasin", diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=40))


class Residual(nn.Module):
    """Looks like a plain stack by names and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits: Tensor = self.head(x + torch.relu(self.block(x)))
        return logits


@pytest.fixture
def shuffled(one_run: Run, tmp_path: Path) -> SnapshotStore:
    """A run and the same run with its hidden units in another order."""
    store = one_run[1]
    layout = store.layout
    order = torch.randperm(recognise(layout).layers[0][1], generator=torch.Generator().manual_seed(1))
    columns = Alignment(layout, {"": order}).columns("", 0, layout.num_values)
    for rows in (store.rows(), store.rows()[:, columns]):
        TrajectoryWriter(tmp_path / "store", layout).write_chunk(rows, store.steps.tolist())
    return SnapshotStore.open(tmp_path / "store")


def test_a_plain_network_passes_the_check(one_run: Run) -> None:
    task, store = one_run
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    check_alignment(task)
    check_alignment(task, store.state_dict(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())


def test_a_shortcut_that_names_and_shapes_do_not_show_fails_the_check(
    eval_loader: DataLoader[tuple[Tensor, ...]],
) -> None:
    with pytest.raises(ConfigError, match="changes what this model computes"):
        check_alignment(Task(Residual(), eval_loader))


def test_a_generator_that_was_aligned_although_its_network_has_a_shortcut_is_refused(
    eval_loader: DataLoader[tuple[Tensor, ...]], tmp_path: Path
) -> None:
    model = Residual()
    layout = Layout.from_tensors(dict(model.named_parameters()))
    for _ in range(2):
        centre = torch.randn(layout.num_values)
        rows = centre + 0.1 * torch.randn(20, layout.num_values)
        TrajectoryWriter(tmp_path / "store", layout).write_chunk(rows, range(1, 21))
    generator = fit(tmp_path / "store", ALIGNED)
    with pytest.raises(ConfigError, match="no plain stack"):
        evaluate(Task(model, eval_loader), tmp_path / "store", generator, sets="core", num_members=4)


def test_averages_and_distances_are_taken_in_the_order_of_the_generator(one_run: Run, shuffled: SnapshotStore) -> None:
    task, names = one_run[0], ["snapshots", "generated", "gaussian"]
    generator = fit(shuffled, ALIGNED)

    aligned = evaluate(task, shuffled, generator, num_members=8, sets=names).sets
    generator.alignment = None
    as_recorded = evaluate(task, shuffled, generator, num_members=8, sets=names).sets

    assert aligned["gaussian"]["accuracy_mean"] > aligned["snapshots"]["accuracy_mean"] - 0.02
    assert as_recorded["gaussian"]["accuracy_mean"] < aligned["gaussian"]["accuracy_mean"] - 0.1
    assert aligned["snapshots"]["accuracy_mean"] == pytest.approx(as_recorded["snapshots"]["accuracy_mean"])
    assert aligned["generated"]["accuracy_mean"] > aligned["snapshots"]["accuracy_mean"] - 0.05


def test_the_curve_of_an_aligned_generator_has_the_distances_of_its_evaluation(
    one_run: Run, shuffled: SnapshotStore
) -> None:
    generator = fit(shuffled, ALIGNED)

    curve = sweep(one_run[0], shuffled, generator, diversities=(1.0,), settings={}, num_members=4)

    judged = evaluate(one_run[0], shuffled, generator, num_members=4, sets=["generated"]).sets["generated"]
    point = next(point for point in curve.points if point["set"] == "generated")
    assert point["nearest_snapshot_distance"] == pytest.approx(judged["nearest_snapshot_distance"])
