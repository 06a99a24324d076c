"""A control that should lose: one weight between two losses, where a mixture of the two ends is enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload_data import loader

from pdiff_plugin import SnapshotStore, Task, WeightGenerator

from .grey_mlp import RECIPE, GreySweep
from .images import noisy
from .sweep import Condition, ExtraRow, Variant, run_name

NOISE = 6.0  # with less, one network answers both about as well as two do


class Tradeoff(GreySweep):
    """(1 - share) x the loss on clean images + share x that on noisy ones, for an MLP; 21 shares, every other held out.

    It is judged on images of which that share is noisy, so that the loss there is the one that was trained.
    """

    name = "tradeoff"
    recipe = replace(RECIPE, joint_steps=6600)

    def base_loss(self, model: nn.Module, rng: torch.Generator) -> Tensor:
        """At a share that is drawn anew for every batch."""
        return self.loss(model, {"share": float(torch.rand((), generator=rng))}, rng)

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
