"""Five corruptions at once on the small ResNet, known by their numbers or by 64 unlabelled images."""

from __future__ import annotations

import shutil
from functools import cached_property

import torch
from torch import Tensor

from pdiff_plugin import SnapshotStore
from pdiff_plugin.snapshots.conditions import set_conditions

from .images import blurred, noisy, recoloured
from .sweep import Condition, Recipe, Variant, run_name, sobol
from .trial import ResNetSweep

# Name -> recorded range, and what lies beyond it on either side (a blur below none there cannot be).
RANGES = {
    "blur": ((0.2, 1.5), (0.0, 1.8)),
    "noise": ((0.1, 0.8), (0.0, 1.0)),
    "brightness": ((-0.8, 0.8), (-1.1, 1.1)),
    "contrast": ((0.5, 1.5), (0.3, 1.8)),
    "saturation": ((0.3, 1.7), (0.0, 2.1)),
}
NUM_UNLABELLED = 64


class Domains(ResNetSweep):
    """96 points of five corruptions, 72 of them fitted, and 12 corners outside of them."""

    name = "domains"
    num_unlabelled = NUM_UNLABELLED
    recipe = Recipe(
        num_steps=40, batch_size=128, lr=1e-2, final_lr=5e-4, last_steps=5, joint_steps=1200, fine_tune_steps=()
    )

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        return (9, 2, 2) if self.smoke else (72, 24, 12)

    def conditions(self) -> list[Condition]:
        fitted, inside, outside = self.sizes
        low, high = (torch.tensor([ends[side] for ends, _ in RANGES.values()]) for side in (0, 1))
        points = low + (high - low) * sobol(fitted + inside, len(RANGES), self.seed)
        rng = torch.Generator().manual_seed(self.seed)
        corners = torch.randperm(2 ** len(RANGES), generator=rng)[:outside].tolist()
        ends = [
            [beyond[corner >> place & 1] for place, (_, beyond) in enumerate(RANGES.values())] for corner in corners
        ]
        return [dict(zip(RANGES, values, strict=True)) for values in [*points.tolist(), *ends]]

    def variants(self) -> list[Variant]:
        held_out = [run_name(number) for number in range(self.sizes[0], sum(self.sizes))]
        return [
            Variant("five numbers", held_out, self.store),
            Variant("64 unlabelled images", held_out, self.folder / "store-statistics", original=self.of_statistics),
        ]

    def altered(self, x: Tensor, condition: Condition, rng: torch.Generator) -> Tensor:
        x = recoloured(blurred(x, condition["blur"]), *(condition[k] for k in ("brightness", "contrast", "saturation")))
        return noisy(x, condition["noise"], rng)

    def record(self) -> None:
        """Also the second reading of the store: the same runs, their conditions measured on unlabelled images."""
        super().record()
        path = self.folder / "store-statistics"
        if not path.exists():
            copied = path.with_name("store-copied")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(self.store, copied)
            conditions = enumerate(self.conditions())
            measured = {run_name(n): {"statistics": self.statistics(n, condition)} for n, condition in conditions}
            set_conditions(copied, measured)
            copied.rename(path)

    @torch.no_grad()
    def statistics(self, number: int, condition: Condition) -> list[float]:
        """Mean and standard deviation of each channel after the base's first block, over 64 images of the condition."""
        rng = torch.Generator().manual_seed(10_000 * self.seed + number)
        rows = torch.randint(len(self.train_split[0]), (NUM_UNLABELLED,), generator=rng)
        maps = self.base().stem(self.altered(self.train_split[0][rows], condition, rng))
        std, mean = torch.std_mean(maps, dim=(0, 2, 3))
        return torch.cat([mean, std]).tolist()

    @cached_property
    def _by_statistics(self) -> dict[tuple[float, ...], Condition]:
        measured = SnapshotStore.open(self.folder / "store-statistics").conditions
        return {
            tuple(measured[run_name(number)]["statistics"]): condition
            for number, condition in enumerate(self.conditions())
        }

    def of_statistics(self, condition: Condition) -> Condition:
        return self._by_statistics[tuple(condition["statistics"])]
