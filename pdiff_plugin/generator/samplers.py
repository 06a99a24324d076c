"""Samplers: each walks noise to latents by asking a denoiser, one loop per algorithm.

Shapes: B latents, K latent width, S sampling steps, T timesteps of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pdiff_plugin.config import DiffusionConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.diffusion import Predictor, linear_alpha_bars, split_prediction, timestep_to_time

# Told the current estimate of the clean latents, (B, K), after each step.
OnStep = Callable[[Tensor], None]


def spaced_timesteps(num_timesteps: int, num_sampling_steps: int) -> list[int]:
    """S timesteps from T-1 down to 0, evenly spaced, both ends included (one step: T-1 alone)."""
    _check_steps(num_timesteps, num_sampling_steps)
    return [int(t) for t in torch.linspace(num_timesteps - 1, 0, num_sampling_steps, dtype=torch.float64).round()]


def sample_ddpm(
    predict: Predictor,
    x: Tensor,
    config: DiffusionConfig,
    num_sampling_steps: int,
    rng: torch.Generator,
    *,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2, with σ² = β̃).

    With fewer than T steps the posterior is that between the visited timesteps (Nichol & Dhariwal 2021, eq. 19).

    Args:
        predict: the denoiser.
        x: standard normal noise, (B, K).
        config: prediction type and schedule.
        num_sampling_steps: S, at most T.
        rng: source of the noise added at each step.
        temperature: factor on that noise.
        on_step: told the estimate of x_0 after each step.

    Returns:
        Latents (B, K).
    """
    return _ancestral(predict, x, config, num_sampling_steps, 1.0, temperature, rng, on_step)


def sample_ddim(
    predict: Predictor,
    x: Tensor,
    config: DiffusionConfig,
    num_sampling_steps: int,
    rng: torch.Generator | None = None,
    *,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16): deterministic at ``eta=0``, ancestral at ``eta=1``.

    Few steps shrink the spread of the samples: with the exact denoiser of a Gaussian, 50 of 1000 steps lose about 5 %
    of the standard deviation, and more where it is small. Arguments as in :func:`sample_ddpm`.
    """
    return _ancestral(predict, x, config, num_sampling_steps, eta, 1.0, rng, on_step)


def _ancestral(
    predict: Predictor,
    x: Tensor,
    config: DiffusionConfig,
    num_sampling_steps: int,
    eta: float,
    temperature: float,
    rng: torch.Generator | None,
    on_step: OnStep | None,
) -> Tensor:
    alpha_bars = linear_alpha_bars(config.num_timesteps, config.beta_start, config.beta_end)
    timesteps = spaced_timesteps(config.num_timesteps, num_sampling_steps)
    for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha_bar = alpha_bars[now]
        alpha_bar_after = alpha_bars[after] if after is not None else torch.ones((), dtype=torch.float64)
        time = timestep_to_time(torch.full((1,), now, device=x.device), config)
        prediction = predict(x, time)
        x0, epsilon = split_prediction(prediction, x, alpha_bar.to(x), config.prediction_type)
        # Variance of q(x_after | x_now, x_0), times eta².
        variance = (1 - alpha_bar_after) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_after)
        sigma = eta * variance.clamp_min(0).sqrt()
        direction = (1 - alpha_bar_after - sigma**2).clamp_min(0).sqrt()
        x = alpha_bar_after.sqrt().to(x) * x0 + direction.to(x) * epsilon
        if eta > 0 and after is not None:
            # Drawn where the rng lives, so that one seed gives the same members on every device.
            noise = torch.randn(x.shape, generator=rng, device=rng.device if rng else x.device, dtype=x.dtype)
            x = x + temperature * sigma.to(x) * noise.to(x)
        if on_step is not None:
            on_step(x0)
    return x


def sample_flow(
    predict: Predictor,
    x: Tensor,
    num_sampling_steps: int,
    *,
    heun: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow the velocity of a rectified flow from t = 1 (noise) to t = 0 (Liu et al. 2022).

    One Euler step returns the mean of the latents, not a sample. Heun's rule asks the denoiser twice a step and needs
    about a tenth of the steps.

    Args:
        predict: the velocity, asked at times from 1 down to 0.
        x: standard normal noise, (B, K).
        num_sampling_steps: S steps of equal length.
        heun: average the velocity at both ends of a step (second order) instead of Euler's rule.
        on_step: told the estimate of x_0 after each step.

    Returns:
        Latents (B, K).
    """
    times = torch.linspace(1.0, 0.0, num_sampling_steps + 1, dtype=torch.float64).tolist()
    for now, after in pairwise(times):
        velocity = predict(x, torch.full((1,), now, device=x.device, dtype=x.dtype))
        moved = x + (after - now) * velocity
        if heun:
            ahead = predict(moved, torch.full((1,), after, device=x.device, dtype=x.dtype))
            moved = x + (after - now) * 0.5 * (velocity + ahead)
        if on_step is not None:
            on_step(x - now * velocity)
        x = moved
    return x


def sample_turning(
    turn: Predictor,
    y: Tensor,
    std: Tensor,
    num_sampling_steps: int,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow a preconditioned flow in coordinates in which a normal distribution stands still.

    With y = x / √((1-t)² std² + t²) and the angle θ = atan2(t, (1-t) std) of each direction, the flow's equation
    dx/dt = v becomes dy/dθ = the network's answer (see ``GaussianPreconditioned``). Normal latents are exact in any
    number of steps, and directions of small spread keep it, which steps in x lose. Heun's rule, two questions a step.

    Args:
        turn: the network's answer for (y (B, K), time (1,)).
        y: standard normal noise, (B, K).
        std: standard deviation of each clean coordinate, (B, K).
        num_sampling_steps: S.
        on_step: told the estimate of x_0 after each step.

    Returns:
        Latents (B, K).
    """
    # Time is spent where most directions turn, at times of the order of their std: steps shrink toward t = 0.
    times = torch.linspace(1.0, 0.0, num_sampling_steps + 1, dtype=torch.float64).square().tolist()
    for now, after in pairwise(times):
        angle, angle_after = (torch.atan2(torch.full_like(std, t), (1.0 - t) * std) for t in (now, after))
        speed = turn(y, torch.full((1,), now, device=y.device, dtype=y.dtype))
        moved = y + (angle_after - angle) * speed
        ahead = turn(moved, torch.full((1,), after, device=y.device, dtype=y.dtype))
        if on_step is not None:
            on_step(std * (y - angle * speed))
        y = y + (angle_after - angle) * 0.5 * (speed + ahead)
    return std * y


def sample_dpm_solver(
    predict: Predictor,
    x: Tensor,
    config: DiffusionConfig,
    num_sampling_steps: int,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one question a step.

    Deterministic, for any prediction type. The first and the last step are of first order.

    Args:
        predict: the denoiser.
        x: standard normal noise, (B, K).
        config: prediction type and schedule.
        num_sampling_steps: S; for a schedule of T timesteps at most T.
        on_step: told the estimate of x_0 after each step.

    Returns:
        Latents (B, K).
    """
    times, signals, sigmas = solver_schedule(config, num_sampling_steps)
    log_snr = (signals / sigmas).log()  # +inf at the end, where sigma is 0
    previous: Tensor | None = None
    for step in range(num_sampling_steps):
        prediction = predict(x, torch.full((1,), float(times[step]), device=x.device, dtype=x.dtype))
        if config.prediction_type == "flow":
            x0 = x - sigmas[step].to(x) * prediction
        else:
            x0, _ = split_prediction(prediction, x, signals[step].square().to(x), config.prediction_type)
        estimate, is_last = x0, step == num_sampling_steps - 1
        if previous is not None and not is_last:
            ratio = (log_snr[step] - log_snr[step - 1]) / (log_snr[step + 1] - log_snr[step])
            estimate = x0 + (x0 - previous) / (2 * ratio).to(x)
        shrink = torch.expm1(log_snr[step] - log_snr[step + 1])
        x = (sigmas[step + 1] / sigmas[step]).to(x) * x - (signals[step + 1] * shrink).to(x) * estimate
        previous = x0
        if on_step is not None:
            on_step(x0)
    return x


def solver_schedule(config: DiffusionConfig, num_sampling_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times (S,), and signal and sigma (S+1,) whose last entry is the clean end; all float64."""
    if config.prediction_type == "flow":
        # At time 1 there is no signal, and its logarithm is -inf.
        sigmas = torch.linspace(1.0 - 1e-4, 0.0, num_sampling_steps + 1, dtype=torch.float64)
        return sigmas[:-1], 1.0 - sigmas, sigmas
    _check_steps(config.num_timesteps, num_sampling_steps)
    alpha_bars = linear_alpha_bars(config.num_timesteps, config.beta_start, config.beta_end)
    # Equal steps of the log-SNR (Lu et al. 2022, section 5.2): equal steps of t jump over its steep end, and 20 of them
    # lose 15 % of the spread. Where timesteps are too coarse for that, steps are one timestep each.
    log_snr = 0.5 * (alpha_bars / (1.0 - alpha_bars)).log()
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), num_sampling_steps, dtype=torch.float64)
    timesteps = (log_snr[None, :] - wanted[:, None]).abs().argmin(dim=1)
    for step in range(1, num_sampling_steps):
        timesteps[step] = min(int(timesteps[step]), int(timesteps[step - 1]) - 1)
    timesteps = torch.maximum(timesteps, torch.arange(num_sampling_steps).flip(0))
    alpha_bars = torch.cat([alpha_bars[timesteps], torch.ones(1, dtype=torch.float64)])
    return timesteps / (config.num_timesteps - 1), alpha_bars.sqrt(), (1.0 - alpha_bars).sqrt()


def _check_steps(num_timesteps: int, num_sampling_steps: int) -> None:
    if not 1 <= num_sampling_steps <= num_timesteps:
        raise ConfigError("num_sampling_steps", num_sampling_steps, f"must be from 1 to num_timesteps={num_timesteps}")
