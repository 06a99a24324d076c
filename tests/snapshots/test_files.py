"""Files appear whole, with the permissions that the user asked for, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pdiff_plugin.snapshots.files import json_safe, replacing


def test_a_file_has_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "weights.safetensors") as temp:
            save_file({"w": torch.zeros(1)}, temp)
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temp:
            temp.write_text("half of the new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_two_writers_of_one_file_in_one_process_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_json_gets_null_for_what_it_does_not_have_at_any_depth() -> None:
    value = {"a": [1, True, 0.25, "x", None], "b": {"c": (float("nan"), float("-inf"))}}
    cleaned = {"a": [1, True, 0.25, "x", None], "b": {"c": [None, None]}}
    assert json_safe(value) == cleaned
    assert json.loads(json.dumps(json_safe(value), allow_nan=False)) == cleaned
    assert json_safe([1.23456789, 7, float("inf")], 3) == [1.235, 7, None]
