"""Weights of many members, by tensor name.

Shapes: M members, ``*shape`` one tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pdiff_plugin.errors import LayoutMismatchError
from pdiff_plugin.snapshots.layout import Layout


class WeightSet(Mapping[str, Tensor]):
    """A mapping of tensor name -> (M, *shape): the same tensors of M members, stacked.

    Args:
        tensors: name -> (M, *shape) with one M throughout.

    Raises:
        LayoutMismatchError: naming the first tensor with another M, or that has no member axis.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.num_members = 0
        for position, (name, tensor) in enumerate(self._tensors.items()):
            found = tensor.shape[0] if tensor.ndim else 0
            if position == 0:
                self.num_members = found
            if tensor.ndim == 0 or found != self.num_members:
                raise LayoutMismatchError(
                    name, f"{self.num_members} members on axis 0", str(tuple(tensor.shape)), "the set"
                )

    @classmethod
    def from_members(cls, members: Sequence[Mapping[str, Tensor]]) -> WeightSet:
        """Stack M state dicts of one layout."""
        return cls({name: torch.stack([member[name] for member in members]) for name in members[0]})

    @classmethod
    def from_flat(cls, flat: Tensor, layout: Layout) -> WeightSet:
        """Cut flat vectors (M, D) into tensors by ``layout``."""
        return cls(layout.unflatten(flat))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"WeightSet({self.num_members} members of {len(self)} tensors)"

    def member(self, index: int) -> dict[str, Tensor]:
        """Tensors of one member as name -> (*shape), views of this set."""
        if not -self.num_members <= index < self.num_members:
            raise IndexError(f"member {index} of a set of {self.num_members}")
        return {name: tensor[index] for name, tensor in self._tensors.items()}

    def members(self) -> Iterator[dict[str, Tensor]]:
        """Each member's tensors in turn."""
        return (self.member(index) for index in range(self.num_members))

    def select(self, indices: Sequence[int] | Tensor) -> WeightSet:
        """The members at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return WeightSet({name: tensor[index.to(tensor.device)] for name, tensor in self._tensors.items()})
