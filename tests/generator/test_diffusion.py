"""Schedule, parameterisations and the noised batches that the denoiser is trained on."""

import pytest
import torch
from diffusers import DDPMScheduler

from pdiff_plugin.config import DiffusionConfig
from pdiff_plugin.generator.diffusion import (
    linear_alpha_bars,
    loss,
    noised_batch,
    signal_and_sigma,
    split_prediction,
)


@pytest.fixture
def latents():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(64, 4, generator=rng), torch.randn(64, 4, generator=rng), torch.rand(64, generator=rng)


@pytest.mark.parametrize(("T", "start", "end"), [(1000, 1e-4, 0.02), (50, 1e-3, 0.3)])
def test_schedule_agrees_with_diffusers(T, start, end):
    theirs = DDPMScheduler(T, beta_start=start, beta_end=end)

    torch.testing.assert_close(linear_alpha_bars(T, start, end).float(), theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_added_noise_and_velocity_agree_with_diffusers(latents):
    x0, noise, _ = latents
    theirs = DDPMScheduler(1000)
    timesteps = torch.arange(64) * 15

    uniform = (timesteps + 0.5) / 1000
    batch = noised_batch(x0, noise, uniform, DiffusionConfig(prediction_type="v_prediction"))

    torch.testing.assert_close(batch.inputs, theirs.add_noise(x0, noise, timesteps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.targets, theirs.get_velocity(x0, noise, timesteps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_prediction_gives_back_latents_and_noise(latents, prediction_type):
    x0, noise, uniform = (t.double() for t in latents)
    config = DiffusionConfig(prediction_type=prediction_type)
    batch = noised_batch(x0, noise, uniform, config)
    signal, sigma = signal_and_sigma(batch.times, config)

    found_x0, found_noise = split_prediction(batch.targets, batch.inputs, signal, sigma, prediction_type)

    torch.testing.assert_close(found_x0, x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_noise, noise, rtol=1e-5, atol=1e-5)


def test_flow_targets_point_from_latents_to_noise(latents):
    x0, noise, uniform = latents
    batch = noised_batch(x0, noise, uniform, DiffusionConfig(prediction_type="flow"))

    torch.testing.assert_close(batch.inputs - uniform[:, None] * batch.targets, x0)
    torch.testing.assert_close(batch.inputs + (1 - uniform[:, None]) * batch.targets, noise)


def test_timesteps_of_a_batch_cover_the_schedule_from_end_to_end(latents):
    x0, noise, _ = latents
    uniform = torch.linspace(0, 1, 64)
    batch = noised_batch(x0, noise, uniform, DiffusionConfig(prediction_type="epsilon", num_timesteps=16))

    assert batch.times.unique().tolist() == pytest.approx([t / 15 for t in range(16)])


def test_loss_is_zero_for_the_targets_and_their_mean_square_for_zeros(latents):
    batch = noised_batch(*latents, DiffusionConfig(prediction_type="flow"))

    assert loss(lambda x, t: batch.targets, batch) == 0
    torch.testing.assert_close(loss(lambda x, t: torch.zeros_like(x), batch), batch.targets.square().mean())
