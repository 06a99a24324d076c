"""Members as files: what `sample` gives, in little memory, whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pdiff_plugin import FitConfig, WeightGenerator
from pdiff_plugin.config import DiffusionConfig
from pdiff_plugin.generator.denoiser import new_denoiser
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.members import MEMBER_CHUNK, write_latents
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
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
    with safe_open(paths[1], framework="pt") as file:
        assert file.metadata() == {"format": "pt", "member": "4"}


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
