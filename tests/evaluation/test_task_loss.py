"""The loss of a task's training data, beside PyTorch's own losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import Task, task_loss
from pdiff_plugin.errors import ConfigError, DataError

RNG = torch.Generator().manual_seed(0)
X = torch.randn(12, 5, generator=RNG)
CLASSES = torch.randint(7, (12,), generator=RNG)
LABELS = torch.randint(2, (12, 7), generator=RNG)
VALUES = torch.randn(12, 7, generator=RNG)


def gaussian(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda x: (model(x), model(x).exp())


@pytest.mark.parametrize(
    ("options", "targets", "called", "wanted"),
    [
        ({}, CLASSES, lambda m: m, lambda m: F.cross_entropy(m(X), CLASSES)),
        (
            {"kind": "multilabel"}, LABELS, lambda m: m,
            lambda m: F.binary_cross_entropy_with_logits(m(X), LABELS.float()),
        ),
        ({"kind": "regression"}, VALUES, lambda m: m, lambda m: F.mse_loss(m(X), VALUES)),
        (
            {"kind": "gaussian-regression"}, VALUES, gaussian,
            lambda m: F.gaussian_nll_loss(m(X), VALUES, m(X).exp(), full=True),
        ),
        (
            {"kind": "dense"}, CLASSES[:, None, None].expand(12, 2, 3),
            lambda m: lambda x: m(x)[..., None, None].expand(12, 7, 2, 3), lambda m: F.cross_entropy(m(X), CLASSES),
        ),
        (
            {"kind": "tokens"}, CLASSES[:, None].expand(12, 4), lambda m: lambda x: m(x)[:, None].expand(12, 4, 7),
            lambda m: F.cross_entropy(m(X), CLASSES),
        ),
        (
            {"kind": "language"}, CLASSES[:, None].expand(12, 4), lambda m: lambda x: m(x)[:, None].expand(12, 4, 7),
            lambda m: F.cross_entropy(m(X), CLASSES),
        ),
        (
            {"loss": lambda out, y: (out - y).abs().sum(dim=1)}, VALUES, lambda m: m,
            lambda m: (m(X) - VALUES).abs().sum(dim=1).mean(),
        ),
    ],
    ids=["classes", "labels", "values", "gaussians", "pixels", "tokens", "language", "own"],
)  # fmt: skip
def test_it_is_the_mean_loss_that_pytorch_has_with_its_gradient(
    options: dict[str, Any], targets: Tensor, called: Any, wanted: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    loss = task_loss(lambda: Task(model, [], [(X, targets)], **options))
    found = loss(called(model), {"angle": 1.0})
    gradient = torch.autograd.grad(found, model.weight)[0]
    torch.testing.assert_close(found, wanted(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted(model), model.weight)[0], rtol=1e-4, atol=1e-6)


def test_each_call_draws_a_batch_anew_at_its_own_condition() -> None:
    model, made = nn.Linear(1, 1), []

    def task(angle: float, ways: list[float]) -> Task:
        made.append((angle, ways))
        data = TensorDataset(torch.full((50, 1), angle) + torch.arange(50.0)[:, None], torch.zeros(50, 1))
        return Task(model, [], DataLoader(data, 2, shuffle=True), kind="regression")

    loss, seen = task_loss(task), []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.flatten().tolist())
        out: Tensor = model(x)
        return out

    for angle in (100.0, 100.0, 900.0, 100.0):
        loss(watched, {"angle": angle, "ways": [1.0, 2.0], "other": "unasked"})
    assert made == [(100.0, [1.0, 2.0]), (900.0, [1.0, 2.0])]
    assert seen[0] != seen[1]
    assert all(100 <= x < 150 for x in (*seen[0], *seen[1], *seen[3]))
    assert all(900 <= x < 950 for x in seen[2])


def test_a_task_without_training_data_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"train_loader = None: it must be given.*--loss"):
        task_loss(lambda: Task(nn.Linear(5, 7), []))(nn.Linear(5, 7), {"angle": 1.0})
    with pytest.raises(DataError, match="train_loader"):
        task_loss(lambda: Task(nn.Linear(5, 7), [], [X]))(nn.Linear(5, 7), {"angle": 1.0})
