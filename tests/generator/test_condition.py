"""Conditions go with their rows."""

import torch

from pdiff_plugin.generator.condition import Condition


def test_a_condition_is_indexed_and_repeated_like_the_rows_it_belongs_to():
    condition = Condition(torch.tensor([0, 1, 2]))

    assert len(condition) == 3
    assert condition[1:].trajectory.tolist() == [1, 2]
    assert condition[torch.tensor([2, 0, 2])].trajectory.tolist() == [2, 0, 2]
    assert condition.repeat(2).trajectory.tolist() == [0, 1, 2, 0, 1, 2]
    assert condition.to("meta").trajectory.device.type == "meta"


def test_features_go_with_their_rows():
    condition = Condition.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    assert condition.trajectory.tolist() == [0, 0]
    assert condition[1:].features.tolist() == [[3.0, 4.0]]
    assert condition.repeat(2).features.tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    assert condition.to("meta").features.device.type == "meta"
    assert Condition(torch.tensor([0, 1])).repeat(2).features is None
