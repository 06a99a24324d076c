"""A script may have set torch's default dtype to float64: its fit is the same."""

from dataclasses import replace

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, fit
from pdiff_plugin.config import ConvConfig
from pdiff_plugin.fitting.training import seeded
from pdiff_plugin.snapshots.layout import Layout, TensorSpec

PAPER = FitConfig.paper()
STACK = Layout(
    tuple(TensorSpec(f"{n}.weight", shape, "float32", "parameter") for n, shape in ((0, (12, 5)), (2, (3, 12))))
)
BRIEF = DiffusionConfig(width=16, num_blocks=1, max_steps=40, batch_size=16, eval_every_n_steps=20, distill_steps=5)
CONFIGS = {
    "default": FitConfig(diffusion=BRIEF),
    "plain flow": FitConfig(diffusion=replace(BRIEF, precondition=False)),
    "aligned": FitConfig(diffusion=BRIEF, align="rebasin"),
    "chunks": FitConfig(
        autoencoder=ConvConfig(latent_dim=4, channels=(4, 8), chunk_values=32, max_steps=10, kl_weight=0.01),
        diffusion=replace(BRIEF, prediction_type="v_prediction"),
    ),
    "paper": replace(
        PAPER,
        autoencoder=ConvConfig(latent_dim=8, channels=(4, 8), max_steps=10, batch_size=10),
        diffusion=replace(PAPER.diffusion, conv_channels=(4, 8, 4), max_steps=10, batch_size=10, num_sampling_steps=5),
    ),
}


@pytest.fixture
def float64_by_default():
    def switch():
        torch.set_default_dtype(torch.float64)

    yield switch
    torch.set_default_dtype(torch.float32)


def tensors_of(generator):
    parts = {
        "autoencoder": generator.autoencoder.state_dict(),
        "frames": generator.frames.state_dict(),
        "denoiser": generator.denoiser.state_dict(),
        "one_step": generator.one_step.state_dict() if generator.one_step is not None else {},
        "alignment": generator.alignment.state_dict() if generator.alignment is not None else {},
    }
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_fit_does_not_depend_on_the_default_dtype(make_store, float64_by_default, preset):
    store = make_store(trajectories=2, layout=STACK)
    expected = fit(store, CONFIGS[preset])
    float64_by_default()

    found = fit(store, CONFIGS[preset])

    assert torch.get_default_dtype() == torch.float64
    assert found.report == expected.report
    for name, tensor in tensors_of(expected).items():
        other = tensors_of(found)[name]
        assert (other.dtype, torch.equal(other, tensor)) == (tensor.dtype, True), name


def test_initial_weights_leave_the_caller_s_random_state_and_default_dtype(float64_by_default):
    float64_by_default()
    before = torch.get_rng_state()

    one, two = (seeded(lambda: torch.nn.Linear(3, 2), 7) for _ in range(2))

    assert one.weight.dtype == torch.float32
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float64
