"""Generators written before, and files that are no generator any more."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pdiff_plugin import WeightGenerator
from pdiff_plugin.config import AUTOENCODER_CONFIGS
from pdiff_plugin.errors import FormatError
from pdiff_plugin.generator.generator_file import AUTOENCODERS

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", ["fit-v1", "fit-v1-conv", "fit-v1-aligned"])
def test_a_generator_written_before_makes_the_members_it_made_then(name):
    expected = load_file(DATA / name / "expected.safetensors")
    generator = WeightGenerator.load(DATA / name)

    latents = generator.sample_latents(3, rng=torch.Generator().manual_seed(0))
    found = {"latents": latents, **{f"members/{key}": tensor for key, tensor in generator.decode(latents).items()}}

    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if generator.config.diffusion.prediction_type == "flow":
            assert torch.equal(tensor, expected[key]), key
        else:
            # Signal and sigma of a step were rounded to float32 as their squares, and are now themselves.
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=0)


def test_every_kind_of_autoencoder_that_can_be_configured_can_be_read():
    assert set(AUTOENCODERS) == set(AUTOENCODER_CONFIGS)


@pytest.mark.parametrize(("name", "kind"), [("fit-v1", "subspace"), ("fit-v1-conv", "conv")])
def test_settings_from_before_autoencoders_had_a_kind_are_those_with_it(name, kind, tmp_path):
    with safe_open(DATA / name / "generator.safetensors", framework="pt") as file:
        assert "kind" not in json.loads(file.metadata()["config"])["autoencoder"]
    generator = WeightGenerator.load(DATA / name)

    again = WeightGenerator.load(generator.save(tmp_path))

    assert generator.config.autoencoder.kind == kind
    assert again.config == generator.config
    with safe_open(tmp_path / "generator.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"])["autoencoder"]["kind"] == kind


def changed(folder, name, *, header=None, tensors=None):
    """The folder of a copy of a stored generator with parts of its file replaced, or left out where they are None."""
    path = DATA / name / "generator.safetensors"
    with safe_open(path, framework="pt") as file:
        texts = {**file.metadata(), **(header or {})}
    parts = {**load_file(path), **(tensors or {})}
    save_file(
        {key: part for key, part in parts.items() if part is not None},
        folder / "generator.safetensors",
        {key: text for key, text in texts.items() if text is not None},
    )
    return folder


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"config": None}, "None as config, expected a header with JSON as config"),
        ({"layout": None}, "None as layout, expected a header with JSON as layout"),
        ({"provenance": None}, "None as provenance, expected a header with JSON as provenance"),
        ({"config": "{"}, "'{' as config, expected a header with JSON as config"),
        ({"config": "[]"}, "config in the header that cannot be read (TypeError"),
        ({"config": "{}"}, "config in the header that cannot be read (KeyError: 'autoencoder')"),
        ({"layout": "3"}, "tensors of type int, expected a list of tensors"),
        ({"layout": '[{"name": "w", "shape": [2], "dtype": "int8", "kind": "parameter"}]'}, "'dtype': 'int8'"),
        ({"trajectories": "null"}, "trajectories in the header that cannot be read (TypeError"),
    ],
)
def test_a_header_that_lacks_a_part_or_holds_another_is_refused_by_name(tmp_path, header, text):
    with pytest.raises(FormatError) as error:
        WeightGenerator.load(changed(tmp_path, "fit-v1", header=header))

    assert str(error.value).startswith(f"{tmp_path / 'generator.safetensors'}: found ")
    assert text in str(error.value)


def test_an_autoencoder_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    with safe_open(DATA / "fit-v1" / "generator.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    config["autoencoder"]["kind"] = "tokens"

    with pytest.raises(FormatError, match=r"autoencoder\.kind = 'tokens': it must be one of subspace, conv"):
        WeightGenerator.load(changed(tmp_path, "fit-v1", header={"config": json.dumps(config)}))


@pytest.mark.parametrize(
    ("name", "tensor", "value", "text"),
    [
        ("fit-v1", "autoencoder.basis", (9, 39), "of shape (9, 39), expected shape (9, 40)"),
        ("fit-v1", "autoencoder.mean", None, "missing, expected shape (40)"),
        ("fit-v1", "frames.centre", (3, 9), "of shape (3, 9), expected shape (2, 9)"),
        ("fit-v1", "frames.std", (2, 8), "of shape (2, 8), expected shape (2, 9)"),
        ("fit-v1", "denoiser.network.outlet.bias", (8,), "of shape (8), expected shape (9)"),
        ("fit-v1", "denoiser.network.inlet.weight", None, "missing, expected shape (16, 9)"),
        ("fit-v1", "denoiser.network.blocks.7.up.bias", (32,), "present, expected no such tensor with these settings"),
        ("fit-v1", "one_step.network.outlet.bias", (8,), "of shape (8), expected shape (9)"),
        ("fit-v1-conv", "autoencoder.scales", (2,), "of shape (2), expected shape (3)"),
        ("fit-v1-conv", "autoencoder.network.to_mean.bias", (5,), "of shape (5), expected shape (4)"),
        ("fit-v1-aligned", "alignment.run-002", (4,), "of shape (4), expected shape (5)"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(tmp_path, name, tensor, value, text):
    folder = changed(tmp_path, name, tensors={tensor: None if value is None else torch.zeros(value)})

    with pytest.raises(FormatError) as error:
        WeightGenerator.load(folder)

    assert str(error.value).startswith(f"{folder / 'generator.safetensors'}: found tensor {tensor!r} {text}. Check")


def test_a_loaded_generator_knows_where_it_came_from():
    assert WeightGenerator.load(DATA / "fit-v1").path == DATA / "fit-v1"


def settings_of(name, **changes):
    """The ``config`` of a stored generator with other settings of its diffusion."""
    with safe_open(DATA / name / "generator.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    config["diffusion"] |= changes
    return json.dumps(config)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"width": 2 * 10**8}, "expected shape (200000000, 9)"),
        ({"num_blocks": 10**9}, "expected those of 1000000000 layers"),
        ({"num_blocks": 1.5}, "num_blocks = 1.5: it must be of the type int"),
        ({"precondition": 1}, "precondition = 1: it must be of the type bool"),
        ({"num_sampling_steps": 10**9}, "num_sampling_steps = 1000000000: it must be from 1 to 10000"),
        ({"num_timesteps": 10**12}, "num_timesteps = 1000000000000: it must be from 2 to 10000"),
        ({"sampler": ["flow"]}, "sampler = ('flow',)"),
    ],
)
def test_settings_that_ask_for_more_than_the_file_holds_are_refused(tmp_path, changes, text):
    with pytest.raises(FormatError) as error:
        WeightGenerator.load(changed(tmp_path, "fit-v1", header={"config": settings_of("fit-v1", **changes)}))
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"trajectories": '"ab"'}, "trajectories in the header that cannot be read (TypeError: no list of names)"),
        ({"trajectories": r'["a\u001b[2J", "b"]'}, "no list of names"),
        ({"report": '{"diversity_curve": [{"temperature": "hot", "spread_ratio": 1}]}'}, "a diversity curve of other"),
        ({"report": '{"condition": 3}'}, "report in the header that cannot be read"),
        ({"provenance": '[["a", 1]]'}, "provenance in the header that cannot be read"),
    ],
)
def test_a_header_of_other_types_is_refused_before_it_is_worked_with(tmp_path, header, text):
    with pytest.raises(FormatError) as error:
        WeightGenerator.load(changed(tmp_path, "fit-v1", header=header))
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensors", "text"),
    [
        ("fit-v1", {"autoencoder.basis": torch.zeros(9, 40, dtype=torch.int32)}, "of torch.int32, expected one of"),
        ("fit-v1", {"autoencoder.basis": torch.zeros(9, 40, dtype=torch.float64)}, "expected one of torch.float32, to"),
        ("fit-v1", {"autoencoder.basis": torch.zeros(0, 40)}, "of shape (0, 40), expected shape (1, 40)"),
        ("fit-v1", {"frames.std": torch.full((2, 9), torch.nan)}, "with NaN or Inf, expected finite numbers"),
        ("fit-v1", {"denoiser.network.outlet.bias": torch.zeros(9, dtype=torch.complex64)}, "of torch.complex64"),
        ("fit-v1-aligned", {"alignment.run-002": torch.tensor([0, 0, 1, 2, 3])}, "the units of each layer, each once"),
        ("fit-v1-aligned", {"alignment.run-002": torch.tensor([0, 1, 2, 3, 9])}, "the units of each layer, each once"),
        ("fit-v1-aligned", {"alignment.run-002": torch.zeros(5)}, "of torch.float32, expected one of torch.int64"),
    ],
)
def test_tensors_of_other_dtypes_or_values_are_refused_by_name(tmp_path, name, tensors, text):
    with pytest.raises(FormatError) as error:
        WeightGenerator.load(changed(tmp_path, name, tensors=tensors))
    assert f"found tensor {next(iter(tensors))!r} " in str(error.value)
    assert text in str(error.value)


def test_tensors_of_another_width_of_float_are_converted(tmp_path):
    stored = load_file(DATA / "fit-v1" / "generator.safetensors")
    wide = {name: tensor.double() for name, tensor in stored.items() if "basis" not in name}
    members = [
        WeightGenerator.load(folder).sample(2, rng=torch.Generator().manual_seed(0))
        for folder in (changed(tmp_path, "fit-v1", tensors=wide), DATA / "fit-v1")
    ]
    assert all(torch.equal(members[0][name], members[1][name]) for name in members[1])


def test_loading_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    WeightGenerator.load(DATA / "fit-v1-conv")
    assert torch.equal(torch.random.get_rng_state(), before)
