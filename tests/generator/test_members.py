"""Members as files: what `sample` gives, in little memory, whole or not at all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from pdiff_plugin import FitConfig, WeightGenerator, swap_
from pdiff_plugin.config import DiffusionConfig
from pdiff_plugin.errors import ConfigError, LayoutMismatchError, MembersExistError
from pdiff_plugin.generator.denoiser import new_denoiser
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.members import MEMBER_CHUNK, write_latents, write_members
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.layout import Layout, TensorSpec

K = 4
MIXED = Layout(
    (
        TensorSpec("scalar", (), "float32", "parameter"),
        TensorSpec("weight", (300, 500), "float32", "parameter"),
        TensorSpec("half", (7, 11), "float16", "parameter"),
        TensorSpec("empty", (0, 3), "float32", "parameter"),
        TensorSpec("brain", (13,), "bfloat16", "parameter"),
        TensorSpec("double", (5,), "float64", "parameter"),
        TensorSpec("norm.running_var", (9,), "float16", "buffer"),
    )
)


def make_generator(layout=MIXED, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    D = layout.num_values
    scales = torch.rand(len(layout.tensors), generator=rng) + 0.1
    basis = torch.randn(K, D, generator=rng).to(dtype)
    autoencoder = SubspaceAutoencoder(layout, torch.randn(D, generator=rng), basis, scales, 1.7)
    config = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1))
    frames = Frames(torch.zeros(1, K), torch.eye(K)[None], torch.ones(1, K), 1.0)
    denoiser = new_denoiser(config, frames).eval()
    return WeightGenerator(
        layout=layout,
        config=config,
        autoencoder=autoencoder,
        frames=frames,
        denoiser=denoiser,
        trajectories=["run-001"],
    )


def seeded():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_what_sample_gives_bit_for_bit(tmp_path, dtype):
    generator, M = make_generator(dtype=dtype), MEMBER_CHUNK + 4
    weights = generator.sample(M, rng=seeded())

    paths = write_latents(generator, generator.sample_latents(M, rng=seeded()), tmp_path, {"format": "pt"}, first=3)

    assert [path.name for path in paths] == [f"member-{number:04d}.safetensors" for number in range(3, M + 3)]
    assert sorted(tmp_path.iterdir()) == paths
    for member, path in enumerate(paths):
        found = load_file(path)
        assert found.keys() == weights.keys()
        for name, tensor in found.items():
            assert (tensor.dtype, tensor.shape) == (weights[name].dtype, weights[name].shape[1:])
            assert torch.equal(tensor, weights[name][member])
    assert header_of(paths[1]) == {"format": "pt", "member": "4"}


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_members_are_written_with_where_they_came_from(tmp_path):
    generator = WeightGenerator.load(make_generator().save(tmp_path / "fit"))
    weights, told = generator.sample(3, temperature=0.5, rng=torch.Generator().manual_seed(7)), []

    paths = write_members(
        generator, tmp_path / "new" / "members", num_members=3, seed=7, temperature=0.5, on_progress=told.append
    )

    assert paths == [tmp_path / "new" / "members" / f"member-{number:04d}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        assert all(torch.equal(tensor, weights[name][number]) for name, tensor in load_file(path).items())
        assert header_of(path) == {
            "format": "pdiff-member",
            "format_version": "1",
            "generator": str(tmp_path / "fit" / "generator.safetensors"),
            "seed": "7",
            "member": str(number),
        }
    assert [(p.stage, p.step, p.total_steps) for p in told] == [("generate", 3, 3)]


def test_members_that_are_there_are_replaced_only_when_asked(tmp_path):
    generator = make_generator()
    first = write_members(generator, tmp_path, num_members=3)
    before = [path.read_bytes() for path in first]

    with pytest.raises(MembersExistError, match="already holds 3 members"):
        write_members(generator, tmp_path, num_members=2, seed=1)
    with pytest.raises(ConfigError, match="temperature = -1"):
        write_members(generator, tmp_path, num_members=2, overwrite=True, temperature=-1)
    assert [path.read_bytes() for path in first] == before

    again = write_members(generator, tmp_path, num_members=2, seed=1, overwrite=True)
    assert sorted(tmp_path.iterdir()) == again == first[:2]
    assert again[0].read_bytes() != before[0]


def test_only_the_members_that_are_kept_are_written_and_none_is_lost_where_that_fails(tmp_path):
    generator = make_generator()
    weights = generator.sample(5, rng=torch.Generator().manual_seed(0))
    seen = []

    def keep(drawn):
        seen.append(drawn.num_members)
        return [3, 1]

    paths = write_members(generator, tmp_path, num_members=5, keep=keep)

    assert seen == [5]
    assert [path.name for path in paths] == ["member-0000.safetensors", "member-0001.safetensors"]
    for path, member in zip(paths, (3, 1), strict=True):
        torch.testing.assert_close(load_file(path)["weight"], weights["weight"][member])

    def refuse(drawn):
        raise ConfigError("threshold", 0.9, "must be reached by a member")

    with pytest.raises(ConfigError, match="threshold"):
        write_members(generator, tmp_path, num_members=5, keep=refuse, overwrite=True)
    assert sorted(tmp_path.iterdir()) == paths


def test_another_writer_is_given_the_latents_and_the_header(tmp_path):
    generator, given = make_generator(), []

    def write(latents, folder, header, on_progress):
        given.append((latents, folder, header))
        return [folder / "elsewhere"]

    assert write_members(generator, tmp_path, num_members=2, write=write) == [tmp_path / "elsewhere"]
    [(latents, folder, header)] = given
    assert torch.equal(latents, generator.sample_latents(2, rng=torch.Generator().manual_seed(0)))
    assert folder == tmp_path
    assert header == {"format": "pdiff-member", "format_version": "1", "seed": "0"}


def test_sample_is_the_flat_decoding_cut_by_the_layout():
    generator = make_generator()
    flat = generator.autoencoder.decode(generator.sample_latents(20, rng=seeded()))

    weights = generator.sample(20, rng=seeded())

    assert all(torch.equal(weights[name], tensor) for name, tensor in MIXED.unflatten(flat).items())


def test_an_interrupted_run_leaves_whole_files_only(tmp_path, monkeypatch):
    generator, M = make_generator(), 2 * MEMBER_CHUNK
    (tmp_path / "member-0020.safetensors").write_text("earlier")
    decode_blocks, num_blocks = generator.autoencoder.decode_blocks, []

    def interrupted(latents):
        for block in decode_blocks(latents):
            num_blocks.append(block)
            if len(num_blocks) == 10:  # in the second chunk of members
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(generator.autoencoder, "decode_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_latents(generator, generator.sample_latents(M, rng=seeded()), tmp_path, {})

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"member-{number:04d}.safetensors" for number in range(MEMBER_CHUNK)), "member-0020.safetensors"]
    assert (tmp_path / "member-0020.safetensors").read_text() == "earlier"
    assert load_file(tmp_path / "member-0015.safetensors").keys() == set(MIXED.names)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon, which Linux alone has")
def test_memory_does_not_grow_with_the_number_of_values_and_members(tmp_path, monkeypatch):
    generator = make_generator(Layout((TensorSpec("w", (2_000_000,), "float32", "parameter"),)))
    decode_blocks, held = generator.autoencoder.decode_blocks, []

    def watched(latents):
        for block in decode_blocks(latents):
            held.append(int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024)
            yield block

    monkeypatch.setattr(generator.autoencoder, "decode_blocks", watched)
    paths = write_latents(generator, generator.sample_latents(MEMBER_CHUNK, rng=seeded()), tmp_path, {})

    # 16 members are 128 MB, a block of them 4 MB.
    assert sum(path.stat().st_size for path in paths) > 128e6
    assert max(held) - held[0] < 40


class Model(nn.Module):
    """As the mixed layout, with a tensor that is not contiguous, one in another dtype, and one of its own."""

    def __init__(self):
        super().__init__()
        for name, tensor in {
            "scalar": torch.zeros(()),
            "weight": torch.zeros(500, 300).T,
            "f16": torch.zeros(7, 11).half(),
            "empty": torch.zeros(0, 3),
            "brain": torch.zeros(13),
            "f64": torch.zeros(5).double(),
            "other": torch.ones(3),
        }.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.norm = nn.Module()
        self.norm.register_buffer("running_var", torch.zeros(9).half())


def generator_of_models():
    names = {"half": "f16", "double": "f64"}
    return make_generator(Layout(tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in MIXED)))


def test_a_member_drawn_into_a_model_is_the_one_that_is_swapped_in():
    generator, model, expected = generator_of_models(), Model(), Model()
    swap_(expected, generator.sample(1, rng=seeded(), temperature=0.5).member(0))

    generator.sample_into(model, rng=seeded(), temperature=0.5)

    found = named_tensors(model)
    assert float(found["weight"].detach().std()) > 0.1
    for name, tensor in named_tensors(expected).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_model_that_does_not_fit_is_left_as_it_is():
    model = Model()
    model.f64 = nn.Parameter(torch.zeros(4))

    with pytest.raises(LayoutMismatchError, match="'f64'"):
        generator_of_models().sample_into(model)

    assert all(not tensor.detach().any() for name, tensor in named_tensors(model).items() if name != "other")
