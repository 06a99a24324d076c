"""Tensor files: one writer and one reader for every safetensors format of ours.

Files are written piece by piece, so that a large tensor need never be in memory a second time:
``safetensors.torch.save_file`` wants whole tensors, and before its release 0.6 it copies each of them to bytes first.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdiff_plugin.errors import FormatError, UnsupportedTensorError
from pdiff_plugin.snapshots.files import check_format, check_regular, parse_json, replacing

# https://github.com/huggingface/safetensors#format
_DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_COPY_BYTES = 1 << 24


class TensorFileWriter:
    """A safetensors file whose tensors are declared first and filled in any order, a run of values at a time.

    Args:
        path: the file; it is complete once every value was written and the writer is closed.
        tensors: name -> (dtype, shape).
        header: the file's metadata.

    Raises:
        UnsupportedTensorError: a dtype that the format does not know; no file is made.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], header: Mapping[str, str]
    ) -> None:
        document: dict[str, object] = {"__metadata__": dict(header)}
        self._places: dict[str, tuple[int, torch.dtype]] = {}
        offset = 0
        # Readers want tensors aligned to their dtype: the widest ones come first.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            if dtype not in _DTYPE_CODES:
                raise UnsupportedTensorError(name, f"of {dtype}", "a safetensors file has no such dtype")
            size = dtype.itemsize * torch.Size(shape).numel()
            document[name] = {
                "dtype": _DTYPE_CODES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            self._places[name] = (offset, dtype)
            offset += size
        text = json.dumps(document).encode()
        # Tensors then lie alike whatever the header says, and products of mapped ones have the same last digit.
        text += b" " * (-(8 + len(text)) % 64)
        self.path = path
        self._missing = offset
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._start = 8 + len(text)
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(self._start + offset)
        except OSError:
            self._file.close()
            raise

    def write(self, name: str, values: Tensor, first: int = 0) -> None:
        """Write ``values`` (flattened, converted to the declared dtype) at value number ``first`` of a tensor."""
        offset, dtype = self._places[name]
        flat = values.detach().reshape(-1)
        self._file.seek(self._start + offset + first * dtype.itemsize)
        count = max(1, _COPY_BYTES // dtype.itemsize)
        for start in range(0, flat.numel(), count):
            self._file.write(flat[start : start + count].to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
        self._missing -= flat.numel() * dtype.itemsize

    def close(self) -> None:
        """Close the file.

        Raises:
            FormatError: values that were declared have not been written.
        """
        self._file.close()
        if self._missing:
            raise FormatError(
                str(self.path),
                f"{self._missing} bytes unwritten",
                "every declared value",
                "Write the rest before closing.",
            )

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


# Writes tensors that are made as they are written, a run of values at a time.
LateTensors = Callable[[TensorFileWriter], None]


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    name: str,
    version: int,
    header: Mapping[str, str] | None = None,
    late: LateTensors | None = None,
) -> None:
    """Write a tensor file of ours, atomically and without a copy of any tensor in memory.

    Args:
        path: the file, which is replaced.
        tensors: of any dtype, layout in memory and device; those on the device ``meta`` are left to ``late``.
        name: of the format.
        version: of the format.
        header: more text for the header.
        late: writes these.

    Raises:
        UnsupportedTensorError: a dtype that safetensors does not know.
    """
    text = {"format": name, "format_version": str(version), **(header or {})}
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with replacing(path) as temp, TensorFileWriter(temp, specs, text) as file:
        for key, tensor in tensors.items():
            if not tensor.is_meta:
                file.write(key, tensor)
        if late is not None:
            late(file)


def load_tensors(path: Path, name: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped from the file, and header of what :func:`save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: unreadable, or another format.
        FormatVersionError: from a newer release.
    """
    with _opened(path, name, version) as (file, header):
        return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118 (not a dict)


def load_state(path: Path, name: str, version: int) -> dict[str, Tensor]:
    """Tensors, mapped from a file of ours or from the state dict of somebody else, which says "pt" or nothing.

    Errors are those of :func:`load_tensors`.
    """
    with _opened(path, name, version, others=(None, "pt")) as (file, _):
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def load_header(path: Path, name: str, version: int) -> dict[str, str]:
    """The header alone; errors as those of :func:`load_tensors`."""
    with _opened(path, name, version) as (_, header):
        return header


def from_json(path: Path, header: Mapping[str, str], key: str) -> Any:
    """What stands in a header as JSON text.

    Raises:
        FormatError: there is no such key, or no JSON under it.
    """
    expected = f"a header with JSON as {key}"
    try:
        return parse_json(header.get(key, ""), str(path), expected)
    except FormatError as error:
        raise FormatError(str(path), f"{reprlib.repr(header.get(key))} as {key}", expected) from error


@contextmanager
def _opened(
    path: Path, name: str, version: int, others: Sequence[str | None] = ()
) -> Iterator[tuple[Any, dict[str, str]]]:
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            opened: Any = file
            header = opened.metadata() or {}
            if header.get("format") not in others:
                check_format(str(path), header, name, version)
            yield opened, header
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise FormatError(str(path), f"an unreadable file ({error})", f"a complete {name} file") from error
