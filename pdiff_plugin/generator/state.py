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
        letters = "(" + ", ".join(str(sizes.get(str(size), size)) for size in shape) + ")"
        if name not in state:
            raise StateError(name, "missing", f"shape {letters}")
        found = tuple(state[name].shape)
        for size, there in zip(shape, found, strict=False):
            if isinstance(size, str):
                sizes.setdefault(size, there)
        if found != tuple(sizes.get(str(size), size) for size in shape):
            raise StateError(name, f"of shape {found}", f"shape {letters}")


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As ``module.load_state_dict(state)``, with a :class:`StateError` where that does not fit."""
    own = module.state_dict()
    check_shapes(state, {name: tuple(tensor.shape) for name, tensor in own.items()})
    for name in sorted(state.keys() - own.keys()):
        raise StateError(name, "present", "no such tensor with these settings")
    module.load_state_dict(state)
