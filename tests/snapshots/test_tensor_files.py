"""Files written piece by piece are ordinary safetensors files."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pdiff_plugin
from pdiff_plugin.errors import FormatError, FormatVersionError, UnsupportedTensorError
from pdiff_plugin.snapshots.tensor_files import TensorFileWriter, from_json, load_header, load_tensors, save_tensors


def test_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path):
    rng = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype).removeprefix("torch."): torch.randint(0, 256, (5, 3 * dtype.itemsize), generator=rng)
        .to(torch.uint8 if dtype != torch.bool else torch.bool)
        .view(dtype)
        for dtype in safetensors.torch._SIZE
        # None is what this release of torch does not have; one is of two values each, one of a later release.
        if str(dtype) not in ("None", "torch.float4_e2m1fn_x2", "torch.float8_e8m0fnu")
    }
    tensors["scalar"] = torch.tensor(0.1, dtype=torch.float64)
    tensors["empty"] = torch.empty(0, 4)
    tensors["view"] = torch.randn(4, 6, generator=rng).T

    save_tensors(tmp_path / "a.safetensors", tensors, "x", 1, {"text": 'ü "quoted"'})

    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes), name
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


def test_a_dtype_that_safetensors_does_not_know_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedTensorError, match=r"tensor 'z' is of torch\.complex128; a safetensors file has no"):
        save_tensors(tmp_path / "a.safetensors", {"z": torch.zeros(1, dtype=torch.complex128)}, "x", 1)
    assert list(tmp_path.iterdir()) == []


def test_tensors_and_header_come_back_and_the_header_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.arange(3)}, "x", 2, {"state": "[1]"})
    tensors, header = load_tensors(path, "x", 2)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert header == load_header(path, "x", 2) == {"format": "x", "format_version": "2", "state": "[1]"}
    assert from_json(path, header, "state") == [1]


def test_a_file_of_another_kind_a_later_version_or_none_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.arange(3)}, "x", 2)
    for read in (load_tensors, load_header):
        with pytest.raises(FormatError, match="found format 'x', expected format 'y'"):
            read(path, "y", 2)
        with pytest.raises(FormatVersionError, match="has format version 2; this release reads versions up to 1"):
            read(path, "x", 1)
        with pytest.raises(FormatError, match="found a folder, expected a file"):
            read(tmp_path, "x", 1)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "b.safetensors", "x", 1)


@pytest.mark.parametrize("header", [{}, {"state": "{"}, {"state": "[" * 100_000}])
def test_a_header_without_the_json_that_is_wanted_is_refused(tmp_path, header):
    with pytest.raises(FormatError, match="as state, expected a header with JSON as state"):
        from_json(tmp_path, header, "state")


def test_only_one_module_reads_and_writes_safetensors():
    root = Path(pdiff_plugin.__file__).parent
    users = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"import.* safetensors|from safetensors", path.read_text(encoding="utf-8"))
    }
    # Checkpoints that others wrote are none of our formats.
    assert users == {"snapshots/tensor_files.py", "recording/checkpoints.py"}


@pytest.mark.parametrize("length", [0, 1, 37])
def test_the_first_tensor_begins_at_a_multiple_of_64_bytes_whatever_the_header_says(tmp_path, length):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3.0)}, "pdiff-x", 1, {"text": length * "a"})
    raw = (tmp_path / "a.safetensors").read_bytes()

    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 64 == 0
    assert raw[start:] == torch.arange(3.0).numpy().tobytes()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.arange(3.0))
