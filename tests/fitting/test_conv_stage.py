"""The published configuration, in miniature."""

import logging
from dataclasses import replace

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, Layout, SnapshotStore, WeightGenerator, fit
from pdiff_plugin.config import ConvConfig
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.conv import ConvNetwork
from pdiff_plugin.snapshots.layout import TensorSpec

PAPER = FitConfig.paper()
SMALL = replace(
    PAPER,
    autoencoder=ConvConfig(latent_dim=8, channels=(4, 8), max_steps=20, batch_size=10),
    diffusion=replace(
        PAPER.diffusion, conv_channels=(4, 8, 4), num_timesteps=20, num_sampling_steps=20, max_steps=20, batch_size=10
    ),
)


class InterruptAt:
    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def __call__(self, progress):
        if progress.stage == self.stage and progress.step >= self.step:
            raise KeyboardInterrupt


def test_the_preset_is_what_was_published():
    autoencoder, diffusion = PAPER.autoencoder, PAPER.diffusion

    assert (autoencoder.channels, autoencoder.kernel_size) == ((64, 128, 256, 256, 32), 7)
    assert (autoencoder.latent_dim, autoencoder.input_noise, autoencoder.latent_noise) == (128, 0.001, 0.1)
    assert (autoencoder.kl_weight, autoencoder.lr, autoencoder.batch_size, autoencoder.max_steps) == (0, 2e-5, 50, 500)
    assert (diffusion.conv_channels, diffusion.conv_kernel_size) == ((64, 128, 256, 512, 256, 128, 64), 7)
    assert (diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end) == (1000, 1e-4, 0.02)
    assert (diffusion.prediction_type, diffusion.lr, diffusion.batch_size, diffusion.max_steps) == (
        "epsilon",
        1e-4,
        50,
        1000,
    )
    assert (diffusion.sampler, diffusion.num_sampling_steps, diffusion.ema_decay) == ("ddpm", 1000, 0)
    assert FitConfig.from_json(PAPER.to_json()) == PAPER


@pytest.mark.parametrize(
    "changes",
    [{}, {"kl_weight": 0.01}, {"chunk_values": 16}, {"decode_in_train_mode": True}, {"standardise": "coordinate"}],
    ids=str,
)
def test_a_fit_of_the_published_networks_makes_members_and_survives_its_file(make_store, tmp_path, changes):
    config = replace(SMALL, autoencoder=replace(SMALL.autoencoder, **changes))

    generator = fit(make_store(), config, out=tmp_path / "fit")
    members = generator.sample(3, rng=torch.Generator().manual_seed(0))
    again = WeightGenerator.load(tmp_path / "fit").sample(3, rng=torch.Generator().manual_seed(0))

    assert members["head.weight"].shape == (3, 3, 8)
    assert members["norm.running_var"].min() > 0
    for name, tensor in members.items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, again[name])


def test_latents_may_be_left_unscaled_as_in_the_published_script(make_store):
    config = replace(SMALL, diffusion=replace(SMALL.diffusion, scale_latents=False))

    generator = fit(make_store(), config)

    assert generator.frames.scale == 1.0
    assert not generator.frames.centre.any()


@pytest.mark.parametrize(("stage", "step"), [("autoencoder", 10), ("diffusion", 20)])
def test_an_interrupted_fit_of_the_published_networks_goes_on_to_the_same_generator(make_store, tmp_path, stage, step):
    store = make_store()
    fit(store, SMALL, out=tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        fit(store, SMALL, out=tmp_path / "cut", on_progress=InterruptAt(stage, step))
    fit(store, SMALL, out=tmp_path / "cut")

    one, two = ((tmp_path / name / "generator.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


CHUNKED = ConvConfig(latent_dim=4, channels=(8, 16), chunk_values=64, max_steps=20, batch_size=10)
LONG = Layout(
    (TensorSpec("w", (1000,), "float32", "parameter"), TensorSpec("norm.running_var", (450,), "float32", "buffer"))
)


@pytest.fixture
def sizes(monkeypatch):
    """Block size made small, and the number of values in every read and in what every network call was given."""
    for module in ("generator.subspace", "generator.conv", "fitting.conv_stage"):
        monkeypatch.setattr(f"pdiff_plugin.{module}.BLOCK_VALUES", 128)
    monkeypatch.setattr("pdiff_plugin.snapshots.split.Split.block_values", lambda split, memory_gb: 128)
    found = {"read": [], "encode": [], "decode": []}

    def watch(owner, name, kind, size):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            found[kind].append(size(args, result))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(SnapshotStore, "rows", "read", lambda args, result: result.numel())
    watch(ConvNetwork, "encode", "encode", lambda args, result: args[1].numel())
    watch(ConvNetwork, "decode", "decode", lambda args, result: result.numel())
    return found


def test_rows_in_chunks_are_never_whole_in_memory(make_store, sizes):
    store = make_store(layout=LONG)
    brief = replace(SMALL.diffusion, max_steps=5)

    generator = fit(store, replace(SMALL, autoencoder=CHUNKED, diffusion=brief))
    flat = generator.autoencoder.decode(generator.autoencoder.encode(store.rows(indices=[0, 1])))

    assert flat.shape == (2, 1450)
    sizes["read"].pop()  # the two rows just asked for
    assert max(sizes["read"]) == 40 * 128
    assert max(sizes["encode"]) == max(sizes["decode"]) == 16 * 64
    assert generator.autoencoder.latent_dim == 23 * 4


def test_the_diffusion_sees_the_latents_of_every_chunk(make_store):
    store = make_store(layout=LONG)
    diffusion = DiffusionConfig(width=16, num_blocks=1, max_steps=5)
    generator = fit(store, FitConfig(autoencoder=CHUNKED, diffusion=diffusion, heldout_fraction=0.0))

    latents = generator.autoencoder.encode(store.rows())
    condition = Condition(torch.zeros(len(store), dtype=torch.int64))
    local = generator.frames.to_local(latents, condition)

    assert latents.shape == (40, 23 * 4)
    torch.testing.assert_close(generator.frames.to_latents(local, condition), latents, rtol=1e-3, atol=1e-4)


def test_blocks_of_any_size_encode_and_decode_alike(make_store, monkeypatch):
    store = make_store(layout=LONG)
    brief = replace(SMALL.diffusion, max_steps=5)
    autoencoder = fit(store, replace(SMALL, autoencoder=CHUNKED, diffusion=brief)).autoencoder
    rows = store.rows()
    latents = autoencoder.encode(rows)
    decoded = autoencoder.decode(latents)

    monkeypatch.setattr("pdiff_plugin.generator.conv.BLOCK_VALUES", 1)

    torch.testing.assert_close(autoencoder.encode(rows), latents)
    torch.testing.assert_close(autoencoder.decode(latents), decoded)
    blocks = list(autoencoder.decode_blocks(latents, 50))
    assert torch.cat([values for *_, values in blocks], dim=1).shape == rows.shape
    assert max(values.shape[1] for *_, values in blocks) == 50


def test_training_on_random_chunks_reconstructs_all_of_them(make_store):
    store = make_store(layout=LONG, num_snapshots=80)
    config = replace(
        CHUNKED, latent_dim=8, max_steps=400, batch_size=60, lr=5e-3, standardise="coordinate", latent_noise=0.01
    )

    generator = fit(store, replace(SMALL, autoencoder=config, diffusion=replace(SMALL.diffusion, max_steps=5)))

    assert generator.report["fidelity"] > 0.5


def test_a_longer_training_reconstructs_and_a_short_one_says_that_it_does_not(make_store, caplog):
    store = make_store(num_snapshots=80)
    long = ConvConfig(
        latent_dim=16, channels=(16, 32), max_steps=500, batch_size=40, lr=5e-3, standardise="coordinate",
        latent_noise=0.01,
    )  # fmt: skip
    brief = replace(SMALL, diffusion=replace(SMALL.diffusion, max_steps=5))

    with caplog.at_level(logging.WARNING):
        poor = fit(store, brief)
    good = fit(store, replace(brief, autoencoder=long))

    assert not poor.report["fidelity_is_ok"]
    assert "samples will miss what it drops" in caplog.text
    assert good.report["fidelity"] > 0.8
