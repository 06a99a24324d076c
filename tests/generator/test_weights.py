"""Stacked weights of many members."""

import pytest
import torch
from safetensors.torch import save_file

from pdiff_plugin.errors import ConfigError, FormatError, FormatVersionError, LayoutMismatchError
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


def saved(folder, members, header=None):
    """One file for each member, as ``pdiff generate`` names them."""
    paths = [folder / f"member-{number:04d}.safetensors" for number in range(len(members))]
    for path, member in zip(paths, members, strict=True):
        save_file(member, path, header)
    return paths


def test_members_in_files_are_the_same_set_as_in_memory(tmp_path, members):
    expected = WeightSet.from_members(members)
    paths = saved(tmp_path, members)

    for weights in (WeightSet.from_files(tmp_path), WeightSet.from_files(paths), WeightSet.from_files(list(paths))):
        assert (weights.num_members, weights.shapes) == (4, {"w": (2, 3), "b": ()})
        assert weights.shapes == expected.shapes
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor)
            assert torch.equal(weights.member(-1)[name], tensor[-1])
            assert torch.equal(weights.select([3, 0])[name], tensor[[3, 0]])
    with pytest.raises(IndexError, match="member 4 of a set of 4"):
        weights.member(4)


def test_files_that_are_no_members_of_one_model_are_refused_by_name(tmp_path, members):
    paths = saved(tmp_path, members)
    save_file({"w": torch.zeros(2, 3)}, paths[1])

    with pytest.raises(LayoutMismatchError, match=r"tensor 'b'.*member-0001"):
        WeightSet.from_files(tmp_path)
    save_file({**members[1], "more": torch.zeros(1)}, paths[1])
    with pytest.raises(LayoutMismatchError, match="tensor 'more'"):
        WeightSet.from_files(tmp_path)
    save_file(members[1], paths[1], {"format": "pdiff-member", "format_version": "2"})
    with pytest.raises(FormatVersionError):
        WeightSet.from_files(tmp_path)
    save_file(members[1], paths[1], {"format": "pdiff-ensemble", "format_version": "1"})
    with pytest.raises(FormatError, match="format 'pdiff-ensemble'"):
        WeightSet.from_files(tmp_path)
    (tmp_path / "empty").mkdir()
    for nothing in ([], tmp_path / "empty"):
        with pytest.raises(ConfigError, match="members"):
            WeightSet.from_files(nothing)
    with pytest.raises(FileNotFoundError):
        WeightSet.from_files(tmp_path / "missing")
