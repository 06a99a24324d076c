"""Samplers against the one case with a known answer, normal latents, and step by step against diffusers."""

from functools import partial
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from pdiff_plugin.config import DiffusionConfig, Sampler, SamplingConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.denoiser import Denoiser, GaussianPreconditioned
from pdiff_plugin.generator.diffusion import levels, linear_alpha_bars
from pdiff_plugin.generator.samplers import (
    SAMPLERS,
    even_times,
    log_snr_times,
    run_sampler,
    sample_euler,
    sample_heun,
    sample_preconditioned_flow,
    sampler_for,
    shrinking_times,
)

MEAN = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
STD = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
NUM_DRAWS = 5_000


def exact_predictor(config):
    """The best denoiser of N(MEAN, STD²) latents: E[x_0 | x_t], expressed as ``config`` asks."""
    alpha_bars = linear_alpha_bars(config.num_timesteps, config.beta_start, config.beta_end)

    def predict(x, time):
        if config.prediction_type == "flow":
            signal, sigma = 1 - time.double()[:, None], time.double()[:, None]
        else:
            alpha_bar = alpha_bars[(time.double() * (config.num_timesteps - 1)).round().long()][:, None]
            signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        residual = (x - signal * MEAN) / (signal**2 * STD**2 + sigma**2)
        x0, epsilon = MEAN + STD**2 * signal * residual, sigma * residual
        return {"flow": epsilon - x0, "epsilon": epsilon, "v_prediction": signal * epsilon - sigma * x0}[
            config.prediction_type
        ]

    return predict


def sample(sampler, denoise, x, config, num_sampling_steps, **options):
    """As users ask for it: a sampler by its name, with the times that go with it."""
    spec = SAMPLERS[sampler]
    return spec.sample(denoise, x, spec.times(config, num_sampling_steps), config, **options)


def timesteps_of(times, T):
    return (times * (T - 1)).round().long().tolist()


def noise(seed=0, shape=(NUM_DRAWS, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_normal(samples, std_tolerance):
    """Mean within four standard errors plus a hundredth, standard deviation within a relative tolerance."""
    assert (samples.mean(0) - MEAN).abs().max() < 0.01 + 4 / NUM_DRAWS**0.5
    error = (samples.std(0) / STD - 1).abs()
    assert torch.all(error < torch.as_tensor(std_tolerance, dtype=torch.float64)), error


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_with_every_timestep_returns_the_mean_and_spread_of_normal_latents(prediction_type):
    config = DiffusionConfig(prediction_type=prediction_type)
    rng = torch.Generator().manual_seed(1)

    samples = sample("ddpm", exact_predictor(config), noise(), config, config.num_timesteps, rng=rng)

    assert_normal(samples, 0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_with_every_timestep_returns_the_mean_and_spread_of_normal_latents(prediction_type):
    config = DiffusionConfig(prediction_type=prediction_type)

    samples = sample("ddim", exact_predictor(config), noise(), config, config.num_timesteps)

    assert_normal(samples, 0.03)


def test_ddim_with_fifty_steps_loses_spread_where_it_is_small_and_no_more_than_stated():
    config = DiffusionConfig(prediction_type="epsilon")

    samples = sample("ddim", exact_predictor(config), noise(), config, 50)

    assert_normal(samples, [0.06, 0.07, 0.25])
    assert samples.std(0)[2] < 0.9 * STD[2]


def test_fifty_euler_steps_of_a_flow_return_the_mean_and_spread_of_normal_latents():
    config = DiffusionConfig(prediction_type="flow")

    samples = sample("flow", exact_predictor(config), noise(), config, 50)

    assert_normal(samples, [0.03, 0.04, 0.15])


def test_twenty_heun_steps_of_a_flow_return_the_mean_and_spread_of_normal_latents():
    config = DiffusionConfig(prediction_type="flow")

    samples = sample("heun", exact_predictor(config), noise(), config, 20)

    assert_normal(samples, [0.02, 0.02, 0.05])


def test_one_euler_step_returns_the_mean_alone():
    config = DiffusionConfig(prediction_type="flow")

    samples = sample("flow", exact_predictor(config), noise(), config, 1)

    torch.testing.assert_close(samples, MEAN.expand_as(samples))


class FixedNetwork:
    """Some fixed function that is no denoiser (steps must agree for any output); keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, time):
        self.asked.append(x)
        return (0.8 * x.roll(1, dims=1) + 0.3 * time[:, None].to(x)).tanh()


def assert_same_steps(run, scheduler, timesteps, **options):
    """Each step of ``run(network, start, rng, on_step)`` from where it stood equals the scheduler's from there."""
    # diffusers keeps ᾱ in float32, where 1 - ᾱ_t/ᾱ_(t-1) has lost four digits; test_diffusion compares the schedules.
    scheduler.alphas_cumprod = linear_alpha_bars(scheduler.config.num_train_timesteps)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    network, estimates = FixedNetwork(), []
    start = noise(shape=(8, 5))
    last = run(network, start, torch.Generator().manual_seed(3), estimates.append)

    rng = torch.Generator().manual_seed(3)
    T = scheduler.config.num_train_timesteps
    states = [*network.asked, last]
    assert len(estimates) == len(timesteps) == len(states) - 1
    for number, t in enumerate(timesteps):
        output = FixedNetwork()(states[number], torch.full((8,), t / (T - 1)))
        expected = scheduler.step(output, t, states[number], generator=rng, **options)
        torch.testing.assert_close(estimates[number], expected.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[number + 1], expected.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_sampling_steps", [200, 23])
def test_ddpm_steps_agree_with_diffusers(prediction_type, num_sampling_steps):
    config = DiffusionConfig(prediction_type=prediction_type, num_timesteps=200)
    theirs = DDPMScheduler(200, prediction_type=prediction_type, clip_sample=False, variance_type="fixed_small")
    timesteps = timesteps_of(even_times(config, num_sampling_steps), 200)
    theirs.set_timesteps(timesteps=timesteps)

    def run(network, start, rng, on_step):
        return sample("ddpm", network, start, config, num_sampling_steps, rng=rng, on_step=on_step)

    assert_same_steps(run, theirs, timesteps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_steps_agree_with_diffusers(prediction_type, eta):
    config = DiffusionConfig(prediction_type=prediction_type, num_timesteps=100)
    theirs = DDIMScheduler(100, prediction_type=prediction_type, clip_sample=False)
    theirs.set_timesteps(100)

    def run(network, start, rng, on_step):
        return sample("ddim", network, start, config, 100, rng=rng, eta=eta, on_step=on_step)

    assert_same_steps(run, theirs, theirs.timesteps.tolist(), eta=eta)


def test_ddim_with_eta_one_is_ancestral_sampling():
    config = DiffusionConfig(prediction_type="epsilon", num_timesteps=60)
    start = noise(shape=(4, 3))

    ancestral = sample("ddpm", FixedNetwork(), start, config, 20, rng=torch.Generator().manual_seed(0))
    found = sample("ddim", FixedNetwork(), start, config, 20, rng=torch.Generator().manual_seed(0), eta=1.0)

    torch.testing.assert_close(found, ancestral)


@pytest.mark.parametrize(
    ("T", "S", "expected"), [(1000, 4, [999, 666, 333, 0]), (1000, 1, [999]), (5, 5, [4, 3, 2, 1, 0])]
)
def test_even_timesteps_run_from_the_noisiest_to_zero(T, S, expected):
    config = DiffusionConfig(prediction_type="epsilon", num_timesteps=T)
    assert timesteps_of(even_times(config, S), T) == expected


@pytest.mark.parametrize("times", [even_times, log_snr_times])
def test_more_sampling_steps_than_timesteps_are_refused_with_both_numbers(times):
    with pytest.raises(ConfigError) as error:
        times(DiffusionConfig(prediction_type="epsilon", num_timesteps=50), 51)
    assert str(error.value) == "num_sampling_steps = 51: it must be from 1 to num_timesteps=50."


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers hands a tensor to numpy
def test_dpm_solver_agrees_with_diffusers(prediction_type):
    config = DiffusionConfig(prediction_type=prediction_type, num_timesteps=1000)
    times = log_snr_times(config, 20)
    signals, sigmas = levels(times, config)
    theirs = DPMSolverMultistepScheduler(1000, prediction_type=prediction_type)
    theirs.set_timesteps(20)
    theirs.timesteps, theirs.sigmas = (times * 999).round().long(), sigmas / signals
    start, network = noise(shape=(8, 5)), FixedNetwork()

    expected = start
    for t in theirs.timesteps.tolist():
        expected = theirs.step(network(expected, torch.full((8,), t / 999)), t, expected).prev_sample
    found = sample("dpm-solver++", FixedNetwork(), start, config, 20)

    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_sampling_steps", [1, 2, 20, 50])
def test_dpm_solver_visits_different_timesteps_that_end_at_zero(num_sampling_steps):
    config = DiffusionConfig(prediction_type="epsilon", num_timesteps=50)

    timesteps = timesteps_of(log_snr_times(config, num_sampling_steps), 50)

    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] == 49
    assert num_sampling_steps == 1 or timesteps[-1] == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_twenty_steps_of_dpm_solver_return_the_mean_and_spread_of_normal_latents(prediction_type):
    config = DiffusionConfig(prediction_type=prediction_type)

    samples = sample("dpm-solver++", exact_predictor(config), noise(), config, 20)

    assert_normal(samples, [0.05, 0.05, 0.25])


@pytest.mark.parametrize("num_sampling_steps", [1, 3, 16])
def test_a_preconditioned_flow_is_exact_for_normal_latents_in_any_number_of_steps(num_sampling_steps):
    config, start = DiffusionConfig(), noise()
    times = shrinking_times(config, num_sampling_steps)

    samples = sample_preconditioned_flow(
        lambda y, time: torch.zeros_like(y), start, times, config, std=STD.expand_as(start)
    )

    torch.testing.assert_close(samples, STD * start)


def preconditioned(std):
    torch.manual_seed(0)
    denoiser = GaussianPreconditioned(Denoiser(3, 16, 1), std, DiffusionConfig())
    torch.nn.init.normal_(denoiser.network.outlet.weight, std=0.3)
    return denoiser.requires_grad_(False)


def test_a_preconditioned_flow_follows_the_same_path_as_small_heun_steps_of_the_flow():
    std = torch.tensor([[1.2, 0.4, 0.1]])
    config, denoiser, start = DiffusionConfig(), preconditioned(std), noise(shape=(64, 3)).float()
    condition = Condition(torch.zeros(64, dtype=torch.int64))

    expected = sample_heun(partial(denoiser, condition=condition), start, even_times(config, 800), config)
    found = run_sampler(denoiser, start, condition, config, SamplingConfig(num_sampling_steps=200))

    assert sampler_for(config).sample is sample_preconditioned_flow
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_heun_serves_a_preconditioned_flow_too_even_where_a_direction_stands_still():
    std = torch.tensor([[1.2, 0.4, 0.0]])
    config, denoiser, start = DiffusionConfig(), preconditioned(std), noise(shape=(64, 3)).float()
    condition = Condition(torch.zeros(64, dtype=torch.int64))

    expected = run_sampler(denoiser, start, condition, config, SamplingConfig(num_sampling_steps=200))
    found = run_sampler(denoiser, start, condition, config, SamplingConfig(sampler="heun", num_sampling_steps=100))

    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert found[:, 2].abs().max() < 1e-3


def test_heun_is_of_second_order_and_euler_of_first():
    config = DiffusionConfig()
    start = torch.ones(1, 3, dtype=torch.float64)
    exact = MEAN + STD * start

    def error_of(sampler, num_sampling_steps):
        times = shrinking_times(config, num_sampling_steps)
        return (sampler(exact_predictor(config), start, times, config) - exact)[0, :2].abs().max()

    for sampler, factor in ((sample_euler, 2), (sample_heun, 4)):
        assert error_of(sampler, 50) / error_of(sampler, 100) == pytest.approx(factor, rel=0.15)


def test_the_table_of_samplers_holds_every_name_that_a_setting_may_have():
    assert set(SAMPLERS) == set(get_args(Sampler))


class Counting:
    """A one-step map and preconditioned flow at once that counts what it is asked."""

    def __init__(self):
        self.count = 0

    def __call__(self, x, time, condition):
        assert len(condition) == len(x)
        self.count += 1
        return x

    angular_velocity = __call__

    def std_of(self, condition):
        return torch.ones(len(condition), 3)


@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_step_costs_as_many_evaluations_as_the_table_says(sampler, precondition):
    kind = "epsilon" if sampler in ("ddpm", "ddim") else "flow"
    config, denoiser = DiffusionConfig(prediction_type=kind, precondition=precondition), Counting()
    spec, estimates = sampler_for(config, sampler), []
    condition = Condition(torch.zeros(4, dtype=torch.int64))

    rng = torch.Generator().manual_seed(0)
    run_sampler(
        denoiser,
        torch.ones(4, 3),
        condition,
        config,
        SamplingConfig(sampler=sampler),
        rng=rng,
        on_step=estimates.append,
    )

    saved = 1 if sampler == "heun" else 0  # its last step
    assert denoiser.count == spec.evaluations_per_step * spec.usual_steps - saved
    assert len(estimates) == spec.usual_steps
