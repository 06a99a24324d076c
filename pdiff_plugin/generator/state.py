"""Tensors by name, as they come from a file, checked before anything is rebuilt from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class StateError(ValueError):
    """A tensor is missing, of another shape, or one too many. Internal: the reader of the file adds its path."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(name, found, expected)
        self.name, self.found, self.expected = name, found, expected


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_shapes(state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Check that tensors are there and of their shapes, in which letters stand for sizes that have to agree.

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
                sizes.setdefault(size, there)
        expected = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)
        if found != expected:
            raise StateError(name, f"of shape {_text(found)}", f"shape {_text(expected)}")


def load_module(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Load what stands under ``prefix``, with a :class:`StateError` where that does not fit."""
    own = {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_shapes(state, own)
    for name in sorted(state):
        if name.startswith(prefix) and name not in own:
            raise StateError(name, "present", "no such tensor with these settings")
    module.load_state_dict(under(state, prefix))


def _text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"
