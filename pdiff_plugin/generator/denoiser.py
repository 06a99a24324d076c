"""The denoiser: a small residual network on latents.

Shapes: B latents in a batch, K latent width, R trajectories, W hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_features(time: Tensor, num_features: int) -> Tensor:
    """Sines and cosines of times in [0, 1], (B,) -> (B, num_features) (Vaswani et al. 2017, section 3.5)."""
    half = num_features // 2
    # 1000 t spans the range for which the usual frequencies (1 down to 1/10000) were chosen.
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=time.device) / half)
    angles = 1000.0 * time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """A pre-norm residual block whose normalised input is scaled and shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """(B, W), (B, W) -> (B, W)."""
        scale, shift = self.condition(condition).chunk(2, dim=1)
        h_norm = self.norm(h) * (1.0 + scale) + shift
        out: Tensor = h + self.down(F.silu(self.up(h_norm)))
        return out


class Denoiser(nn.Module):
    """Predicts noise or velocity from noised latents, their times and the trajectory they belong to.

    Args:
        latent_dim: K.
        width: W.
        num_blocks: residual blocks.
        num_trajectories: R; with one, no condition on the trajectory is built.
    """

    def __init__(self, latent_dim: int, width: int, num_blocks: int, num_trajectories: int = 1) -> None:
        super().__init__()
        self.latent_dim, self.width, self.num_trajectories = latent_dim, width, num_trajectories
        self.inlet = nn.Linear(latent_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.trajectory = nn.Embedding(num_trajectories, width) if num_trajectories > 1 else None
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, latent_dim)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(self, x: Tensor, time: Tensor, trajectory: Tensor | None = None) -> Tensor:
        """Answer for noised latents.

        Args:
            x: (B, K).
            time: (B,) in [0, 1].
            trajectory: (B,) int64 in [0, R); needed when R > 1.

        Returns:
            (B, K).
        """
        condition = self.time(time_features(time, self.width))
        if self.trajectory is not None:
            condition = condition + self.trajectory(trajectory)
        condition = F.silu(condition)
        h = self.inlet(x)
        for block in self.blocks:
            h = block(h, condition)
        out: Tensor = self.outlet(self.norm(h))
        return out
