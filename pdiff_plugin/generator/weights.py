"""Weights of many members, by tensor name.

Shapes: M members, ``*shape`` one tensor's own shape.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pdiff_plugin.errors import ConfigError, LayoutMismatchError
from pdiff_plugin.modules.names import check_fits, shapes_of
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.tensor_files import load_state

MEMBER_FORMAT = "pdiff-member"
MEMBER_FORMAT_VERSION = 1


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

    @classmethod
    def from_files(cls, members: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> WeightSet:
        """Members that stay in their files until they are used: of those that do not fit into memory together.

        A ``DiffusionEnsemble`` reads each when its turn comes, :meth:`member` and :meth:`members` likewise. What
        asks for a tensor of all members, as ``weights[name]`` does, reads that of all of them.

        Args:
            members: a folder that ``pdiff generate`` wrote, or safetensors files in the order wanted, one state dict
                each. They must stay as they are.

        Raises:
            ConfigError: the folder has no members, or none are named.
            FileNotFoundError, FormatError, FormatVersionError: there is no such file, or none that can be read.
            LayoutMismatchError: a file has other tensors than the first.
        """
        given = [members] if isinstance(members, str | os.PathLike) else list(members)
        paths = [Path(path) for path in given]
        if len(given) == 1 and paths[0].is_dir():
            # By their numbers: of ten thousand and more the names are longer.
            paths = sorted(paths[0].glob("member-*.safetensors"), key=lambda path: (len(path.name), path.name))
        if not paths:
            raise ConfigError("members", members, "must be a folder of members, or name some files")
        states = [load_state(path, MEMBER_FORMAT, MEMBER_FORMAT_VERSION) for path in paths]
        for path, state in zip(paths, states, strict=True):
            check_fits(shapes_of(states[0]), shapes_of(state), f"the member {paths[0]}", str(path))
            check_fits(shapes_of(state), shapes_of(states[0]), f"the member {path}", str(paths[0]))
        return ApartSet(states)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> a member's own shape."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self._tensors.items()}

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
        return self._member(index % self.num_members)

    def _member(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self._tensors.items()}

    def members(self) -> Iterator[dict[str, Tensor]]:
        """Each member's tensors in turn."""
        return (self.member(index) for index in range(self.num_members))

    def select(self, indices: Sequence[int] | Tensor) -> WeightSet:
        """The members at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return WeightSet({name: tensor[index.to(tensor.device)] for name, tensor in self._tensors.items()})


class ApartSet(WeightSet):
    """A set whose members have their tensors apart, each mapped from a file of its own.

    Args:
        states: name -> (*shape) of each member, the same names and shapes throughout.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        self._states, self.num_members = list(states), len(states)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self._states[0])

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack([state[name] for state in self._states])

    def __iter__(self) -> Iterator[str]:
        return iter(self._states[0])

    def __len__(self) -> int:
        return len(self._states[0])

    def _member(self, index: int) -> dict[str, Tensor]:
        return dict(self._states[index])

    def select(self, indices: Sequence[int] | Tensor) -> WeightSet:
        return ApartSet([self._states[index] for index in torch.as_tensor(indices, dtype=torch.int64).tolist()])
