"""A small network with BatchNorm, its data, and a plain training loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.bn2 = nn.BatchNorm2d(6)
        self.bn3 = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu().mean(dim=(2, 3))
        return self.fc(nn.functional.dropout(self.bn3(x), 0.1, self.training))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 1, 8, 8, generator=rng), torch.randint(0, 3, (8,), generator=rng)) for _ in range(4)]


@pytest.fixture
def train(batches: list[tuple[Tensor, Tensor]]) -> Callable[..., list[dict[str, Tensor]]]:
    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        first_step: int = 1,
        after_step: Callable[[], None] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Train, and return a copy of the state dict after each step."""
        history = []
        for step in range(first_step, first_step + num_steps):
            inputs, targets = batches[step % len(batches)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if after_step is not None:
                after_step()
            history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return history

    return train
