"""Noise schedules, what a denoiser predicts, and the training loss of the latent diffusion.

Shapes: B latents in a batch, K latent width, T timesteps of the noise schedule.

Notation (name here -> in the papers): ``alpha_bar`` -> ᾱ_t = Π(1 - β_s) of Ho et al. 2020 (arXiv 2006.11239), eq. 4;
``v_prediction`` -> v = √ᾱ ε - √(1-ᾱ) x_0 of Salimans & Ho 2022 (arXiv 2202.00512), section 4; ``flow`` -> the straight
path x_t = (1-t) x_0 + t ε with velocity ε - x_0 of Liu et al. 2022 (arXiv 2209.03003), with noise at t = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_plugin.config import DiffusionConfig, PredictionType

# (x_t (B, K), time (B,) in [0, 1], or (1,) for all rows alike) -> prediction (B, K)
Predictor = Callable[[Tensor, Tensor], Tensor]


def linear_alpha_bars(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Signal power ᾱ_t left at t = 0..T-1 under linearly growing β, (T,) float64."""
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return (1.0 - betas).cumprod(0)


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0) = N(√ᾱ x_0, (1-ᾱ) I).

    Args:
        x0: clean latents, (B, K).
        noise: standard normal draw, (B, K).
        alpha_bar: signal power left at each row's timestep, (B,), in (0, 1].
    """
    return alpha_bar.sqrt()[:, None] * x0 + (1.0 - alpha_bar).sqrt()[:, None] * noise


def split_prediction(
    prediction: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """What a prediction says of the clean latents and of the noise.

    Args:
        prediction: the denoiser's output, (B, K).
        x_t: its input, (B, K).
        alpha_bar: scalar or (B, 1).
        prediction_type: ``epsilon`` or ``v_prediction``.

    Returns:
        x_0 and ε, both (B, K).
    """
    signal, sigma = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / signal, prediction
    return signal * x_t - sigma * prediction, sigma * x_t + signal * prediction


@dataclass(frozen=True)
class NoisedBatch:
    """A training batch: inputs (B, K), times (B,) in [0, 1], targets (B, K)."""

    inputs: Tensor
    times: Tensor
    targets: Tensor


def noised_batch(x0: Tensor, noise: Tensor, uniform: Tensor, config: DiffusionConfig) -> NoisedBatch:
    """Noise clean latents to random times and say what the denoiser should answer.

    Args:
        x0: clean latents, (B, K).
        noise: standard normal draw, (B, K).
        uniform: draw from [0, 1), (B,), that fixes each row's time.
        config: names the prediction type and the schedule.
    """
    if config.prediction_type == "flow":
        t = uniform[:, None]
        return NoisedBatch((1.0 - t) * x0 + t * noise, uniform, noise - x0)
    alpha_bars = linear_alpha_bars(config.num_timesteps, config.beta_start, config.beta_end)
    timesteps = (uniform * config.num_timesteps).long().clamp_max(config.num_timesteps - 1)  # (B,)
    alpha_bar = alpha_bars.to(x0)[timesteps]
    if config.prediction_type == "epsilon":
        targets = noise
    else:
        targets = alpha_bar.sqrt()[:, None] * noise - (1.0 - alpha_bar).sqrt()[:, None] * x0
    return NoisedBatch(add_noise(x0, noise, alpha_bar), timestep_to_time(timesteps, config), targets)


def timestep_to_time(timesteps: Tensor, config: DiffusionConfig) -> Tensor:
    """Timesteps 0..T-1 as the denoiser's time input in [0, 1]."""
    return timesteps.float() / (config.num_timesteps - 1)


def signal_and_sigma(time: Tensor, config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """Factors of clean latents and of noise in x_t at times in [0, 1], (B,) -> (B, 1) each."""
    if config.prediction_type == "flow":
        return 1.0 - time[:, None], time[:, None]
    alpha_bars = linear_alpha_bars(config.num_timesteps, config.beta_start, config.beta_end).to(time)
    alpha_bar = alpha_bars[(time * (config.num_timesteps - 1)).round().long()][:, None]
    return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()


def gaussian_prediction(x: Tensor, std: Tensor, signal: Tensor, sigma: Tensor, kind: PredictionType) -> Tensor:
    """What the best denoiser answers when the clean latents are N(0, std²), known in closed form.

    Args:
        x: noised latents, (B, K).
        std: standard deviation of the clean ones, (B, K) or (K,).
        signal: factor of the clean latents in ``x``, (B, 1).
        sigma: factor of the noise, (B, 1).
        kind: what is to be predicted.
    """
    residual = x / (signal * std).square().add(sigma.square())
    x0, epsilon = std.square() * signal * residual, sigma * residual
    if kind == "flow":
        return epsilon - x0
    return epsilon if kind == "epsilon" else signal * epsilon - sigma * x0


def prediction_spread(std: Tensor, signal: Tensor, sigma: Tensor, kind: PredictionType) -> Tensor:
    """Standard deviation that is left in the target once ``x`` is known, for the same normal latents, (B, K)."""
    spread = std / (signal * std).square().add(sigma.square()).sqrt()
    return spread * signal if kind == "epsilon" else spread


def loss(predict: Predictor, batch: NoisedBatch) -> Tensor:
    """Mean squared error over all entries (Ho et al. 2020, eq. 14), a scalar."""
    return (predict(batch.inputs, batch.times) - batch.targets).square().mean()
