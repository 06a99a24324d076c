"""A turning picture and a whole small network: one cyclic dial, and how far apart its stops may be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload_data import loader

from pdiff_plugin import SnapshotStore, Task, WeightGenerator, swap_

from .grey_mlp import RECIPE, GreySweep
from .images import rotated
from .sweep import Condition, ExtraRow, Variant, run_name

STEP = 15  # degrees between recorded angles


class Angle(GreySweep):
    """All 66,970 values of an MLP on grey images, at 24 angles."""

    name = "angle"
    kinds = ("angle:cyclic=360",)
    recipe = RECIPE

    def base_loss(self, model: nn.Module, rng: torch.Generator) -> Tensor:
        """Of images every one of which is turned by an angle of its own."""
        x, y = self.batch(rng)
        angles = 360 * torch.rand(len(x), generator=rng)
        return F.cross_entropy(model(rotated(x, angles).flatten(1)), y)

    def conditions(self) -> list[Condition]:
        return [{"angle": float(angle)} for angle in range(0, 360, 30 if self.smoke else STEP)]

    def variants(self) -> list[Variant]:
        """Every angle that is not fitted is judged; of the missing quarter only those inside it."""
        angles = [condition["angle"] for condition in self.conditions()]

        def runs(is_meant: Callable[[float], bool]) -> list[str]:
            return [run_name(number) for number, angle in enumerate(angles) if is_meant(angle)]

        if self.smoke:
            return [Variant("gaps of 60", runs(lambda angle: angle % 60 > 0), self.store)]
        gaps = [Variant(f"gaps of {gap}", runs(lambda a, gap=gap: a % gap > 0), self.store) for gap in (30, 45, 60)]
        others = runs(lambda angle: angle > 90 and angle % 30 > 0)
        return [*gaps, Variant("a missing quarter", runs(lambda angle: 0 < angle < 90), self.store, others)]

    def drawn(self, variant: Variant) -> list[Condition]:
        """Angles at random, none within a degree of a recorded one."""
        angles = 360 * torch.rand(1200, generator=torch.Generator().manual_seed(100 + self.seed))
        far = [angle for angle in angles.tolist() if 1 <= angle % STEP <= STEP - 1]
        return [{"angle": angle} for angle in far[: 20 if self.smoke else 1000]]

    def altered(self, x: Tensor, condition: Condition, rng: torch.Generator) -> Tensor:
        return rotated(x, condition["angle"]).flatten(1)

    def extra(self, variant: Variant, generator: WeightGenerator) -> dict[str, ExtraRow]:
        """Turn the image back, and give it to the weights that were recorded upright."""
        store = SnapshotStore.open(self.store)
        rows = store.rows(indices=store.trajectory_index == store.trajectories.index(run_name(0)))
        upright = copy.deepcopy(self.base())
        swap_(upright, store.layout.unflatten(rows.mean(dim=0)))

        def turned_back(condition: Condition) -> Task:
            turned = rotated(self.test_split[0], condition["angle"])
            x = rotated(turned, -condition["angle"]).flatten(1)
            return Task(upright, loader((x, self.test_split[1]), 500), name=self.name)

        return {"input turned back": turned_back}
