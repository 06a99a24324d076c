"""Sampling options, and the one file that holds a generator."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pdiff_plugin import FitConfig, WeightGenerator
from pdiff_plugin.config import DiffusionConfig, SamplingConfig
from pdiff_plugin.errors import ConfigError, FormatError, FormatVersionError, GeneratorNotFoundError
from pdiff_plugin.generator.denoiser import new_denoiser
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.snapshots.layout import Layout, TensorSpec

LAYOUT = Layout(
    (
        TensorSpec("weight", (4, 3), "float32", "parameter"),
        TensorSpec("half", (5,), "bfloat16", "parameter"),
        TensorSpec("running_var", (2,), "float32", "buffer"),
    )
)
K = 3


def make_generator(prediction_type="flow", trajectories=("run-001",)):
    rng = torch.Generator().manual_seed(0)
    config = FitConfig(diffusion=DiffusionConfig(prediction_type=prediction_type, width=16, num_blocks=1))
    basis = torch.linalg.qr(torch.randn(LAYOUT.num_values, K, generator=rng)).Q.T.contiguous()
    autoencoder = SubspaceAutoencoder(
        LAYOUT, torch.randn(LAYOUT.num_values, generator=rng), basis, torch.tensor([0.1, 0.2, 0.3]), 1.7
    )
    R = len(trajectories)
    axes = torch.linalg.qr(torch.randn(R, K, K, generator=rng)).Q
    frames = Frames(torch.randn(R, K, generator=rng), axes, torch.rand(R, K, generator=rng) + 0.1, 0.7)
    denoiser = new_denoiser(config, frames)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # zeros at first
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return WeightGenerator(
        layout=LAYOUT,
        config=config,
        autoencoder=autoencoder,
        frames=frames,
        denoiser=denoiser.eval(),
        trajectories=list(trajectories),
        report={"fidelity": 0.93},
        provenance={"store": "runs/a"},
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon", "v_prediction"])
def test_a_saved_generator_comes_back_bit_for_bit(tmp_path, prediction_type):
    generator = make_generator(prediction_type, ("a", "b"))

    path = generator.save(tmp_path / "fit")
    found = WeightGenerator.load(tmp_path / "fit")

    assert path == tmp_path / "fit" / "generator.safetensors"
    assert (found.config, found.layout, found.trajectories) == (generator.config, LAYOUT, ["a", "b"])
    assert (found.report, found.provenance) == ({"fidelity": 0.93}, {"store": "runs/a"})
    one, two = generator.sample(5, rng=seeded()), found.sample(5, rng=seeded())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert found.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_members_have_the_recorded_shapes_and_dtypes():
    weights = make_generator().sample(6, rng=seeded())

    assert {name: (tuple(t.shape), t.dtype) for name, t in weights.items()} == {
        "weight": ((6, 4, 3), torch.float32),
        "half": ((6, 5), torch.bfloat16),
        "running_var": ((6, 2), torch.float32),
    }
    assert weights["running_var"].min() > 0


def test_one_seed_gives_one_set_and_leaves_the_global_generator_alone():
    generator = make_generator()
    before = torch.get_rng_state()

    one, two, other = (generator.sample_latents(4, rng=seeded(s)) for s in (1, 1, 2))
    unseeded = generator.sample_latents(4)

    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one, unseeded)
    assert torch.equal(torch.get_rng_state(), before)


def test_members_one_at_a_time_are_those_of_the_whole_set():
    generator = make_generator()
    weights = generator.sample(5, rng=seeded())

    members = list(generator.sample_members(5, member_chunk=2, rng=seeded()))

    assert len(members) == 5
    for number, member in enumerate(members):
        for name, tensor in member.items():
            torch.testing.assert_close(tensor, weights[name][number])


def test_temperature_zero_gives_one_member_many_times():
    latents = make_generator().sample_latents(4, temperature=0.0, rng=seeded())

    assert torch.equal(latents, latents[:1].expand_as(latents))


def test_members_of_a_named_trajectory_are_conditioned_on_it():
    generator = make_generator(trajectories=("a", "b"))

    mixed = generator.sample_latents(4, rng=seeded())
    only_b = generator.sample_latents(4, rng=seeded(), trajectory="b")

    assert torch.allclose(mixed[1::2], only_b[1::2])
    assert not torch.allclose(mixed[::2], only_b[::2])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_members": 0}, "num_members = 0: it must be at least 1."),
        ({"temperature": -1.0}, "temperature = -1.0: it must be at least 0."),
        ({"num_sampling_steps": 0}, "num_sampling_steps = 0: it must be at least 1."),
        ({"diversity": 3}, "diversity = 3: it must be above 0 and at most 2."),
        ({"sampler": "euler"}, "sampler = 'euler': it must be one of ddpm, ddim, dpm-solver++, flow, heun, one-step."),
        ({"eta": 0.5}, "eta = 0.5: it must be 0 with the sampler 'flow'; it is for 'ddim'."),
        ({"eta": 1.5}, "eta = 1.5: it must be from 0 to 1."),
        (
            {"sampler": "one-step"},
            "sampler = 'one-step': it needs a generator that was fitted with distill_steps above 0.",
        ),
        ({"trajectory": "c"}, "trajectory = 'c': it must be one of a, b."),
        (
            {"sampler": "ddim"},
            "sampler = 'ddim': it must be 'flow', 'heun' or 'dpm-solver++' for a denoiser that predicts flow.",
        ),
    ],
)
def test_options_out_of_range_are_refused_in_words(options, text):
    with pytest.raises(ConfigError) as error:
        make_generator(trajectories=("a", "b")).sample(**{"num_members": 2, **options})
    assert str(error.value) == text


def test_a_file_of_a_newer_release_is_refused_by_both_numbers(tmp_path):
    path = tmp_path / "generator.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"format": "pdiff-generator", "format_version": "99"})

    with pytest.raises(FormatVersionError) as error:
        WeightGenerator.load(path)

    assert "has format version 99; this release reads versions up to 3" in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "generator.safetensors"
    with pytest.raises(GeneratorNotFoundError, match=r"holds no generator\.safetensors"):
        WeightGenerator.load(tmp_path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(FormatError, match="expected a complete pdiff-generator file"):
        WeightGenerator.load(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "pdiff-snapshots", "format_version": "1"})
    with pytest.raises(FormatError, match="expected format 'pdiff-generator'"):
        WeightGenerator.load(path)


def test_the_header_is_plain_json_that_names_what_the_file_is(tmp_path):
    raw = make_generator().save(tmp_path / "g.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]

    assert (header["format"], header["format_version"]) == ("pdiff-generator", "1")
    assert [t["name"] for t in json.loads(header["layout"])] == LAYOUT.names


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = make_generator().save(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pdiff_plugin.snapshots.tensor_files.TensorFileWriter.write", full)
    with pytest.raises(OSError, match="the disk is full"):
        make_generator().save(tmp_path)

    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["generator.safetensors"]


def test_settings_may_be_one_object_keywords_or_both():
    generator = make_generator(trajectories=("a", "b"))
    settings = SamplingConfig(sampler="heun", temperature=0.5, trajectory="b")

    for draw in (generator.sample_latents, lambda *args, **kwargs: generator.sample(*args, **kwargs)["weight"]):
        whole = draw(4, settings, rng=seeded())
        assert torch.equal(whole, draw(4, sampler="heun", temperature=0.5, trajectory="b", rng=seeded()))
        both = draw(4, SamplingConfig(sampler="heun", trajectory="b"), temperature=0.5, rng=seeded())
        assert torch.equal(whole, both)
        assert not torch.equal(whole, draw(4, replace(settings, temperature=0.6), rng=seeded()))
    with pytest.raises(TypeError, match="unexpected argument 'temprature'; SamplingConfig has sampler, "):
        generator.sample(4, temprature=0.5)


def test_heun_follows_the_same_path_as_the_natural_sampler_of_a_flow():
    generator = make_generator(trajectories=("a", "b"))

    expected = generator.sample_latents(8, num_sampling_steps=200, rng=seeded())
    found = generator.sample_latents(8, sampler="heun", num_sampling_steps=200, rng=seeded())
    usual = generator.sample_latents(8, sampler="heun", rng=seeded())

    assert 0 < (found - expected).norm() < 1e-4 * expected.norm()
    assert (usual - expected).norm() < 0.02 * expected.norm()


def test_eta_adds_noise_to_ddim_until_it_is_ddpm():
    generator = make_generator("epsilon")

    def latents(sampler, **options):
        return generator.sample_latents(6, sampler=sampler, rng=seeded(), **options)

    plain, half, whole = (latents("ddim", eta=eta) for eta in (0.0, 0.5, 1.0))

    assert torch.equal(plain, latents("ddim"))
    assert torch.equal(whole, latents("ddpm"))
    assert not torch.allclose(plain, half, atol=1e-3)
    assert not torch.allclose(half, whole, atol=1e-3)
    assert torch.equal(half, latents("ddim", eta=0.5))
    still = latents("ddim", eta=0.5, temperature=0.0)
    assert torch.equal(still, still[:1].expand_as(still))


def test_the_estimate_of_every_step_is_told_and_leads_to_the_sample():
    generator, estimates = make_generator(), []

    latents = generator.sample_latents(3, num_sampling_steps=7, rng=seeded(), on_step=estimates.append)

    assert [estimate.shape for estimate in estimates] == [latents.shape] * 7
    distances = [(estimate - latents).norm() for estimate in estimates]
    assert distances[-1] < 0.2 * distances[0]
