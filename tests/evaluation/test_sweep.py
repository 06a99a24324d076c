"""The curve of the diversity setting on a tiny problem."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pdiff_plugin import DiffusionConfig, FitConfig, Task, fit
from pdiff_plugin.evaluation.sweep import sweep


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x)
        return out


def test_more_diversity_takes_members_further_from_each_other_and_from_the_snapshots(walk_store: Path) -> None:
    generator = fit(walk_store, FitConfig(diffusion=DiffusionConfig(max_steps=40, eval_every_n_steps=20)))
    x = torch.randn(64, 5)
    task = Task(Net(), [(x, x.argmax(1))])
    curve = sweep(task, walk_store, generator, diversities=(0.25, 1.0, 2.0), num_members=8)
    assert [point["diversity"] for point in curve] == [0.25, 1.0, 2.0]
    for key, sign in (("nearest_snapshot_distance", 1), ("wrong_iou_mean", -1)):
        low, middle, high = (sign * point[key] for point in curve)
        assert low < middle < high, key
