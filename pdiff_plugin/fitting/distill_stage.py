"""The distillation stage: learn in one evaluation what the sampler makes of the same noise.

Shapes: P pairs of noise and sample, k width of a trajectory's own coordinates, B pairs in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdiff_plugin.config import FitConfig
from pdiff_plugin.fitting.condition_stage import FittedCondition
from pdiff_plugin.fitting.diffusion_stage import FittedDiffusion
from pdiff_plugin.fitting.runtime import Runtime, pick_device
from pdiff_plugin.fitting.training import Schedule, Training, compiled, seeded
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.denoiser import new_one_step
from pdiff_plugin.generator.samplers import run_sampler

# Pairs are made once: fewer are learned by heart, more cost as much as the training.
_NUM_PAIRS = 8192
_PAIR_BATCH = 1024
_BATCH = 256
_LR = 2e-3
_REPORT_EVERY = 100


def distill(fitted: FittedDiffusion | FittedCondition, config: FitConfig, runtime: Runtime) -> nn.Module:
    """Train the one-step map on pairs of noise and what the natural sampler, which adds none, makes of it.

    Args:
        fitted: the teacher, on the device to train on.
        config: of the fit; ``distill_steps`` steps are taken.
        runtime: told the progress.

    Returns:
        The map, in eval mode.
    """
    device, seed = pick_device(config.device), config.seed + 3
    student = seeded(lambda: new_one_step(config, fitted.frames), seed).to(device)
    schedule = Schedule(config.diffusion.distill_steps, _LR, weight_decay=0.0)
    training = Training("distill", {"student": student}, schedule, config, runtime, seed)
    noise = torch.randn(_NUM_PAIRS, fitted.frames.width, generator=training.rng, dtype=torch.float32).to(device)
    condition = fitted.draw(_NUM_PAIRS, training.rng).to(device)
    targets, predict = _teach(fitted.denoiser, noise, condition, config), compiled(student, config)
    start = torch.ones(1, device=device, dtype=noise.dtype)

    def loss() -> Tensor:
        rows = torch.randint(_NUM_PAIRS, (_BATCH,), generator=training.rng).to(device)
        value: Tensor = (predict(noise[rows], start, condition[rows]) - targets[rows]).square().mean()
        return value

    while training.step < schedule.max_steps:
        training.report(training.advance(loss), _REPORT_EVERY)
    return student.requires_grad_(False).eval()


@torch.no_grad()
def _teach(denoiser: nn.Module, noise: Tensor, condition: Condition, config: FitConfig) -> Tensor:
    pieces = [slice(start, start + _PAIR_BATCH) for start in range(0, len(noise), _PAIR_BATCH)]
    return torch.cat([run_sampler(denoiser, noise[piece], condition[piece], config.diffusion) for piece in pieces])
