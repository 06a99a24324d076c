"""The exact denoiser of normal latents, what a network adds to it, and coordinates per trajectory."""

from functools import partial

import pytest
import torch

from pdiff_plugin.config import DiffusionConfig
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.denoiser import ConvDenoiser, Denoiser, GaussianPreconditioned, OneStepMap
from pdiff_plugin.generator.diffusion import (
    gaussian_prediction,
    loss,
    noised_batch,
    prediction_spread,
    signal_and_sigma,
)

TYPES = ["flow", "epsilon", "v_prediction"]
STD = torch.tensor([1.5, 0.4, 0.05], dtype=torch.float64)


def normal_batch(prediction_type, num_rows=40_000, time=0.4):
    rng = torch.Generator().manual_seed(0)
    config = DiffusionConfig(prediction_type=prediction_type)
    x0 = STD * torch.randn(num_rows, 3, generator=rng, dtype=torch.float64)
    noise = torch.randn(num_rows, 3, generator=rng, dtype=torch.float64)
    batch = noised_batch(x0, noise, torch.full((num_rows,), time, dtype=torch.float64), config)
    return config, batch


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_gaussian_prediction_is_the_regression_of_the_target_on_the_input(prediction_type):
    config, batch = normal_batch(prediction_type)
    slope = (batch.inputs * batch.targets).mean(0) / batch.inputs.square().mean(0)

    found = gaussian_prediction(batch.inputs, STD, *signal_and_sigma(batch.times, config), prediction_type)

    torch.testing.assert_close(found / batch.inputs, slope.expand_as(found), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_prediction_spread_is_what_the_regression_leaves(prediction_type):
    config, batch = normal_batch(prediction_type)
    signal, sigma = signal_and_sigma(batch.times, config)

    left = (batch.targets - gaussian_prediction(batch.inputs, STD, signal, sigma, prediction_type)).std(0)

    torch.testing.assert_close(prediction_spread(STD, signal, sigma, prediction_type)[0], left, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_an_untrained_denoiser_is_the_gaussian_one_of_each_trajectory(prediction_type):
    config, batch = normal_batch(prediction_type, num_rows=10)
    std = torch.stack([STD, 2 * STD]).float()
    denoiser = GaussianPreconditioned(Denoiser(3, 16, 1, num_trajectories=2), std, config)
    labels = torch.arange(10) % 2
    inputs, times = batch.inputs.float(), batch.times.float()

    found = denoiser(inputs, times, Condition(labels))

    expected = gaussian_prediction(inputs, std[labels], *signal_and_sigma(times, config), prediction_type)
    torch.testing.assert_close(found, expected)


def test_training_starts_at_a_finite_loss_at_every_time():
    config, _ = normal_batch("flow", 2)
    denoiser = GaussianPreconditioned(Denoiser(3, 16, 1), STD[None].float(), config)
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    predict = partial(denoiser, condition=Condition(torch.zeros(2, dtype=torch.int64)))

    for time in (0.0, 0.999999):
        batch = noised_batch(x0, noise, torch.full((2,), time), config)
        value = loss(predict, batch)
        value.backward()
        assert value.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in denoiser.parameters())


def test_an_untrained_one_step_map_only_scales_noise_to_the_spread():
    student = OneStepMap(Denoiser(3, 16, 1), STD[None].float())
    noise = torch.randn(5, 3)

    torch.testing.assert_close(
        student(noise, torch.ones(1), Condition(torch.zeros(5, dtype=torch.int64))), STD.float() * noise
    )


@pytest.mark.parametrize("num_trajectories", [1, 3, 12])
@pytest.mark.parametrize("network", ["residual", "conv"])
def test_one_time_for_all_rows_answers_like_one_time_per_row(network, num_trajectories):
    torch.manual_seed(0)
    if network == "conv":
        denoiser = ConvDenoiser(6, (4, 8, 4), 3, num_trajectories).eval()
    else:
        denoiser = Denoiser(6, 16, 2, num_trajectories)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # it starts as zero, which would hide the condition
    x, condition = torch.randn(8, 6), Condition(torch.arange(8) % num_trajectories)

    found = denoiser(x, torch.tensor([0.3]), condition)

    torch.testing.assert_close(found, denoiser(x, torch.full((8,), 0.3), condition), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, denoiser(x, torch.tensor([0.4]), condition))
