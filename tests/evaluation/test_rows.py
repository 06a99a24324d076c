from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pdiff_plugin.evaluation.rows import SnapshotRows
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.store import SnapshotStore

Write = Callable[..., SnapshotStore]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_distances_are_in_deviations_of_each_tensor(store_of: Write) -> None:
    small, large = normal(30, 400), 1000 * normal(30, 600, seed=1)
    rows = SnapshotRows.measure(store_of({"small": small, "large": large, "still": torch.ones(30, 50)}))
    mean = WeightSet({"small": small.mean(0)[None], "large": large.mean(0)[None], "still": torch.zeros(1, 50)})
    assert float(rows.distances(rows.products(mean)).mean()) == pytest.approx(1.0, rel=0.02)
    off_diagonal = rows.squared_distances[~torch.eye(30, dtype=torch.bool)].sqrt()
    assert float(off_diagonal.mean()) == pytest.approx(2**0.5, rel=0.03)


def test_distances_to_snapshots_agree_with_those_between_snapshots(store_of: Write) -> None:
    values = {"a": normal(20, 7), "bn.running_var": normal(20, 3, seed=1).exp()}
    rows = SnapshotRows.measure(store_of(values))
    torch.testing.assert_close(
        rows.distances(rows.products(rows.members(torch.arange(20)))).square(),
        rows.squared_distances,
        rtol=1e-9,
        atol=1e-12,
    )


def test_a_tensor_whose_deviation_is_exactly_one_still_counts(store_of: Write) -> None:
    values = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(6, 1)
    rows = SnapshotRows.measure(store_of({"a": values}))
    assert float(rows.distances(rows.products(WeightSet({"a": torch.zeros(1, 2)}))).max()) == pytest.approx(1.0)


def test_a_block_is_a_fifteenth_of_the_trajectory_to_each_side(store_of: Write) -> None:
    rows = SnapshotRows.measure(store_of({"a": normal(30, 4)}, {"a": normal(4, 4, seed=1)}))
    assert rows.same_block[10, :30].nonzero().squeeze(1).tolist() == [8, 9, 10, 11, 12]
    assert not rows.same_block[10, 30:].any()
    assert torch.equal(rows.same_block[30:, 30:], torch.eye(4, dtype=torch.bool))


def test_repeated_snapshots_are_counted(store_of: Write) -> None:
    values = normal(12, 5)
    values[7] = values[3]
    values[11] = values[3]
    assert SnapshotRows.measure(store_of({"a": values})).num_duplicates == 2


def test_a_large_store_read_block_by_block_gives_the_same(store_of: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of({"a": normal(12, 50), "b": normal(12, 3, seed=1)})
    kept = SnapshotRows.measure(store)
    monkeypatch.setattr("pdiff_plugin.evaluation.rows._KEEP_BYTES", 0)
    streamed = SnapshotRows.measure(store)
    other = WeightSet({"a": normal(2, 50, seed=2), "b": normal(2, 3, seed=3)})
    assert torch.equal(kept.products(other)[0], streamed.products(other)[0])
