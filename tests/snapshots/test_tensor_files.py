"""Files written piece by piece are ordinary safetensors files."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pdiff_plugin.errors import FormatError
from pdiff_plugin.snapshots.tensor_files import TensorFileWriter, save_tensors


def test_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path):
    rng = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype).removeprefix("torch."): torch.randn(5, 3, generator=rng).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    }
    tensors["scalar"] = torch.tensor(0.1, dtype=torch.float64)
    tensors["empty"] = torch.empty(0, 4)
    tensors["view"] = torch.randn(4, 6, generator=rng).T

    save_tensors(tmp_path / "a.safetensors", tensors, "x", 1, {"text": 'ü "quoted"'})

    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "x", "format_version": "1", "text": 'ü "quoted"'}


def test_runs_of_values_may_come_in_any_order_and_in_another_dtype(tmp_path):
    values = torch.arange(12.0)
    path = tmp_path / "a.safetensors"

    with TensorFileWriter(path, {"a": (torch.bfloat16, (3, 4)), "b": (torch.float32, (2,))}, {}) as file:
        file.write("a", values[8:], first=8)
        file.write("b", torch.tensor([1.0, 2.0], dtype=torch.float64))
        file.write("a", values[:8])

    found = load_file(path)
    assert torch.equal(found["a"], values.reshape(3, 4).bfloat16())
    assert torch.equal(found["b"], torch.tensor([1.0, 2.0]))


def test_a_file_with_values_missing_is_refused_on_closing(tmp_path):
    writer = TensorFileWriter(tmp_path / "a.safetensors", {"a": (torch.float32, (10,))}, {})
    writer.write("a", torch.zeros(7))

    with pytest.raises(FormatError) as error:
        writer.close()

    assert str(error.value).endswith(
        "a.safetensors: found 12 bytes unwritten, expected every declared value. Write the rest before closing."
    )


def test_an_error_inside_is_not_hidden_by_the_missing_values(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        TensorFileWriter(tmp_path / "a.safetensors", {"a": (torch.float32, (10,))}, {}),
    ):
        raise KeyboardInterrupt
