"""Which tensors a snapshot holds, and the exact map between them and one flat vector.

Shapes: D values in a flat vector, B flat vectors in a batch, ``*shape`` the shape of one tensor.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import FormatError, LayoutMismatchError, UnsupportedTensorError
from pdiff_plugin.modules.names import check_fits, named_tensors, shapes_of
from pdiff_plugin.snapshots.files import read_json

Kind = Literal["parameter", "buffer"]

FORMAT = "pdiff-snapshots"
FORMAT_VERSION = 1
LAYOUT_NAME = "layout.json"

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_VALUES = 2**63 - 1
# torch takes 64 sizes, one of which is that of a batch, and 2^63 bytes.
_MAX_DIMENSIONS = 60
_MAX_NUMEL = 2**47


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layout."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} {self.shape}"


@dataclass(frozen=True)
class Layout:
    """Ordered tensors and their places in a flat vector of ``num_values`` numbers."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], kinds: Mapping[str, Kind] | None = None) -> Layout:
        """Describe ``tensors`` in their order.

        Args:
            tensors: name -> floating-point tensor of any shape.
            kinds: name -> "parameter" or "buffer"; without it, parameters are told by their class.

        Raises:
            UnsupportedTensorError: for a tensor that is sharded or not of float64, float32, float16 or bfloat16.
        """
        specs = []
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise UnsupportedTensorError(name, f"of {tensor.dtype}", f"a snapshot holds {', '.join(DTYPES)}")
            kind: Kind = kinds[name] if kinds else ("parameter" if isinstance(tensor, nn.Parameter) else "buffer")
            specs.append(TensorSpec(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], kind))
        return cls(tuple(specs))

    @classmethod
    def from_json(cls, tensors: object, path: str = "a layout") -> Layout:
        """Inverse of :meth:`to_json`, given anything.

        Raises:
            FormatError: it is not such a list; ``path`` says where it stands.
        """
        if not isinstance(tensors, list):
            raise FormatError(path, f"tensors of type {type(tensors).__name__}", "a list of tensors")
        layout = cls(tuple(_parse_spec(spec, path) for spec in tensors))
        for name, count in Counter(layout.names).items():
            if count > 1:
                raise FormatError(path, f"{count} tensors of the name {name!r}", "each name once")
        if layout.num_values > _MAX_VALUES:
            raise FormatError(path, f"{layout.num_values} values in a row", f"at most {_MAX_VALUES}")
        for spec in layout:
            # Also where a size of 0 leaves nothing of it: torch works out the strides all the same.
            if len(spec.shape) > _MAX_DIMENSIONS or prod(max(size, 1) for size in spec.shape) > _MAX_NUMEL:
                found = f"{spec.name!r} of shape {reprlib.repr(spec.shape)}"
                raise FormatError(path, found, f"at most {_MAX_DIMENSIONS} sizes and {_MAX_NUMEL} values")
        return layout

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists and dictionaries, ready for ``json.dumps``."""
        return [{**asdict(spec), "shape": list(spec.shape)} for spec in self.tensors]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Name -> the tensor's place in the flat vector."""
        slices, start = {}, 0
        for spec in self.tensors:
            slices[spec.name] = slice(start, start + spec.numel)
            start += spec.numel
        return slices

    @cached_property
    def num_values(self) -> int:
        """Length D of a flat vector."""
        return sum(spec.numel for spec in self.tensors)

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.tensors]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {spec.name: spec.shape for spec in self.tensors}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {spec.name: DTYPES[spec.dtype] for spec in self.tensors}

    @property
    def flat_dtype(self) -> torch.dtype:
        """The narrowest dtype in which every tensor of this layout is exact: float32, or float64 where one needs it."""
        return torch.float64 if any(s.dtype == "float64" for s in self.tensors) else torch.float32

    @property
    def digest(self) -> str:
        """Hex fingerprint of names, shapes, dtypes and kinds."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Concatenate ``tensors`` in layout order.

        Args:
            tensors: name -> (*shape) or, all with the same B, (B, *shape). Other names are ignored.
            dtype: of the result; :attr:`flat_dtype` unless given, in which the round trip is exact.

        Returns:
            A new tensor, (D,) or (B, D), on the device of the tensors.

        Raises:
            LayoutMismatchError: naming the first tensor that is missing or of another shape.
        """
        lead = self._lead(tensors)
        parts = [tensors[spec.name].detach().to(dtype or self.flat_dtype).reshape(*lead, -1) for spec in self.tensors]
        return torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector into tensors of their own shapes and dtypes.

        Args:
            flat: (D,) or (B, D).

        Returns:
            Name -> (*shape) or (B, *shape). The tensors own their memory.
        """
        if flat.shape[-1] != self.num_values:
            raise LayoutMismatchError("<flat vector>", f"{self.num_values} values", f"{flat.shape[-1]}", "the layout")
        lead = flat.shape[:-1]
        return {
            spec.name: flat[..., self.slices[spec.name]].reshape((*lead, *spec.shape)).to(DTYPES[spec.dtype], copy=True)
            for spec in self.tensors
        }

    def check_same(self, other: Layout, where: str = "the store") -> None:
        """Raise :class:`LayoutMismatchError` at the first tensor in which ``other`` differs from this layout."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=False):
            if mine.name != theirs.name:
                raise LayoutMismatchError(theirs.name, f"{mine.name!r} in its place", str(theirs), where)
            if mine != theirs:
                raise LayoutMismatchError(mine.name, str(mine), str(theirs), where)
        longer = max(self.tensors, other.tensors, key=len)
        if len(self.tensors) != len(other.tensors):
            extra = longer[min(len(self.tensors), len(other.tensors))]
            found, expected = ("nothing", str(extra)) if longer is self.tensors else (str(extra), "nothing")
            raise LayoutMismatchError(extra.name, expected, found, where)

    def check_model(self, model: nn.Module, where: str = "the generator") -> None:
        """Raise :class:`LayoutMismatchError` at the first tensor that ``model`` lacks or has in another shape.

        The dtype may differ: weights recorded in float32 can serve a half-precision copy of the model.
        """
        check_fits(self.shapes, shapes_of(named_tensors(model)), where)

    def _lead(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        lead: tuple[int, ...] | None = None
        for spec in self.tensors:
            found = tensors.get(spec.name)
            if found is None:
                raise LayoutMismatchError(spec.name, str(spec), "no such tensor", "the layout")
            cut = found.ndim - len(spec.shape)
            here = tuple(found.shape[: max(cut, 0)])
            if tuple(found.shape[max(cut, 0) :]) != spec.shape or cut > 1 or (lead is not None and here != lead):
                raise LayoutMismatchError(spec.name, str(spec.shape), str(tuple(found.shape)), "the layout")
            lead = here
        return lead or ()


def parse_layout(document: object, path: str) -> tuple[Layout, torch.dtype]:
    """Layout and dtype of the rows that the document of a ``layout.json`` stands for, given anything.

    Raises:
        FormatError: it is no such document; found and expected are named.
    """
    if not isinstance(document, Mapping):
        raise FormatError(path, f"a {type(document).__name__}", "a JSON object")
    layout = Layout.from_json(document.get("tensors"), path)
    row_dtype, num_values = document.get("row_dtype"), document.get("num_values")
    if not isinstance(row_dtype, str) or row_dtype not in DTYPES:
        raise FormatError(path, f"row_dtype {row_dtype!r}", f"one of {', '.join(DTYPES)}")
    if type(num_values) is not int or num_values != layout.num_values:
        raise FormatError(path, f"num_values {num_values!r}", f"{layout.num_values}, the sum of its tensors")
    return layout, DTYPES[row_dtype]


def read_layout(folder: Path) -> tuple[Layout, torch.dtype]:
    """What the ``layout.json`` in the folder of a store says.

    Raises:
        FormatError: it is none.
        FormatVersionError: from a newer release.
    """
    path = folder / LAYOUT_NAME
    return parse_layout(read_json(path, FORMAT, FORMAT_VERSION), str(path))


def _parse_spec(spec: object, path: str) -> TensorSpec:
    match spec:
        case {"name": str(name), "shape": list(shape), "dtype": str(dtype), "kind": ("parameter" | "buffer") as kind}:
            if dtype in DTYPES and all(type(size) is int and 0 <= size <= _MAX_VALUES for size in shape):
                return TensorSpec(name, tuple(shape), dtype, kind)
    raise FormatError(
        path,
        f"the tensor {reprlib.repr(spec)}",
        f"name, shape (sizes from 0), dtype (one of {', '.join(DTYPES)}) and kind (parameter or buffer)",
    )
