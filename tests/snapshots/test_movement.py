from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pdiff_plugin import describe
from pdiff_plugin.snapshots import movement as module
from pdiff_plugin.snapshots.movement import movement, movement_in


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(*runs: Tensor) -> module.Movement:
    rows = torch.cat(runs)
    found = movement(rows @ rows.T, torch.repeat_interleave(torch.tensor([len(run) for run in runs])))
    assert found is not None
    return found


def test_equal_variances_in_k_directions_are_k_directions() -> None:
    orthogonal = torch.linalg.qr(normal(40, 5) - normal(40, 5).mean(dim=0)).Q  # columns of mean zero
    found = measured(orthogonal @ torch.linalg.qr(normal(90, 5, seed=1)).Q.T + 7)
    assert found.num_directions == pytest.approx(5)
    assert found.line_share == pytest.approx(0.2)


def test_a_line_is_told_and_independent_draws_and_a_walk_are_not() -> None:
    straight = torch.arange(100.0, dtype=torch.float64)[:, None] * normal(1, 500) + 0.1 * normal(100, 500, seed=1)
    line, noise, walk = (measured(rows) for rows in (straight, normal(100, 5000), normal(100, 5000).cumsum(dim=0)))
    assert line.is_line
    assert line.warning is not None
    assert "higher or a cyclic learning rate" in line.warning
    assert line.noise == pytest.approx(0.1 / math.sqrt(100**2 / 12), rel=0.1)
    assert not noise.is_line
    assert noise.warning is None
    assert noise.noise == pytest.approx(1.0, rel=0.05)
    assert walk.line_share == pytest.approx(6 / math.pi**2, rel=0.05)


def test_the_run_that_moves_in_most_directions_speaks_for_all_and_short_ones_do_not_count() -> None:
    line = torch.arange(30.0, dtype=torch.float64)[:, None] * normal(1, 500) + 50
    assert measured(line, -line, line[:4] + normal(4, 500)).is_line
    assert not measured(line, normal(30, 500)).is_line
    assert movement(torch.eye(9, dtype=torch.float64), torch.zeros(9)) is None
    assert movement(torch.ones(20, 20, dtype=torch.float64), torch.zeros(20)) is None


def test_a_large_store_is_read_in_part(make_store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(trajectories=2)
    whole = movement_in(store)
    read: list[int] = []
    rows = store.rows
    monkeypatch.setattr(store, "rows", lambda lo, hi, indices: read.append(hi - lo) or rows(lo, hi, indices))
    monkeypatch.setattr(module, "_PIECE", 4)
    monkeypatch.setattr(module, "_MAX_VALUES", 80 * 20)
    monkeypatch.setattr(module, "_MAX_SNAPSHOTS", 60)
    part = movement_in(store)
    assert whole is not None
    assert part is not None
    assert sum(read) <= 80 * 20 // 60
    assert part.line_share == pytest.approx(whole.line_share, abs=0.3)


def test_broken_snapshots_do_not_count(make_store) -> None:
    rows = (
        1 + 0.001 * torch.arange(40.0)[:, None] * normal(1, 40).abs().float()
    )  # short: the variances' logarithms bend
    rows[7, 3] = float("nan")
    found = movement_in(make_store(rows))
    assert found is not None
    assert found.is_line


def test_inspect_says_that_snapshots_hardly_differ(make_store, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (
        1 + 0.001 * torch.arange(40.0)[:, None] * normal(1, 40).abs().float()
    )  # short: the variances' logarithms bend
    document = describe.store(make_store(rows).path)
    assert document["movement"]["line_share"] > 0.99
    describe.show_store(document)
    assert "the snapshots hardly differ" in " ".join(capsys.readouterr().out.split())
