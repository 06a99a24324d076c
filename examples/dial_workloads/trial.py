"""Rotation and noise on the small ResNet: the norms and the head follow two dials."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from workload_data import loader
from workloads import SmallResNet, train_all

from .images import noisy, rotated
from .sweep import Condition, Recipe, Sweep, Variant, run_name, sobol


class ResNetSweep(Sweep):
    """The norms (weights, biases, running statistics) and the head of the small ResNet: 11,146 values."""

    num_tests = 600
    num_unlabelled = 512
    layers = ("norms", "head")

    def build(self) -> nn.Module:
        return SmallResNet()

    def train_base(self, model: nn.Module) -> None:
        batches = loader(self.train_split, 16 if self.smoke else 128, shuffle=True)
        train_all(model, batches, num_epochs=1 if self.smoke else 3)

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        return [p for name, p in model.named_parameters() if name.rpartition(".")[0] in norms | {"head"}]


class Trial(ResNetSweep):
    """64 points of the plane angle x noise; the last 16 are held out."""

    name = "trial"
    kinds = ("angle:cyclic=360",)
    recipe = Recipe(
        num_steps=60, batch_size=128, lr=1e-2, final_lr=5e-4, last_steps=6, joint_steps=1200, fine_tune_steps=(10,)
    )

    def conditions(self) -> list[Condition]:
        points = sobol(8 if self.smoke else 64, 2, self.seed)
        return [{"angle": float(360 * angle), "noise": float(noise)} for angle, noise in points]

    def variants(self) -> list[Variant]:
        count = len(self.conditions())
        return [Variant("", [run_name(number) for number in range(3 * count // 4, count)], self.store)]

    def altered(self, x: Tensor, condition: Condition, rng: torch.Generator) -> Tensor:
        return noisy(rotated(x, condition["angle"]), condition["noise"], rng)
