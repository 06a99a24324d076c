"""What members are made for: the one place that knows every condition of a denoiser.

Shapes: B rows of a batch, F features of a condition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """What each row of a batch is made for. A further condition is one more field with a leading axis of B.

    Attributes:
        trajectory: number of the run, (B,) int64.
        features: of the recorded setting, (B, F) float32, by a generator's ``variables``; None where runs are only
            numbered.
    """

    trajectory: Tensor
    features: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Condition:
        """By features (B, F) alone: all rows are one trajectory."""
        return cls(torch.zeros(len(features), dtype=torch.int64, device=features.device), features)

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
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in given.items()}
        return type(self)(**changed)
