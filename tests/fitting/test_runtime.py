"""Checkpoints and progress of one process."""

import pytest
import torch
from safetensors.torch import save_file

from pdiff_plugin.errors import FormatError, FormatVersionError
from pdiff_plugin.fitting.runtime import Runtime, pick_device


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    runtime = Runtime(tmp_path)
    tensors = {"a": torch.randn(3, 4), "rng": torch.Generator().get_state()}

    runtime.save_checkpoint("stage", tensors, {"step": 7, "loss": 0.1})
    found, state = runtime.load_checkpoint("stage")

    assert state == {"step": 7, "loss": 0.1}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_without_a_folder_there_are_no_checkpoints():
    runtime = Runtime()
    runtime.save_checkpoint("stage", {"a": torch.zeros(1)}, {})
    assert runtime.load_checkpoint("stage") is None


def test_dropping_checkpoints_leaves_other_files(tmp_path):
    runtime = Runtime(tmp_path)
    runtime.save_checkpoint("stage", {"a": torch.zeros(1)}, {})
    (tmp_path / "other.safetensors").write_text("mine")

    runtime.drop_checkpoints()

    assert [p.name for p in tmp_path.iterdir()] == ["other.safetensors"]


def test_a_broken_checkpoint_says_how_to_start_anew(tmp_path):
    (tmp_path / "stage.checkpoint.safetensors").write_bytes(b"half a fi")
    with pytest.raises(FormatError, match="a checkpoint; use --fresh"):
        Runtime(tmp_path).load_checkpoint("stage")


def test_a_checkpoint_of_a_newer_release_is_refused(tmp_path):
    header = {"format": "pdiff-fit-checkpoint", "format_version": "5", "state": "{}"}
    save_file({"a": torch.zeros(1)}, tmp_path / "stage.checkpoint.safetensors", header)
    with pytest.raises(FormatVersionError, match="format version 5"):
        Runtime(tmp_path).load_checkpoint("stage")


def test_progress_reaches_whoever_watches():
    seen = []
    Runtime(None, seen.append).report("diffusion", 3, 10, loss=0.5)

    assert [(p.stage, p.step, p.total_steps, p.metrics) for p in seen] == [("diffusion", 3, 10, {"loss": 0.5})]


def test_a_named_device_is_taken_as_it_is():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
