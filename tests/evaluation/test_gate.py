"""The gate keeps the members that are good enough on the user's data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pdiff_plugin import Task, WeightSet
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.gate import keep_accurate


@pytest.fixture
def task() -> Task:
    """Items whose class is the larger of their two numbers; the identity answers all of them."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    return Task(nn.Linear(2, 2, bias=False), [(x[:3], x[:3].argmax(1)), (x[3:], x[3:].argmax(1))])


GOOD, SWAPPED, CONSTANT = torch.eye(2), torch.eye(2).flip(0), torch.tensor([[1.0, 1.0], [0.0, 0.0]])


def test_members_below_the_threshold_are_dropped(task: Task) -> None:
    before = task.model.weight.clone()
    kept = keep_accurate(task, WeightSet({"weight": torch.stack([CONSTANT, GOOD, SWAPPED])}), 0.5)
    assert kept.indices == (0, 1)
    assert kept.member_scores == (0.5, 1.0, 0.0)
    assert kept.num_dropped == 1
    assert torch.equal(kept.weights["weight"][1], GOOD)
    assert torch.equal(task.model.weight, before)


def test_a_threshold_that_nobody_reaches_names_the_best(task: Task) -> None:
    with pytest.raises(ConfigError) as caught:
        keep_accurate(task, WeightSet({"weight": torch.stack([CONSTANT, SWAPPED])}), 0.9)
    assert "the best of 2 scored 0.5" in str(caught.value)
