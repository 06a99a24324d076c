"""Files appear whole, with the permissions that the user asked for, or not at all."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pdiff_plugin.errors import FormatError
from pdiff_plugin.snapshots.files import json_safe, parse_json, read_json, replacing
from pdiff_plugin.snapshots.tensor_files import load_tensors


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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[" * 100 + "]" * 100, "more than 64 levels"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels"),
        ("9" * 400, "a whole number of 400 digits"),
        ("9" * 5000, "a whole number of 5000 digits"),
        (r'{"name": "half of a pair: \ud83d"}', "surrogates not allowed"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_a_text_that_nobody_can_work_with_is_refused(text: str | bytes, found: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_json(text, "here.json", "a document")
    assert str(caught.value).startswith("here.json: found unreadable JSON (")
    assert found in str(caught.value)


def test_a_text_within_the_limits_is_read() -> None:
    assert parse_json(r'["\ud83d\ude00", ' + "9" * 308 + "]", "here", "a document") == ["\U0001f600", int("9" * 308)]
    assert parse_json("[" * 64 + "]" * 64, "here", "a document")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (os.mkfifo, "found a FIFO, expected a file"),
        (os.mkdir, "found a folder, expected a file"),
        (lambda path: Path(path).symlink_to("/dev/zero"), "found a device, expected a file"),
    ],
)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path, make: Any, found: str) -> None:
    path = tmp_path / "layout.json"
    make(path)
    with within_seconds(5):
        for read in (lambda: read_json(path, "x", 1), lambda: load_tensors(path, "x", 1)):
            with pytest.raises(FormatError, match=found):
                read()


@contextmanager
def within_seconds(limit: float) -> Iterator[None]:
    """To open a FIFO would wait for good."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
