"""The distillation stage: learn in one evaluation what the sampler makes of the same noise.

Shapes: P pairs of noise and sample, k width of a trajectory's own coordinates, B pairs in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdiff_plugin.config import FitConfig
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.fitting.training import autocast, compiled, lr_factor, set_lr
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.denoiser import new_one_step
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.samplers import run_sampler

# Pairs are made once: fewer are learned by heart, more cost as much as the training.
_NUM_PAIRS = 8192
_PAIR_BATCH = 1024
_BATCH = 256
_LR = 2e-3
_REPORT_EVERY = 100


def distill(
    denoiser: nn.Module, frames: Frames, config: FitConfig, *, device: torch.device, runtime: Runtime
) -> nn.Module:
    """Train the one-step map on pairs of noise and what the natural sampler, which adds none, makes of it.

    Args:
        denoiser: the teacher, on ``device``.
        frames: of its coordinates.
        config: of the fit; ``distill_steps`` steps are taken.
        device: to train on.
        runtime: told the progress.

    Returns:
        The map, in eval mode.
    """
    total = config.diffusion.distill_steps
    rng = torch.Generator().manual_seed(config.seed + 3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed + 3)  # for the initial weights; the caller's state comes back
        student = new_one_step(config, frames).to(device)
    noise = torch.randn(_NUM_PAIRS, frames.width, generator=rng).to(device)
    condition = Condition(torch.arange(_NUM_PAIRS) % frames.num_trajectories).to(device)
    targets = _teach(denoiser, noise, condition, config)
    start = torch.ones(1, device=device, dtype=noise.dtype)
    optimizer = torch.optim.AdamW(student.parameters(), lr=_LR, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    student_map = compiled(student, config)
    for step in range(total):
        rows = torch.randint(_NUM_PAIRS, (_BATCH,), generator=rng).to(device)
        with autocast(config, device):
            value = (student_map(noise[rows], start, condition[rows]) - targets[rows]).square().mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        set_lr(optimizer, _LR * lr_factor(step, total, "cosine"))
        optimizer.step()
        if (step + 1) % _REPORT_EVERY == 0 or step + 1 == total:
            runtime.report("distill", step + 1, total, train_loss=float(value.detach()))
    return student.requires_grad_(False).eval()


@torch.no_grad()
def _teach(denoiser: nn.Module, noise: Tensor, condition: Condition, config: FitConfig) -> Tensor:
    pieces = [slice(start, start + _PAIR_BATCH) for start in range(0, len(noise), _PAIR_BATCH)]
    return torch.cat([run_sampler(denoiser, noise[piece], condition[piece], config.diffusion) for piece in pieces])
