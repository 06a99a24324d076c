"""Precision and compilation of the networks that a fit trains."""

from dataclasses import replace

import pytest
import torch

from pdiff_plugin import FitConfig, fit
from pdiff_plugin.config import ConvConfig, DiffusionConfig

PAPER = FitConfig.paper()
CONFIGS = {
    "default": FitConfig(diffusion=DiffusionConfig(max_steps=60, width=32, distill_steps=40)),
    "paper": replace(
        PAPER,
        autoencoder=ConvConfig(latent_dim=8, channels=(4, 8), max_steps=20, batch_size=10),
        diffusion=replace(PAPER.diffusion, conv_channels=(4, 8, 4), max_steps=20, batch_size=10),
    ),
}


def trained(generator):
    """Every tensor that training made, by name."""
    modules = [generator.denoiser, generator.one_step, getattr(generator.autoencoder, "network", None)]
    return {
        f"{number}.{name}": tensor
        for number, module in enumerate(modules)
        if module is not None
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("preset", CONFIGS)
def test_bfloat16_training_ends_near_that_in_float32_and_keeps_its_weights_in_float32(make_store, preset):
    store, config = make_store(trajectories=2), CONFIGS[preset]
    full = trained(fit(store, config))

    half = trained(fit(store, replace(config, precision="bfloat16")))

    for name, tensor in half.items():
        assert tensor.dtype == full[name].dtype
        if name.endswith("weight") and tensor.numel() > 1:
            assert (tensor - full[name]).norm() < 0.2 * full[name].norm(), name
    assert any(not torch.equal(tensor, full[name]) for name, tensor in half.items())


# Dynamo looks at the gradient of an input that has a history (torch 2.15), which warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("preset", CONFIGS)
def test_compiled_training_ends_in_the_same_weights(make_store, monkeypatch, preset):
    store, config, calls = make_store(trajectories=2), CONFIGS[preset], []
    compile_, plain = torch.compile, trained(fit(store, config))

    def compiled(call):
        calls.append(call)
        return compile_(call, backend="eager")  # traced, but not translated to C++, which takes a minute

    monkeypatch.setattr(torch, "compile", compiled)
    found = trained(fit(store, replace(config, compile=True)))

    assert len(calls) == (2 if preset == "default" else 3)  # denoiser and distilled map; encoder, decoder, denoiser
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
