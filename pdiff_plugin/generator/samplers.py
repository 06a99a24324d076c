"""Samplers: from noise to latents by asking a denoiser, one loop per algorithm.

All have one signature, ``sample(denoise, x, times, process, *, on_step=None, ...)``:

    denoise    the denoiser with its condition filled in, (x (B, K), time (1,)) -> prediction (B, K)
    x          standard normal noise, (B, K)
    times      when it is asked, (S,) float64, falling from the noisy end; the last step leads on to clean latents
    process    prediction type and noise schedule
    on_step    told the estimate of the clean latents after each step

and return latents (B, K). Times are made by other functions, (process, S) -> (S,). :data:`SAMPLERS` says which times go
with which sampler, and what else one takes: a new one is a function and an entry here, and its name in ``config.py``.

Shapes: B latents, K latent width, S sampling steps, T timesteps of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from pdiff_plugin.config import DiffusionConfig, PredictionType, Sampler, SamplingConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.diffusion import Predictor, levels, linear_alpha_bars, split_prediction

# Told the current estimate of the clean latents, (B, K), after each step.
OnStep = Callable[[Tensor], None]


def even_times(process: DiffusionConfig, num_sampling_steps: int) -> Tensor:
    """Times of equal distance: of a flow from 1 on; of a noise schedule timesteps from T-1 to 0, both ends included."""
    if process.prediction_type == "flow":
        return torch.linspace(1.0, 0.0, num_sampling_steps + 1, dtype=torch.float64)[:-1]
    last = _check_steps(process.num_timesteps, num_sampling_steps) - 1
    return torch.linspace(last, 0, num_sampling_steps, dtype=torch.float64).round() / last


def shrinking_times(process: DiffusionConfig, num_sampling_steps: int) -> Tensor:
    """Times of a flow whose distance shrinks toward t = 0: directions of small std move at times of that order."""
    return torch.linspace(1.0, 0.0, num_sampling_steps + 1, dtype=torch.float64).square()[:-1]


def log_snr_times(process: DiffusionConfig, num_sampling_steps: int) -> Tensor:
    """Times of a noise schedule in equal steps of log(signal / sigma); of a flow, equal steps of time.

    Equal timesteps jump over the steep end of the log-SNR (Lu et al. 2022, section 5.2), and 20 of them lose 15 % of
    the spread. Where timesteps are too coarse for equal steps of it, steps are one timestep each.
    """
    if process.prediction_type == "flow":
        # At time 1 there is no signal, and its logarithm is -inf.
        return torch.linspace(1.0 - 1e-4, 0.0, num_sampling_steps + 1, dtype=torch.float64)[:-1]
    last = _check_steps(process.num_timesteps, num_sampling_steps) - 1
    alpha_bars = linear_alpha_bars(process.num_timesteps, process.beta_start, process.beta_end)
    log_snr = 0.5 * (alpha_bars / (1.0 - alpha_bars)).log()
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), num_sampling_steps, dtype=torch.float64)
    timesteps = (log_snr[None, :] - wanted[:, None]).abs().argmin(dim=1)
    for step in range(1, num_sampling_steps):
        timesteps[step] = min(int(timesteps[step]), int(timesteps[step - 1]) - 1)
    return torch.maximum(timesteps, torch.arange(num_sampling_steps).flip(0)).double() / last


def _check_steps(num_timesteps: int, num_sampling_steps: int) -> int:
    if not 1 <= num_sampling_steps <= num_timesteps:
        raise ConfigError("num_sampling_steps", num_sampling_steps, f"must be from 1 to num_timesteps={num_timesteps}")
    return num_timesteps


def sample_ddim(
    denoise: Predictor,
    x: Tensor,
    times: Tensor,
    process: DiffusionConfig,
    *,
    eta: float = 0.0,
    temperature: float = 1.0,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16): deterministic at ``eta=0``, ancestral at ``eta=1``.

    At ``eta=1`` it is DDPM (Ho et al. 2020, algorithm 2, with σ² = β̃), and with fewer than T steps the posterior is
    that between the visited timesteps (Nichol & Dhariwal 2021, eq. 19). At ``eta=0`` few steps shrink the spread of the
    samples: with the exact denoiser of a Gaussian, 50 of 1000 steps lose about 5 % of the standard deviation, and more
    where it is small.

    Args:
        denoise, x, times, process, on_step: see above.
        eta: share of DDPM's noise that is added after each step.
        temperature: factor on that noise.
        rng: its source; needed above ``eta=0``.
    """
    signals, sigmas = (level.tolist() for level in levels(times, process))
    for step, time in enumerate(times.tolist()):
        signal, sigma, signal_after, sigma_after = signals[step], sigmas[step], signals[step + 1], sigmas[step + 1]
        prediction = denoise(x, _at(time, x))
        x0, epsilon = split_prediction(prediction, x, signal, sigma, process.prediction_type)
        # Variance of q(x_after | x_now, x_0), times eta².
        variance = (eta * sigma_after / sigma) ** 2 * max(0.0, 1.0 - (signal / signal_after) ** 2)
        x = signal_after * x0 + max(0.0, sigma_after**2 - variance) ** 0.5 * epsilon
        if variance > 0:
            assert rng is not None, "global generators are not touched"
            # Drawn where the rng lives, so that one seed gives the same members on every device.
            noise = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)
            x = x + temperature * variance**0.5 * noise.to(x)
        if on_step is not None:
            on_step(x0)
    return x


def sample_euler(
    denoise: Predictor, x: Tensor, times: Tensor, process: DiffusionConfig, *, on_step: OnStep | None = None
) -> Tensor:
    """Follow the velocity of a rectified flow from t = 1 (noise) to t = 0 (Liu et al. 2022) by Euler's rule.

    One step returns the mean of the latents, not a sample.
    """
    for now, after in pairwise([*times.tolist(), 0.0]):
        velocity = denoise(x, _at(now, x))
        _tell(on_step, velocity, x, now)
        x = x + (after - now) * velocity
    return x


def sample_heun(
    denoise: Predictor, x: Tensor, times: Tensor, process: DiffusionConfig, *, on_step: OnStep | None = None
) -> Tensor:
    """As :func:`sample_euler` by Heun's rule, with the mean of the velocities at both ends of a step (second order).

    Two evaluations a step. The last step is Euler's (as in Karras et al. 2022, arXiv 2206.00364, algorithm 1): at t = 0
    the velocity says nothing of the noise, which is still all there is in directions of little spread.
    """
    for now, after in pairwise([*times.tolist(), 0.0]):
        velocity = denoise(x, _at(now, x))
        _tell(on_step, velocity, x, now)
        moved = x + (after - now) * velocity
        if after > 0:
            moved = x + (after - now) * 0.5 * (velocity + denoise(moved, _at(after, x)))
        x = moved
    return x


def sample_preconditioned_flow(
    denoise: Predictor,
    x: Tensor,
    times: Tensor,
    process: DiffusionConfig,
    *,
    std: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow a preconditioned flow in coordinates in which a normal distribution stands still.

    The one sampler that does not ask for the prediction. With y = x / √((1-t)² std² + t²) and the angle θ = atan2(t,
    (1-t) std) of each direction, the flow's equation dx/dt = v becomes dy/dθ = the network's own answer: ``denoise`` is
    ``GaussianPreconditioned.angular_velocity``. Normal latents are exact in any number of steps, and directions of
    small spread keep it, which steps in x lose. Heun's rule, two evaluations a step.

    Args:
        denoise: the network's answer for (y (B, K), time (1,)).
        x, times, process, on_step: see above; the process is a flow.
        std: standard deviation of each clean coordinate, (B, K).
    """
    y, angle = x, _angle(1.0, std)  # at t = 1 both coordinates are the same
    for now, after in pairwise([*times.tolist(), 0.0]):
        angle_after = _angle(after, std)
        velocity = denoise(y, _at(now, y))
        moved = y + (angle_after - angle) * velocity
        ahead = denoise(moved, _at(after, y))
        if on_step is not None:
            on_step(std * (y - angle * velocity))
        y = y + (angle_after - angle) * 0.5 * (velocity + ahead)
        angle = angle_after
    return std * y


def sample_dpm_solver(
    denoise: Predictor, x: Tensor, times: Tensor, process: DiffusionConfig, *, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one evaluation a step.

    Deterministic, for any prediction type. The first and the last step are of first order.
    """
    signals, sigmas = levels(times, process)
    log_snr = (signals / sigmas).log()  # +inf at the end, where sigma is 0
    ratios = ((log_snr[1:-1] - log_snr[:-2]) / (log_snr[2:] - log_snr[1:-1])).tolist()  # of a step to the one after it
    of_x = (sigmas[1:] / sigmas[:-1]).tolist()
    of_estimate = (signals[1:] * torch.expm1(log_snr[:-1] - log_snr[1:])).tolist()
    previous: Tensor | None = None
    for step, (time, signal, sigma) in enumerate(zip(times.tolist(), signals.tolist(), sigmas.tolist(), strict=False)):
        prediction = denoise(x, _at(time, x))
        x0, _ = split_prediction(prediction, x, signal, sigma, process.prediction_type)
        estimate = x0
        if previous is not None and step < len(times) - 1:
            estimate = x0 + (x0 - previous) / (2 * ratios[step - 1])
        x = of_x[step] * x - of_estimate[step] * estimate
        previous = x0
        if on_step is not None:
            on_step(x0)
    return x


def sample_one_step(
    denoise: Predictor, x: Tensor, times: Tensor, process: DiffusionConfig, *, on_step: OnStep | None = None
) -> Tensor:
    """What a distilled map, in place of the denoiser, makes of the noise."""
    clean = denoise(x, _at(1.0, x))
    if on_step is not None:
        on_step(clean)
    return clean


def _at(time: float, x: Tensor) -> Tensor:
    return torch.full((1,), time, device=x.device, dtype=x.dtype)


def _angle(time: float, std: Tensor) -> Tensor:
    return torch.atan2(torch.full_like(std, time), (1.0 - time) * std)


def _tell(on_step: OnStep | None, velocity: Tensor, x: Tensor, time: float) -> None:
    if on_step is not None:
        on_step(split_prediction(velocity, x, 1.0 - time, time, "flow")[0])


@dataclass(frozen=True)
class SamplerSpec:
    """How a sampler is used. Which prediction types it serves stands beside its name, in ``config.py``.

    Attributes:
        sample: the sampler.
        times: makes its times, (process, S) -> (S,).
        usual_steps: S unless another number is asked for.
        evaluations_per_step: of the denoiser.
        takes: names of what it takes besides: ``rng``, and fields of :class:`SamplingConfig`.
        needs: what it asks: any denoiser, one that is preconditioned, or a one-step map in its place.
        preconditioned: what is used in its place where the denoiser is preconditioned, if anything.
    """

    sample: Callable[..., Tensor]
    times: Callable[[DiffusionConfig, int], Tensor]
    usual_steps: int
    evaluations_per_step: int = 1
    takes: tuple[str, ...] = ()
    needs: Literal["denoiser", "preconditioned denoiser", "one-step map"] = "denoiser"
    preconditioned: SamplerSpec | None = None


# In their own coordinates preconditioned flows converge ten times as fast as by Euler's rule.
_PRECONDITIONED_FLOW = SamplerSpec(
    sample_preconditioned_flow, shrinking_times, 16, 2, takes=("std",), needs="preconditioned denoiser"
)
SAMPLERS: dict[Sampler, SamplerSpec] = {
    "ddpm": SamplerSpec(partial(sample_ddim, eta=1.0), even_times, 50, takes=("rng", "temperature")),
    "ddim": SamplerSpec(sample_ddim, even_times, 50, takes=("rng", "temperature", "eta")),
    "dpm-solver++": SamplerSpec(sample_dpm_solver, log_snr_times, 20),
    "flow": SamplerSpec(sample_euler, even_times, 50, preconditioned=_PRECONDITIONED_FLOW),
    "heun": SamplerSpec(sample_heun, shrinking_times, 20, 2),
    "one-step": SamplerSpec(sample_one_step, even_times, 1, needs="one-step map"),
}
# The sampler that is exact in few steps for what the denoiser predicts.
NATURAL_SAMPLER: dict[PredictionType, Sampler] = {
    "flow": "flow",
    "epsilon": "dpm-solver++",
    "v_prediction": "dpm-solver++",
}


def sampler_for(process: DiffusionConfig, sampler: Sampler | None = None) -> SamplerSpec:
    """How a sampler, or the natural one, is used with the denoiser of a process."""
    spec = SAMPLERS[sampler or NATURAL_SAMPLER[process.prediction_type]]
    return spec.preconditioned if spec.preconditioned is not None and process.precondition else spec


def run_sampler(
    denoiser: Any,
    noise: Tensor,
    condition: Condition,
    process: DiffusionConfig,
    sampling: SamplingConfig | None = None,
    *,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise to clean coordinates of the trajectories, by any sampler.

    Args:
        denoiser: made by :func:`new_denoiser` (by :func:`new_one_step` for ``one-step``), in eval mode.
        noise: standard normal times the temperature, (B, k).
        condition: of the B rows.
        process: the settings of the denoiser.
        sampling: ``sampler`` (the natural one unless given), ``num_sampling_steps``, ``eta``, and the ``temperature``
            of noise that is added on the way.
        rng: source of that noise.
        on_step: told the estimate of the clean coordinates after each step.

    Returns:
        (B, k).
    """
    sampling = sampling or SamplingConfig()
    spec = sampler_for(process, sampling.sampler)
    usual = spec.usual_steps if process.prediction_type == "flow" else min(spec.usual_steps, process.num_timesteps)
    options: dict[str, Any] = {"rng": rng, "temperature": sampling.temperature, "eta": sampling.eta}
    denoise: Predictor = partial(denoiser, condition=condition)
    if spec.needs == "preconditioned denoiser":
        denoise = partial(denoiser.angular_velocity, condition=condition)
        options["std"] = denoiser.std_of(condition)
    times = spec.times(process, sampling.num_sampling_steps or usual)
    taken = {name: options[name] for name in spec.takes}
    return spec.sample(denoise, noise, times, process, on_step=on_step, **taken)
