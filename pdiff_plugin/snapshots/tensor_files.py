"""Tensor files: one writer and one reader for every safetensors format of ours.

Files are written piece by piece, so that a large tensor need never be in memory a second time:
``safetensors.torch.save_file`` wants whole tensors, and before its release 0.6 it copies each of them to bytes first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdiff_plugin.errors import FormatError
from pdiff_plugin.snapshots.files import check_format, replacing

# https://github.com/huggingface/safetensors#format
_DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_COPY_BYTES = 1 << 24


class TensorFileWriter:
    """A safetensors file whose tensors are declared first and filled in any order, a run of values at a time.

    Args:
        path: the file; it is complete once every value was written and the writer is closed.
        tensors: name -> (dtype, shape).
        header: the file's metadata.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], header: Mapping[str, str]
    ) -> None:
        document: dict[str, object] = {"__metadata__": dict(header)}
        self._places: dict[str, tuple[int, torch.dtype]] = {}
        offset = 0
        # Readers want tensors aligned to their dtype: the widest ones come first.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            size = dtype.itemsize * torch.Size(shape).numel()
            document[name] = {
                "dtype": _DTYPE_CODES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            self._places[name] = (offset, dtype)
            offset += size
        text = json.dumps(document).encode()
        text += b" " * (-len(text) % 8)
        self.path = path
        self._missing = offset
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._start = self._file.tell()
        self._file.truncate(self._start + offset)

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
            raise FormatError(str(self.path), f"{self._missing} bytes unwritten", "every declared value")

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], name: str, version: int, header: Mapping[str, str] | None = None
) -> None:
    """Write a tensor file of ours, atomically and without a copy of any tensor in memory.

    Args:
        path: the file, which is replaced.
        tensors: of any of the dtypes that a snapshot may have, and int64 and uint8.
        name: of the format.
        version: of the format.
        header: more text for the header.
    """
    text = {"format": name, "format_version": str(version), **(header or {})}
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with replacing(path) as temp, TensorFileWriter(temp, specs, text) as file:
        for key, tensor in tensors.items():
            file.write(key, tensor)


def load_tensors(path: Path, name: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped from the file, and header of what :func:`save_tensors` wrote.

    Raises:
        FormatError: unreadable, or another format.
        FormatVersionError: from a newer release.
    """
    try:
        with safe_open(path, framework="pt") as file:
            opened: Any = file
            header: dict[str, str] = opened.metadata() or {}
            check_format(str(path), header, name, version)
            return {key: opened.get_tensor(key) for key in opened.keys()}, header  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise FormatError(str(path), f"an unreadable file ({error})", f"a {name} file") from error
