"""The noising of latents, what a denoiser is to predict of it, and the training loss of the latent diffusion.

A ``process`` is the part of :class:`DiffusionConfig` that names the prediction type and the noise schedule. At times in
[0, 1] it makes x_t = signal x_0 + sigma ε, and every prediction is the same kind of sum, a0 x_0 + a1 ε: all that sets
the prediction types apart is in :func:`target_weights`.

Shapes: B latents in a batch, K latent width, T timesteps of the noise schedule, S sampling steps.

Notation (name here -> in the papers): ``alpha_bar`` -> ᾱ_t = Π(1 - β_s) of Ho et al. 2020 (arXiv 2006.11239), eq. 4;
``signal`` -> √ᾱ and ``sigma`` -> √(1-ᾱ); ``v_prediction`` -> v = √ᾱ ε - √(1-ᾱ) x_0 of Salimans & Ho 2022 (arXiv
2202.00512), section 4; ``flow`` -> the straight path x_t = (1-t) x_0 + t ε with velocity ε - x_0 of Liu et al. 2022
(arXiv 2209.03003), with noise at t = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_plugin.config import DiffusionConfig, PredictionType

# (x_t (B, K), time (B,) in [0, 1], or (1,) for all rows alike) -> prediction (B, K)
Predictor = Callable[[Tensor, Tensor], Tensor]
# Signal or sigma: of all rows, or (B, 1).
Level = Tensor | float


def linear_alpha_bars(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Signal power ᾱ_t left at t = 0..T-1 under linearly growing β, (T,) float64."""
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return (1.0 - betas).cumprod(0)


def target_weights(kind: PredictionType, signal: Level, sigma: Level) -> tuple[Level, Level, Level]:
    """Weights a0 of x_0 and a1 of ε in what is predicted, and the determinant ``signal`` a1 - ``sigma`` a0."""
    if kind == "flow":
        return -1.0, 1.0, 1.0
    return (0.0, 1.0, signal) if kind == "epsilon" else (-sigma, signal, 1.0)


def target(x0: Tensor, noise: Tensor, signal: Level, sigma: Level, kind: PredictionType) -> Tensor:
    """What is to be predicted, (B, K), of clean latents and noise (B, K)."""
    a0, a1, _ = target_weights(kind, signal, sigma)
    return a1 * noise + a0 * x0


def split_prediction(
    prediction: Tensor, x: Tensor, signal: Level, sigma: Level, kind: PredictionType
) -> tuple[Tensor, Tensor]:
    """What a prediction says of the clean latents and of the noise: :func:`target` and the noising, solved for both.

    Args:
        prediction: the denoiser's output, (B, K).
        x: its input, (B, K).
        signal: factor of the clean latents in ``x``.
        sigma: factor of the noise.
        kind: what was predicted.

    Returns:
        x_0 and ε, both (B, K).
    """
    a0, a1, determinant = target_weights(kind, signal, sigma)
    return (a1 * x - sigma * prediction) / determinant, (signal * prediction - a0 * x) / determinant


@dataclass(frozen=True)
class NoisedBatch:
    """A training batch: inputs (B, K), times (B,) in [0, 1], targets (B, K)."""

    inputs: Tensor
    times: Tensor
    targets: Tensor


def noised_batch(x0: Tensor, noise: Tensor, uniform: Tensor, process: DiffusionConfig) -> NoisedBatch:
    """Noise clean latents to random times and say what the denoiser should answer.

    Args:
        x0: clean latents, (B, K).
        noise: standard normal draw, (B, K).
        uniform: draw from [0, 1), (B,), in the dtype of ``x0``; it fixes each row's time.
        process: names the prediction type and the schedule.
    """
    times = uniform
    if process.prediction_type != "flow":
        T = process.num_timesteps
        times = (uniform * T).floor().clamp_max(T - 1) / (T - 1)
    signal, sigma = signal_and_sigma(times, process)
    inputs = signal * x0 + sigma * noise
    return NoisedBatch(inputs, times, target(x0, noise, signal, sigma, process.prediction_type))


def signal_and_sigma(times: Tensor, process: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """Factors of clean latents and of noise in x_t at times in [0, 1], (B,) -> (B, 1) each."""
    if process.prediction_type == "flow":
        return 1.0 - times[:, None], times[:, None]
    alpha_bars = linear_alpha_bars(process.num_timesteps, process.beta_start, process.beta_end).to(times)
    alpha_bar = alpha_bars[(times * (process.num_timesteps - 1)).round().long()][:, None]
    return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()


def levels(times: Tensor, process: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """Signal and sigma at the times (S,) of a sampler and at the clean end that they lead to, (S+1,) each."""
    signal, sigma = signal_and_sigma(times, process)
    return torch.cat([signal[:, 0], times.new_ones(1)]), torch.cat([sigma[:, 0], times.new_zeros(1)])


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
    return target(std.square() * signal * residual, sigma * residual, signal, sigma, kind)


def prediction_spread(std: Tensor, signal: Tensor, sigma: Tensor, kind: PredictionType) -> Tensor:
    """Standard deviation that is left in the target once ``x`` is known, for the same normal latents, (B, K)."""
    *_, determinant = target_weights(kind, signal, sigma)
    return std / (signal * std).square().add(sigma.square()).sqrt() * determinant


def loss(predict: Predictor, batch: NoisedBatch) -> Tensor:
    """Mean squared error over all entries (Ho et al. 2020, eq. 14), a scalar."""
    return (predict(batch.inputs, batch.times) - batch.targets).square().mean()
