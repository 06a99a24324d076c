"""The denoiser: a small residual network on latents.

Shapes: B latents in a batch, K latent width, R trajectories, W hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff_plugin.config import DiffusionConfig
from pdiff_plugin.generator.diffusion import gaussian_prediction, prediction_spread, signal_and_sigma


def time_features(time: Tensor, num_features: int) -> Tensor:
    """Sines and cosines of times in [0, 1], (B,) -> (B, num_features) (Vaswani et al. 2017, section 3.5)."""
    half = num_features // 2
    # 1000 t spans the range for which the usual frequencies (1 down to 1/10000) were chosen.
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=time.device, dtype=time.dtype) / half)
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

    def forward(self, h: Tensor, condition: Tensor, rows: Tensor | None = None) -> Tensor:
        """(B, W), and a condition (B, W), (1, W), or (R, W) of which row b takes the one at ``rows[b]`` -> (B, W)."""
        condition = self.condition(condition)
        scale, shift = (condition if rows is None else condition[rows]).chunk(2, dim=1)
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
            time: (B,) in [0, 1]; or (1,) for all rows alike, as samplers ask, which costs a third less.
            trajectory: (B,) int64 in [0, R); needed when R > 1.

        Returns:
            (B, K).
        """
        condition = self.time(time_features(time, self.width))
        rows: Tensor | None = None
        if self.trajectory is not None:
            if len(time) == 1 and self.num_trajectories < len(x):
                condition, rows = condition + self.trajectory.weight, trajectory
            else:
                condition = condition + self.trajectory(trajectory)
        condition = F.silu(condition)
        h = self.inlet(x)
        for block in self.blocks:
            h = block(h, condition, rows)
        out: Tensor = self.outlet(self.norm(h))
        return out


class GaussianPreconditioned(nn.Module):
    """The exact denoiser of normal latents plus what a network adds to it.

    A network of zeros samples the normal distribution of each trajectory's snapshots; training moves away from it only
    where that lowers the loss. The linear part of a trained denoiser is this one anyway (Wang & Vastola 2023, arXiv
    2311.10892), and inputs and outputs scaled to unit variance are Karras et al. 2022 (arXiv 2206.00364), section 5.

    Args:
        network: residual network on (x (B, k), time (B,), trajectory (B,)).
        std: (R, k), standard deviations of the local coordinates of each trajectory.
        config: prediction type and schedule.
    """

    std: Tensor

    def __init__(self, network: Denoiser, std: Tensor, config: DiffusionConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.register_buffer("std", std.clone())

    def std_of(self, trajectory: Tensor | None) -> Tensor:
        """(B, k) of the trajectories (B,); (1, k) when there is one and none is named."""
        return self.std[:1] if trajectory is None else self.std[trajectory]

    def forward(self, x: Tensor, time: Tensor, trajectory: Tensor | None = None) -> Tensor:
        """The prediction for noised coordinates, (B, k) -> (B, k)."""
        signal, sigma = signal_and_sigma(time, self.config)
        std, kind = self.std_of(trajectory), self.config.prediction_type
        answer = self.network(x / (signal.square() + sigma.square()).sqrt(), time, trajectory)
        gaussian = gaussian_prediction(x, std, signal, sigma, kind)
        out: Tensor = gaussian + prediction_spread(std, signal, sigma, kind) * answer
        return out

    def turn(self, y: Tensor, time: Tensor, trajectory: Tensor | None = None) -> Tensor:
        """The network's answer at x = y √(signal² std² + sigma²): how fast ``y`` turns; see ``sample_turning``."""
        signal, sigma = signal_and_sigma(time, self.config)
        x = y * (signal * self.std_of(trajectory)).square().add(sigma.square()).sqrt()
        out: Tensor = self.network(x / (signal.square() + sigma.square()).sqrt(), time, trajectory)
        return out


class OneStepMap(nn.Module):
    """From noise to clean coordinates in one evaluation: what a sampler makes of the same noise, learned.

    A network of zeros scales the noise to each coordinate's spread, as ``GaussianPreconditioned`` does.

    Args:
        network: residual network, asked at time 1.
        std: (R, k), standard deviations of the local coordinates.
    """

    std: Tensor

    def __init__(self, network: Denoiser, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("std", std.clone())

    def forward(self, noise: Tensor, trajectory: Tensor) -> Tensor:
        """Noise (B, k) of trajectories (B,) -> clean coordinates (B, k)."""
        answer = self.network(noise, torch.ones(1, device=noise.device, dtype=noise.dtype), trajectory)
        clean: Tensor = self.std[trajectory] * (noise + answer)
        return clean
