"""Writing safetensors files piece by piece, so that a large tensor need never be in memory a second time.

``safetensors.torch.save_file`` wants whole tensors, and before its release 0.6 it copies each of them to bytes first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pdiff_plugin.errors import FormatError

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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write whole tensors without a copy of any of them in memory."""
    with TensorFileWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, header) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
