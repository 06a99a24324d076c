"""Tensors by name, as they come from a file, checked before anything is rebuilt from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from pdiff_plugin.snapshots.layout import DTYPES

M = TypeVar("M", bound=nn.Module)


class StateError(ValueError):
    """A tensor is missing, of another shape, or one too many. Internal: the reader of the file adds its path."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(name, found, expected)
        self.name, self.found, self.expected = name, found, expected

    def __str__(self) -> str:
        return f"tensor {self.name!r} {self.found}, expected {self.expected}"


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_shapes(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int | str]],
    dtypes: Collection[torch.dtype] = tuple(DTYPES.values()),
) -> None:
    """Check that tensors are there, of their shapes and of one of the ``dtypes``.

    Letters in shapes stand for sizes that have to agree, from 1.

    Raises:
        StateError: naming the first that is not.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in state:
            raise StateError(name, "missing", f"shape {_text(shape)}")
        found = tuple(state[name].shape)
        for size, there in zip(shape, found, strict=False):
            if isinstance(size, str):
                sizes.setdefault(size, max(there, 1))
        expected = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)
        if found != expected:
            raise StateError(name, f"of shape {_text(found)}", f"shape {_text(expected)}")
        if state[name].dtype not in dtypes:
            raise StateError(name, f"of {state[name].dtype}", f"one of {', '.join(map(str, dtypes))}")


def check_finite(state: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise :class:`StateError` for the first of these (small) tensors that holds NaN or Inf."""
    for name in names:
        if name in state and not bool(state[name].isfinite().all()):
            raise StateError(name, "with NaN or Inf", "finite numbers")


def load_module(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Load what stands under ``prefix``, with a :class:`StateError` where that does not fit."""
    own = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    for name, tensor in own.items():
        same = tuple(DTYPES.values()) if tensor.is_floating_point() else (tensor.dtype,)
        check_shapes(state, {name: tuple(tensor.shape)}, same)
    for name in sorted(state):
        if name.startswith(prefix) and name not in own:
            raise StateError(name, "present", "no such tensor with these settings")
    # In memory of their own: the last digit of a product depends on the alignment, which in a file is any.
    copies = {name: state[name].to(tensor.dtype, copy=True) for name, tensor in own.items()}
    module.load_state_dict(under(copies, prefix), assign=any(tensor.is_meta for tensor in own.values()))


def rebuilt(make: Callable[[], M], state: Mapping[str, Tensor], prefix: str = "") -> M:
    """The module that ``make`` makes with the tensors under ``prefix``, in eval mode.

    It is made without memory and filled from there: what settings in a file ask for need not be what the file holds.

    Raises:
        StateError: they do not fit.
    """
    with torch.device("meta"):
        module = make()
    load_module(module, state, prefix)
    return module.eval()


def _text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
