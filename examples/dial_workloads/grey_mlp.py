"""What the sweeps of a whole small network on round grey images share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from workload_data import Split, grey

from .images import disc
from .sweep import Recipe, Sweep

RECIPE = Recipe(num_steps=600, batch_size=168, lr=1e-3, final_lr=1e-4, last_steps=60, every_n_steps=3, joint_steps=7200)


class GreySweep(Sweep):
    """A sweep of the network of w1, all of it."""

    def __init__(self, folder: Any, train: Split, test: Split, seed: int, smoke: bool = False) -> None:
        super().__init__(folder, as_discs(train), as_discs(test), seed, smoke)

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(1024, 64), nn.LayerNorm(64), nn.ReLU(),
            nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(),
            nn.Linear(16, 10),
        )  # fmt: skip

    def base_loss(self, model: nn.Module, rng: torch.Generator) -> Tensor:
        """The loss of one step of the training that every run starts from."""
        raise NotImplementedError

    def train_base(self, model: nn.Module) -> None:
        """Six epochs."""
        rng = torch.Generator().manual_seed(self.seed)
        num_steps = 60 if self.smoke else 6 * 300
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
        for _ in range(num_steps):
            optimizer.zero_grad()
            self.base_loss(model, rng).backward()
            optimizer.step()
            schedule.step()


def as_discs(split: Split) -> Split:
    """Grey images (N, 1, 32, 32), round."""
    x, y = grey(split)
    return x.view(-1, 1, 32, 32) * disc(32), y
