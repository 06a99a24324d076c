"""What a generator makes does not depend on the global default dtype."""

from pathlib import Path

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, WeightGenerator
from pdiff_plugin.config import ConvConfig
from pdiff_plugin.generator.conv import ConvNetwork
from pdiff_plugin.generator.denoiser import new_denoiser, new_one_step
from pdiff_plugin.generator.diffusion import noised_batch
from pdiff_plugin.generator.frames import fit_frames, plain_frames

DATA = Path(__file__).parents[1] / "data"
FRAMES = plain_frames(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), 2)


def in_float32_and_in_float64(make):
    found = [make()]
    torch.set_default_dtype(torch.float64)
    try:
        found.append(make())
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    ("name", "samplers"),
    [
        ("fit-v1", ["flow", "heun", "dpm-solver++", "one-step"]),
        ("fit-v1-conv", ["ddim", "ddpm", "dpm-solver++"]),
        ("fit-v1-aligned", ["flow"]),
    ],
)
def test_members_are_the_same_bit_for_bit(name, samplers):
    def make():
        generator, made = WeightGenerator.load(DATA / name), {}
        for sampler in samplers:
            latents = generator.sample_latents(5, sampler=sampler, rng=torch.Generator().manual_seed(0))
            members = generator.decode(latents)
            made |= {sampler: latents, **{f"{sampler}.{key}": members[key] for key in members}}
            made[f"{sampler}.encoded"] = generator.autoencoder.encode(generator.autoencoder.decode(latents))
        return made

    assert_same(*in_float32_and_in_float64(make))


@pytest.mark.parametrize(
    "settings",
    [
        DiffusionConfig(width=8, num_blocks=1),
        DiffusionConfig(precondition=False, network="conv", conv_channels=(4, 8, 4), prediction_type="epsilon"),
    ],
)
def test_one_seed_gives_one_network_of_float32(settings):
    def make():
        torch.manual_seed(0)
        config = FitConfig(diffusion=settings)
        modules = {"denoiser": new_denoiser(config, FRAMES), "one_step": new_one_step(config, FRAMES)}
        modules["autoencoder"] = ConvNetwork(40, ConvConfig(latent_dim=4, channels=(4, 8)))
        return {f"{key}.{name}": tensor for key, m in modules.items() for name, tensor in m.state_dict().items()}

    one, other = in_float32_and_in_float64(make)

    assert_same(one, other)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32, torch.int64} or settings.precondition


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon"])
def test_frames_and_training_batches_are_the_same(prediction_type):
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(20, 4, generator=rng) for _ in range(2))
    uniform = torch.rand(20, generator=rng)

    def make():
        batch = noised_batch(x0, noise, uniform, DiffusionConfig(prediction_type=prediction_type))
        frames = fit_frames(x0, torch.arange(20) % 2, 2, 3)
        return {**vars(batch), **frames.state_dict()}

    assert_same(*in_float32_and_in_float64(make))
