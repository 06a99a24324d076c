"""The denoisers: networks on latents, what makes their task easy, and their making. All are called alike,
``denoiser(x, time, condition)``.

Shapes: B latents in a batch, K latent width, R trajectories, W hidden width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff_plugin.config import DiffusionConfig, FitConfig
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.condition_frames import ConditionFrames
from pdiff_plugin.generator.diffusion import gaussian_prediction, prediction_spread, signal_and_sigma
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.layers import BatchNorm1d, Conv1d, Embedding, LayerNorm, Linear


def time_features(time: Tensor, num_features: int) -> Tensor:
    """Sines and cosines of times in [0, 1], (B,) -> (B, num_features) (Vaswani et al. 2017, section 3.5)."""
    half = num_features // 2
    # 1000 t spans the range for which the usual frequencies (1 down to 1/10000) were chosen.
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=time.device, dtype=time.dtype) / half)
    angles = 1000.0 * time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """A pre-norm residual block whose normalised input is scaled and shifted by the context."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition = Linear(width, 2 * width)
        self.up = Linear(width, 2 * width)
        self.down = Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, h: Tensor, context: Tensor, rows: Tensor | None = None) -> Tensor:
        """(B, W), and a context (B, W), (1, W), or (R, W) of which row b takes the one at ``rows[b]`` -> (B, W)."""
        context = self.condition(context)
        scale, shift = (context if rows is None else context[rows]).chunk(2, dim=1)
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
        num_features: F of a condition; with none, no condition on features is built.
    """

    def __init__(
        self, latent_dim: int, width: int, num_blocks: int, num_trajectories: int = 1, num_features: int = 0
    ) -> None:
        super().__init__()
        self.latent_dim, self.width, self.num_trajectories = latent_dim, width, num_trajectories
        self.inlet = Linear(latent_dim, width)
        self.time = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.trajectory = Embedding(num_trajectories, width) if num_trajectories > 1 else None
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.norm = LayerNorm(width)
        self.outlet = Linear(width, latent_dim)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)
        self.features = _feature_network(num_features, width)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Answer for noised latents.

        Args:
            x: (B, K).
            time: (B,) in [0, 1]; or (1,) for all rows alike, as samplers ask, which costs a third less.
            condition: of the B rows.

        Returns:
            (B, K).
        """
        context = self.time(time_features(time, self.width))
        rows: Tensor | None = None
        if self.trajectory is not None:
            if len(time) == 1 and self.num_trajectories < len(x):
                context, rows = context + self.trajectory.weight, condition.trajectory
            else:
                context = context + self.trajectory(condition.trajectory)
        if self.features is not None:
            context = context + self.features(condition.features)
        context = F.silu(context)
        h = self.inlet(x)
        for block in self.blocks:
            h = block(h, context, rows)
        out: Tensor = self.outlet(self.norm(h))
        return out


def _feature_network(num_features: int, width: int) -> nn.Sequential | None:
    """Embeds the features of a condition, (B, F) -> (B, width)."""
    return nn.Sequential(Linear(num_features, width), nn.SiLU(), Linear(width, width)) if num_features else None


class ConvDenoiser(nn.Module):
    """The denoiser of the p-diff paper (arXiv 2402.13144): convolutions of stride one over the latent, with skips.

    The embedding of the time is added to every layer's input.

    Args:
        latent_dim: length of its input; must be even.
        channels: of the hidden layers, an odd number of them.
        kernel_size: of every convolution.
        num_trajectories: with more than one, an embedding of the trajectory joins that of the time.
        num_features: with any, an embedding of the condition joins that of the time.
    """

    def __init__(
        self,
        latent_dim: int,
        channels: tuple[int, ...],
        kernel_size: int,
        num_trajectories: int = 1,
        num_features: int = 0,
    ) -> None:
        super().__init__()
        self.latent_dim, self.num_trajectories = latent_dim, num_trajectories
        self.time = nn.Sequential(Linear(256, latent_dim), nn.SiLU(), Linear(latent_dim, latent_dim))
        self.trajectory = Embedding(num_trajectories, latent_dim) if num_trajectories > 1 else None
        widths = (1, *channels, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                Conv1d(before, after, kernel_size, 1, kernel_size // 2),
                *([BatchNorm1d(after), nn.ELU()] if number < len(channels) else []),
            )
            for number, (before, after) in enumerate(pairwise(widths))
        )
        # Layers before the widest keep their output for the mirrored layer: 64, 128, 256 | 512 | 256, 128, 64.
        self.num_kept = len(channels) // 2
        self.features = _feature_network(num_features, latent_dim)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """(B, K), (B,) or (1,) in [0, 1], of B rows -> (B, K)."""
        context = self.time(time_features(time, 256))
        if self.trajectory is not None:
            context = context + self.trajectory(condition.trajectory)
        if self.features is not None:
            context = context + self.features(condition.features)
        h = x[:, None, :]
        kept: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            if number >= len(self.layers) - self.num_kept:
                h = h + kept.pop()
            h = layer(h + context[:, None, :])
            if number < self.num_kept:
                kept.append(h)
        return h[:, 0, :]


class GaussianPreconditioned(nn.Module):
    """The exact denoiser of normal latents plus what a network adds to it.

    A network of zeros samples the normal distribution of each trajectory's snapshots; training moves away from it only
    where that lowers the loss. The linear part of a trained denoiser is this one anyway (Wang & Vastola 2023, arXiv
    2311.10892), and inputs and outputs scaled to unit variance are Karras et al. 2022 (arXiv 2206.00364), section 5.

    Args:
        network: residual network on (x (B, k), time (B,), condition of B rows).
        std: (R, k), standard deviations of the local coordinates of each trajectory.
        process: prediction type and schedule.
    """

    std: Tensor

    def __init__(self, network: Denoiser, std: Tensor, process: DiffusionConfig) -> None:
        super().__init__()
        self.network, self.process = network, process
        self.register_buffer("std", std.clone())

    def std_of(self, condition: Condition) -> Tensor:
        """Standard deviations of the coordinates of the trajectories asked for, (B, k)."""
        return self.std[condition.trajectory]

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The prediction for noised coordinates, (B, k) -> (B, k)."""
        signal, sigma = signal_and_sigma(time, self.process)
        std, kind = self.std_of(condition), self.process.prediction_type
        answer = self.network(x / (signal.square() + sigma.square()).sqrt(), time, condition)
        gaussian = gaussian_prediction(x, std, signal, sigma, kind)
        out: Tensor = gaussian + prediction_spread(std, signal, sigma, kind) * answer
        return out

    def angular_velocity(self, y: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The network's answer at x = y √(signal² std² + sigma²), which is dy/dθ in ``sample_preconditioned_flow``."""
        signal, sigma = signal_and_sigma(time, self.process)
        x = y * (signal * self.std_of(condition)).square().add(sigma.square()).sqrt()
        out: Tensor = self.network(x / (signal.square() + sigma.square()).sqrt(), time, condition)
        return out


class OneStepMap(nn.Module):
    """From noise to clean coordinates in one evaluation: what a sampler makes of the same noise, learned.

    A network of zeros scales the noise to each coordinate's spread, as ``GaussianPreconditioned`` does.

    Args:
        network: residual network.
        std: (R, k), standard deviations of the local coordinates.
    """

    std: Tensor

    def __init__(self, network: Denoiser, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("std", std.clone())

    def forward(self, noise: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Noise (B, k), at time one, -> clean coordinates (B, k)."""
        clean: Tensor = self.std[condition.trajectory] * (noise + self.network(noise, time, condition))
        return clean


def new_denoiser(config: FitConfig, frames: Frames | ConditionFrames) -> nn.Module:
    """An untrained denoiser of the configured kind and size."""
    settings = config.diffusion
    if settings.network == "conv":
        sizes = (frames.num_trajectories, frames.num_features)
        return ConvDenoiser(frames.width, settings.conv_channels, settings.conv_kernel_size, *sizes)
    network = _residual_network(config, frames)
    return GaussianPreconditioned(network, frames.std, settings) if settings.precondition else network


def new_one_step(config: FitConfig, frames: Frames | ConditionFrames) -> OneStepMap:
    """An untrained map from noise to local coordinates, of the denoiser's size."""
    return OneStepMap(_residual_network(config, frames), frames.std)


def _residual_network(config: FitConfig, frames: Frames | ConditionFrames) -> Denoiser:
    settings = config.diffusion
    sizes = (frames.num_trajectories, frames.num_features)
    return Denoiser(frames.width, settings.width, settings.num_blocks, *sizes)
