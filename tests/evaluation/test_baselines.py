from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pdiff_plugin.evaluation import baselines
from pdiff_plugin.evaluation.baselines import BASELINES, rng_for
from pdiff_plugin.evaluation.rows import SnapshotRows, evenly_spaced
from pdiff_plugin.snapshots.store import SnapshotStore

Write = Callable[..., SnapshotStore]


@pytest.fixture
def rows(store_of: Write) -> SnapshotRows:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 3, 5, generator=rng) * 0.1 + torch.randn(3, 5, generator=rng)
    variance = (torch.randn(40, 5, generator=rng) * 2).exp() * 1e-3  # spans five powers of ten
    return SnapshotRows.measure(store_of({"weight": weight, "bn.running_var": variance}))


def test_snapshots_are_evenly_spaced_rows(rows: SnapshotRows) -> None:
    drawn = BASELINES["snapshots"].draw(rows, 4, rng_for(0, "snapshots")).made(rows)
    expected = [rows.store.state_dict(i)["weight"] for i in (0, 13, 26, 39)]
    assert torch.equal(drawn["weight"], torch.stack(expected))


def test_fewer_snapshots_than_members_are_all_taken_once() -> None:
    assert evenly_spaced(5, 32).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(300, 1).tolist() == [299]


def test_an_average_of_all_snapshots_is_their_mean(rows: SnapshotRows) -> None:
    drawn = baselines.average(rows, 3, rng_for(0, "average"), k=40).made(rows)
    mean = rows.store.rows().double().mean(0)
    torch.testing.assert_close(drawn["weight"][2].flatten().double(), mean[:15], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(drawn["bn.running_var"][0].double(), mean[15:], rtol=1e-6, atol=0)


def test_averages_of_16_vary_a_quarter_as_much_as_snapshots(rows: SnapshotRows) -> None:
    drawn = baselines.average(rows, 400, rng_for(0, "average")).made(rows)
    of_snapshots = rows.store.rows()[:, :15].var(dim=0).mean()
    # Drawn without repeats, 16 of 40: variance (1 - 16/40) / 16 of the snapshots'.
    assert float(drawn["weight"].var(dim=0).mean() / of_snapshots) == pytest.approx(0.6 / 16, rel=0.1)


def test_gaussian_has_each_coordinates_mean_and_deviation(rows: SnapshotRows) -> None:
    drawn = baselines.gaussian(rows, 4000, rng_for(0, "gaussian")).made(rows)
    theirs = rows.store.rows()
    torch.testing.assert_close(drawn["weight"].flatten(1).mean(0), theirs[:, :15].mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(drawn["weight"].flatten(1).std(0), theirs[:, :15].std(0), rtol=0.05, atol=0)
    logs = drawn["bn.running_var"].log()
    torch.testing.assert_close(logs.mean(0), theirs[:, 15:].log().mean(0), rtol=0, atol=0.15)


def test_noise_is_relative_to_the_values_of_each_tensor(rows: SnapshotRows) -> None:
    drawn = baselines.noise(rows, 40, rng_for(0, "noise")).made(rows)
    added = drawn["weight"] - rows.members(torch.arange(40))["weight"]
    expected = 0.05 * rows.members(torch.arange(40))["weight"].flatten(1).std(dim=1, unbiased=False).mean()
    assert float(added.std()) == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("name", list(BASELINES))
def test_no_running_variance_falls_to_zero(rows: SnapshotRows, name: str) -> None:
    assert float(BASELINES[name].draw(rows, 200, rng_for(0, name)).made(rows)["bn.running_var"].min()) > 0


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_set_depends_on_its_seed_alone(rows: SnapshotRows, name: str) -> None:
    first, again = (BASELINES[name].draw(rows, 6, rng_for(3, name)).made(rows) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_half_precision_weights_stay_in_their_dtype(store_of: Write) -> None:
    values = (torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * 3 - 14).exp().half()
    rows = SnapshotRows.measure(store_of({"bn.running_var": values.clamp_min(6e-8)}))
    drawn = baselines.gaussian(rows, 200, rng_for(0, "gaussian")).made(rows)["bn.running_var"]
    assert drawn.dtype == torch.float16
    assert float(drawn.min()) > 0
