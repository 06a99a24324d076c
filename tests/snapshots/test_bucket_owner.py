"""One process at a time writes to a folder in a bucket."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import fsspec
import pytest

from pdiff_plugin.errors import FolderInUseError, FormatError
from pdiff_plugin.snapshots import bucket_owner
from pdiff_plugin.snapshots.bucket_owner import BucketOwner
from pdiff_plugin.snapshots.processes import this_process

PATH = "/shared/fit/owner.json"
KIND = {"format": "pdiff-owner", "format_version": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_owner, "_TELL_EVERY_S", 0.05)
    monkeypatch.setattr(bucket_owner, "_GONE_AFTER_S", 0.5)
    monkeypatch.setattr(bucket_owner, "_LOOK_EVERY_S", 0.02)


@pytest.fixture
def fs() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/shared", recursive=True)


def new(fs: fsspec.AbstractFileSystem) -> BucketOwner:
    return BucketOwner(fs, "/shared/fit", "memory://shared/fit")


def leave(fs: fsspec.AbstractFileSystem, at: float) -> None:
    document = {**KIND, "id": "a", "host": "far", "machine": "0" * 12, "pid": 7, "started": 1, "time": at}
    fs.pipe_file(PATH, json.dumps(document).encode())


def test_a_folder_is_its_owners_until_it_is_left(fs: fsspec.AbstractFileSystem) -> None:
    first, second = new(fs), new(fs)
    first.claim()
    with pytest.raises(FolderInUseError, match=r"memory://shared/fit is in use: process \d+ on .* writes to it"):
        second.claim()
    first.release()
    second.claim()
    second.release()
    assert fs.ls("/shared/fit", detail=False) == []


def test_what_a_killed_process_owned_is_free_after_a_while(fs: fsspec.AbstractFileSystem) -> None:
    leave(fs, time.time())
    started = time.monotonic()
    owner = new(fs)
    owner.claim()
    assert 0.2 < time.monotonic() - started < 5
    owner.release()


def test_what_a_killed_process_of_this_machine_owned_is_free_at_once(fs, monkeypatch) -> None:
    monkeypatch.setattr(bucket_owner, "_GONE_AFTER_S", 1000.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    gone = {**asdict(this_process()), "pid": ended.pid}
    ended.wait()
    fs.pipe_file(PATH, json.dumps({**KIND, "id": "a", **gone, "time": time.time()}).encode())
    owner = new(fs)
    owner.claim()
    owner.release()


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
def test_a_clock_that_is_wrong_locks_nobody_out(fs: fsspec.AbstractFileSystem, ahead_s: float) -> None:
    leave(fs, time.time() + ahead_s)
    owner = new(fs)
    owner.claim()
    owner.release()


def test_who_has_lost_a_folder_is_told(fs: fsspec.AbstractFileSystem, caplog: pytest.LogCaptureFixture) -> None:
    owner = new(fs)
    owner.claim()
    leave(fs, time.time())  # by one that looked at the same moment
    owner._thread.join(5)
    with pytest.raises(FolderInUseError, match="process 7 on far"):
        owner.check()
    assert "process 7 on far writes to it" in caplog.text
    owner.release()
    assert json.loads(fs.cat_file(PATH))["id"] == "a", "the other's is left alone"


@pytest.mark.parametrize("content", [b"not JSON", b"[]", b'{"format": "another"}'])
def test_an_owner_that_is_something_else_is_an_error_that_names_it(fs: fsspec.AbstractFileSystem, content) -> None:
    fs.pipe_file(PATH, content)
    with pytest.raises(FormatError, match=r"memory://shared/fit.*owner"):
        new(fs).claim()
