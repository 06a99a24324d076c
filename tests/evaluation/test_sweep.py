"""The curves of the diversity setting and of the alternatives, on a tiny problem and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pdiff_plugin import DiffusionConfig, FitConfig, Task, fit
from pdiff_plugin.evaluation.sweep import Sweep, best_at, sweep
from pdiff_plugin.snapshots.store import SnapshotStore


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x)
        return out


@pytest.fixture
def points(walk_store: Path) -> list[dict[str, Any]]:
    generator = fit(walk_store, FitConfig(diffusion=DiffusionConfig(max_steps=40, eval_every_n_steps=20)))
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    task = Task(Net(), [(x, x.argmax(1))])
    return sweep(
        task,
        walk_store,
        generator,
        diversities=(0.25, 1.0, 2.0),
        settings={"average": (2, 8), "noise": (0.01, 0.1)},
        num_members=8,
    ).points


def test_more_diversity_takes_members_further_from_each_other_and_from_the_snapshots(points) -> None:
    curve = [point for point in points if point["set"] == "generated"]
    assert [point["setting"] for point in curve] == [0.25, 1.0, 2.0]
    for key, sign in (("nearest_snapshot_distance", 1), ("wrong_iou_mean", -1)):
        low, middle, high = (sign * point[key] for point in curve)
        assert low < middle < high, key


def test_every_setting_is_judged_and_the_margin_is_over_what_is_as_novel(points) -> None:
    settings = [(point["set"], point["setting"]) for point in points if point["set"] != "generated"]
    assert settings == [("snapshots", None), ("average", 2), ("average", 8), ("noise", 0.01), ("noise", 0.1)]
    others = [
        [(p["wrong_iou_max_to_snapshots"], p["accuracy_mean"]) for p in points if p["set"] == name]
        for name in ("snapshots", "average", "noise")
    ]
    for point in points:
        if point["set"] == "generated":
            best = best_at(point["wrong_iou_max_to_snapshots"], others)
            if best is None:
                assert point["margin"] is None
            else:
                assert point["margin"] == pytest.approx(point["accuracy_mean"] - best[0])
                assert 0 < point["margin_error"] < 0.5


def test_the_best_of_the_alternatives_is_read_off_their_lines() -> None:
    rising, falling = [(0.2, 0.5), (0.4, 0.7)], [(0.8, 0.9), (0.6, 0.6)]
    assert best_at(0.1, [rising, falling]) is None
    assert best_at(0.25, [rising, falling]) == (pytest.approx(0.55), 0, 0)
    assert best_at(0.35, [rising, falling]) == (pytest.approx(0.65), 0, 1)
    assert best_at(0.65, [rising, falling]) == (pytest.approx(0.7), 0, 1)  # 0.675 on the other line
    assert best_at(0.75, [rising, falling]) == (pytest.approx(0.825), 1, 0)
    assert best_at(0.9, [rising, falling]) == (pytest.approx(0.9), 1, 0)
    assert best_at(0.29, [rising, [(0.3, 0.8)]]) == (pytest.approx(0.59), 0, 0)
    assert best_at(0.3, [rising, [(0.3, 0.8)]]) == (0.8, 1, 0)


def test_the_snapshots_themselves_are_among_the_alternatives(walk_store: Path) -> None:
    generator = fit(walk_store, FitConfig(diffusion=DiffusionConfig(max_steps=40, eval_every_n_steps=20)))
    store = SnapshotStore.open(walk_store)
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    model = Net()
    model.load_state_dict(store.layout.unflatten(store.rows().mean(0, keepdim=True)[0]))
    task = Task(model, [(x, model(x).argmax(1))])
    recorded, far, near = sweep(task, store, generator, diversities=(0.05, 1.0), settings={}, num_members=8).points
    key = "wrong_iou_max_to_snapshots"
    assert far[key] < recorded[key] < near[key]
    assert near["margin"] == pytest.approx(near["accuracy_mean"] - recorded["accuracy_mean"])
    assert near["margin_over"] == "snapshots"
    assert far["margin"] is None


def test_the_sentence_says_where_generated_lies_above_and_where_below() -> None:
    generated = {"set": "generated", "margin_error": 0.001}
    points = [
        {"set": "snapshots", "setting": None},
        generated | {"setting": 0.5, "margin": 0.004},
        generated | {"setting": 1.0, "margin": -0.01},
        generated | {"setting": 1.5, "margin": 0.0015},
        generated | {"setting": 2.0, "margin": None},
    ]
    assert Sweep(points, "task", 8, 0).sentence == (
        "At equal novelty, by diversity, generated members are above the best baseline at 0.5 (+0.40 ± 0.10 "
        "points); level with the best baseline at 1.5 (+0.15 ± 0.10 points); below the best baseline at 1 "
        "(-1.00 ± 0.10 points); more novel than any baseline at 2."
    )
