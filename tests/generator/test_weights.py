"""Stacked weights of many members."""

import pytest
import torch

from pdiff_plugin.errors import LayoutMismatchError
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import Layout


@pytest.fixture
def members():
    rng = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(2, 3, generator=rng), "b": torch.randn((), generator=rng).half()} for _ in range(4)]


def test_stacking_and_taking_apart_returns_the_same_members(members):
    weights = WeightSet.from_members(members)

    assert weights.num_members == 4
    assert {name: tuple(t.shape) for name, t in weights.items()} == {"w": (4, 2, 3), "b": (4,)}
    for found, member in zip(weights.members(), members, strict=True):
        assert all(torch.equal(found[name], member[name]) for name in member)


def test_flat_vectors_become_members_of_the_recorded_dtypes(members):
    layout = Layout.from_tensors(members[0])
    flat = torch.stack([layout.flatten(member) for member in members])

    weights = WeightSet.from_flat(flat, layout)

    assert weights["b"].dtype == torch.float16
    assert torch.equal(weights["w"][2], members[2]["w"])


def test_selected_members_come_in_the_order_asked(members):
    weights = WeightSet.from_members(members).select([3, 0, 3])

    assert torch.equal(weights["w"], torch.stack([members[i]["w"] for i in (3, 0, 3)]))


def test_a_member_can_be_counted_from_the_end_and_one_that_is_not_there_is_refused(members):
    weights = WeightSet.from_members(members)

    assert torch.equal(weights.member(-1)["w"], members[3]["w"])
    with pytest.raises(IndexError, match="member 4 of a set of 4"):
        weights.member(4)


def test_tensors_of_different_numbers_of_members_are_refused_by_name():
    with pytest.raises(LayoutMismatchError) as error:
        WeightSet({"a": torch.zeros(3, 2), "b": torch.zeros(2, 2)})
    assert "tensor 'b': the set recorded 3 members on axis 0, found (2, 2)" in str(error.value)
