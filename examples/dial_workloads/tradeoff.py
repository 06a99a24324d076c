"""A control that should lose: one weight between two losses, where a mixture of the two ends is enough."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload_data import Split, loader

from pdiff_plugin import SnapshotStore, Task, WeightGenerator

from .angle import as_discs, grey_mlp
from .images import noisy
from .sweep import Condition, ExtraRow, Recipe, Sweep, Variant, run_name

NOISE = 6.0  # with less, one network answers both about as well as two do


class Tradeoff(Sweep):
    """(1 - share) x the loss on clean images + share x that on noisy ones, for an MLP; 21 shares, every other held out.

    It is judged on images of which that share is noisy, so that the loss there is the one that was trained.
    """

    name = "tradeoff"
    recipe = Recipe(
        num_steps=600, batch_size=168, lr=1e-3, final_lr=1e-4, last_steps=60, every_n_steps=3, joint_steps=6600
    )

    def __init__(self, folder: Any, train: Split, test: Split, seed: int, smoke: bool = False) -> None:
        super().__init__(folder, as_discs(train), as_discs(test), seed, smoke)

    def build(self) -> nn.Module:
        return grey_mlp()

    def train_base(self, model: nn.Module) -> None:
        """Six epochs in which the share is drawn anew for every batch."""
        rng = torch.Generator().manual_seed(self.seed)
        num_steps = 60 if self.smoke else 6 * 300
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
        for _ in range(num_steps):
            optimizer.zero_grad()
            self.loss(model, {"share": float(torch.rand((), generator=rng))}, rng).backward()
            optimizer.step()
            schedule.step()

    def conditions(self) -> list[Condition]:
        last = 8 if self.smoke else 20
        return [{"share": number / last} for number in range(last + 1)]

    def variants(self) -> list[Variant]:
        return [Variant("", [run_name(number) for number in range(1, len(self.conditions()), 2)], self.store)]

    def loss(self, model: nn.Module, condition: Condition, rng: torch.Generator) -> Tensor:
        x, y = self.batch(rng)
        share = condition["share"]
        clean = F.cross_entropy(model(x.flatten(1)), y)
        found: Tensor = (1 - share) * clean + share * F.cross_entropy(model(noisy(x, NOISE, rng).flatten(1)), y)
        return found

    def task(self, **condition: Any) -> Task:
        x, y = self.test_split
        rng = torch.Generator().manual_seed(77)
        is_noisy = torch.rand(len(x), generator=rng) < condition["share"]  # the same images become noisy in turn
        x = torch.where(is_noisy[:, None, None, None], noisy(x, NOISE, rng), x).flatten(1)
        return Task(self.base(), loader((x, y), 500), name=self.name)

    def extra(self, variant: Variant, generator: WeightGenerator) -> dict[str, ExtraRow]:
        """The line between the averages of the two ends."""
        store = SnapshotStore.open(self.store)
        ends = []
        for number in (0, len(self.conditions()) - 1):
            of_run = store.trajectory_index == store.trajectories.index(run_name(number))
            ends.append(store.rows(indices=of_run).mean(dim=0))

        def soup(condition: Condition) -> dict[str, Tensor]:
            return store.layout.unflatten(torch.lerp(ends[0], ends[1], condition["share"]))

        return {"soup of the two ends": soup}
