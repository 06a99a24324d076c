"""Conditions as they are given, kept beside a trajectory, and compared with those of other runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from pdiff_plugin.errors import ConditionError, FormatError, StoreNotFoundError
from pdiff_plugin.snapshots.conditions import (
    check_same_kind,
    parse_condition,
    parse_value,
    read_condition,
    set_condition,
    set_conditions,
    write_condition,
)
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.remote import RangeReader, copy_without_rows
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A store of three trajectories, none of which has a condition."""
    layout = Layout((TensorSpec("weight", (3,), "float32", "parameter"),))
    for _ in range(3):
        TrajectoryWriter(tmp_path / "runs", layout).write_chunk(torch.rand(2, 3), [1, 2])
    return tmp_path / "runs"


def test_values_of_tensors_and_arrays_become_plain_numbers() -> None:
    given = {"a": torch.tensor(1.5), "b": np.float32(2.0), "c": np.arange(3), "d": (1, 2), "e": np.bool_(True)}

    found = parse_condition(given, "run-001")

    assert found == {"a": 1.5, "b": 2.0, "c": [0.0, 1.0, 2.0], "d": [1.0, 2.0], "e": True}
    assert [type(value) for value in found.values()] == [float, float, list, list, bool]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "found an empty mapping"),
        (None, "found a NoneType"),
        ([("a", 1)], "found a list"),
        ({"a": None}, "found a NoneType under 'a'"),
        ({"a": float("nan")}, "found nan under 'a'"),
        ({"a": 10**400}, "expected a finite number"),
        ({"a": []}, "found a list under 'a'"),
        ({"a": [1, "b"]}, "a list under 'a' that holds other things"),
        ({"a": {"b": 1}}, "flatten what is nested"),
        ({"": 1}, "the name ''"),
        ({"a\x1b[2J": 1}, "names of printable text"),
        ({3: 1}, "the name 3"),
    ],
)
def test_what_is_no_condition_is_refused_with_what_was_found(given: object, text: str) -> None:
    with pytest.raises(ConditionError) as caught:
        parse_condition(given, "run-001")
    assert text in str(caught.value)
    assert "run-001" in str(caught.value)


def test_a_condition_survives_the_way_through_its_file(tmp_path: Path) -> None:
    condition = parse_condition({"angle": 45.0, "style": "ink", "big": 3, "on": False, "user": [0.5, -1.0]}, "here")

    write_condition(tmp_path, condition)

    found = read_condition(tmp_path)
    assert found == condition
    assert found is not None
    assert [type(value) for value in found.values()] == [float, str, int, bool, list]


def test_a_condition_of_version_1_is_read() -> None:
    expected = {"angle": 45.5, "number": 3, "on": True, "style": "ink", "user": [0.5, -1.0]}
    assert read_condition(DATA / "condition-v1") == expected


def test_a_folder_without_the_file_has_no_condition(tmp_path: Path) -> None:
    assert read_condition(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "pdiff-snapshots", "format_version": 1}'])
def test_a_file_that_is_no_condition_is_a_format_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "condition.json").write_text(text)
    with pytest.raises(FormatError):
        read_condition(tmp_path)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"angle": 1.0}, "'style' in run-002 alone"),
        ({"angle": 1.0, "style": "a", "more": 1}, "'more' in run-001 alone"),
        ({"angle": "east", "style": "a"}, "a number under 'angle', expected text, as in run-001"),
        ({"angle": [1.0, 2.0], "style": "a"}, "expected a list of 2 numbers, as in run-001"),
        ({"angle": True, "style": "a"}, "expected true or false, as in run-001"),
    ],
)
def test_conditions_that_do_not_fit_are_an_error_that_names_both(other: dict[str, object], text: str) -> None:
    mine = parse_condition({"angle": 3, "style": "b"}, "run-002")
    theirs = parse_condition(other, "run-001")
    with pytest.raises(ConditionError) as caught:
        check_same_kind(mine, "run-002", theirs, "run-001")
    assert text in str(caught.value)
    assert "run-001" in str(caught.value)
    assert "run-002" in str(caught.value)


def test_whole_and_broken_numbers_are_one_type() -> None:
    check_same_kind({"a": 1}, "x", {"a": 1.5}, "y")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("45", 45),
        ("-.5", -0.5),
        ("1e-3", 0.001),
        ("true", True),
        ("False", False),
        ("1,2.5", [1.0, 2.5]),
        ("3,", [3.0]),
        ("ink", "ink"),
        ("1,ink", "1,ink"),
        ("1_000", "1_000"),
        (",", ","),
        ("", ""),
        ('"45"', "45"),
        ('"', '"'),
    ],
)
def test_a_typed_value_is_a_number_a_list_a_truth_or_text(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_a_store_tells_the_conditions_of_the_trajectories_that_have_one(runs: Path) -> None:
    assert SnapshotStore.open(runs).conditions == {}

    set_condition(runs, "run-002", {"angle": torch.tensor(2.0), "style": "ink"})
    set_condition(runs, "run-001", {"angle": 1, "style": "oil"})

    store = SnapshotStore.open(runs)
    assert store.conditions == {"run-001": {"angle": 1, "style": "oil"}, "run-002": {"angle": 2.0, "style": "ink"}}
    assert list(store.conditions) == ["run-001", "run-002"]
    assert store.problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{", "unreadable JSON"),
        (b"\xff\xfe", "unreadable JSON"),
        (b'{"format": "pdiff-condition", "format_version": 1}', "found a NoneType"),
        (b'{"format": "pdiff-condition", "format_version": 1, "condition": {"a": [[1]]}}', "a list under 'a'"),
        (b'{"format": "pdiff-condition", "format_version": 2, "condition": {"a": 1}}', "format version 2"),
    ],
)
def test_a_damaged_condition_is_a_problem_and_the_snapshots_are_read(runs: Path, text: bytes, problem: str) -> None:
    set_condition(runs, "run-001", {"a": 1})
    (runs / "trajectories" / "run-002" / "condition.json").write_bytes(text)

    store = SnapshotStore.open(runs)

    assert len(store) == 6
    assert store.conditions == {"run-001": {"a": 1}}
    assert len(store.problems) == 1
    assert "run-002" in store.problems[0]
    assert problem in store.problems[0]
    set_condition(runs, "run-002", {"a": 2})
    assert SnapshotStore.open(runs).problems == []


def test_conditions_of_a_store_that_do_not_fit_are_a_problem(runs: Path) -> None:
    for name, condition in (("run-001", {"a": 1}), ("run-002", {"b": 1})):
        write_condition(runs / "trajectories" / name, condition)
    store = SnapshotStore.open(runs)
    assert store.conditions == {"run-001": {"a": 1}, "run-002": {"b": 1}}
    assert "condition of run-002: found 'a' in run-001 alone" in store.problems[0]


def test_a_condition_that_does_not_fit_is_not_set(runs: Path) -> None:
    set_condition(runs, "run-001", {"a": 1})
    with pytest.raises(ConditionError, match="condition of run-002: found 'a' in run-001 alone"):
        set_condition(runs, "run-002", {"b": 1})
    with pytest.raises(ConditionError, match="condition of run-003: found text under 'a', expected a number"):
        set_conditions(runs, {"run-002": {"a": 1}, "run-003": {"a": "x"}})
    assert SnapshotStore.open(runs).conditions == {"run-001": {"a": 1}}


def test_all_conditions_together_may_get_other_names(runs: Path) -> None:
    set_conditions(runs, {"run-001": {"a": 1}, "run-002": {"a": 2}})
    set_conditions(runs, {"run-001": {"b": "x"}, "run-002": {"b": "y"}})
    assert SnapshotStore.open(runs).conditions == {"run-001": {"b": "x"}, "run-002": {"b": "y"}}


def test_a_trajectory_that_the_store_lacks_is_named_with_those_that_it_has(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConditionError, match=r"'run-9': found no such trajectory, expected .*: run-001, run-002"):
        set_condition(runs, "run-9", {"a": 1})
    with pytest.raises(ConditionError, match="no such trajectory"):
        set_condition(runs, "..", {"a": 1})
    with pytest.raises(StoreNotFoundError, match="there is no such folder"):
        set_condition(tmp_path / "no", "run-001", {"a": 1})


@pytest.mark.parametrize("name", ["store-v1-sharded", "store-v1-joined"])
def test_a_run_that_ranks_wrote_has_its_condition_in_the_store(tmp_path: Path, name: str) -> None:
    shutil.copytree(DATA / name, tmp_path / "store")
    before = SnapshotStore.open(tmp_path / "store")

    set_condition(tmp_path / "store", before.trajectories[0], {"a": 1})

    after = SnapshotStore.open(tmp_path / "store")
    assert after.conditions == {before.trajectories[0]: {"a": 1}}
    assert after.trajectories == before.trajectories
    assert torch.equal(after.rows(), before.rows())
    assert after.problems == before.problems


def test_a_bucket_is_copied_with_its_conditions(runs: Path, tmp_path: Path) -> None:
    set_condition(runs, "run-002", {"a": 1})
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    fs.put(str(runs), "memory://conditions/store", recursive=True)

    copy_without_rows(RangeReader("memory://conditions/store"), tmp_path / "copy")

    assert SnapshotStore.open(tmp_path / "copy").conditions == {"run-002": {"a": 1}}
