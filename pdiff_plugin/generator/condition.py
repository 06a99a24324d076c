"""What members are made for: the one place that knows every condition of a denoiser.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """What each row of a batch is made for. A further condition is one more field with a leading axis of B.

    Attributes:
        trajectory: number of the run, (B,) int64.
    """

    trajectory: Tensor

    def __len__(self) -> int:
        return len(self.trajectory)

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Condition:
        return self._each(lambda tensor: tensor.to(device))

    def repeat(self, times: int) -> Condition:
        """The whole batch, one time after the other."""
        return self._each(lambda tensor: tensor.repeat(times, *(1,) * (tensor.ndim - 1)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return type(self)(**{field.name: change(getattr(self, field.name)) for field in fields(self)})
