"""Conditions go with their rows."""

from dataclasses import dataclass

import torch

from pdiff_plugin.generator.condition import Condition


def test_a_condition_is_indexed_and_repeated_like_the_rows_it_belongs_to():
    condition = Condition(torch.tensor([0, 1, 2]))

    assert len(condition) == 3
    assert condition[1:].trajectory.tolist() == [1, 2]
    assert condition[torch.tensor([2, 0, 2])].trajectory.tolist() == [2, 0, 2]
    assert condition.repeat(2).trajectory.tolist() == [0, 1, 2, 0, 1, 2]
    assert condition.to("meta").trajectory.device.type == "meta"


def test_a_further_field_goes_with_the_rows_by_itself():
    @dataclass(frozen=True, eq=False)
    class Named(Condition):
        named: torch.Tensor

    condition = Named(torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    assert condition[1:].named.tolist() == [[3.0, 4.0]]
    assert condition.repeat(2).named.tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    assert condition.to("meta").named.device.type == "meta"
