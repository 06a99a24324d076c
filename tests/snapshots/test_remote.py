"""Stores and run folders in a bucket, here fsspec's own in memory."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest
import torch

from pdiff_plugin import PDiffRecorder
from pdiff_plugin.errors import FolderInUseError, StoreNotFoundError
from pdiff_plugin.snapshots.remote import copy_store, is_remote, mirrored
from pdiff_plugin.snapshots.store import SnapshotStore

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def bucket() -> str:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return "memory://bucket"


def test_a_url_is_remote_and_a_path_is_not(tmp_path: Path) -> None:
    assert is_remote("s3://bucket/runs/a")
    assert not is_remote(tmp_path)


def test_a_copied_store_is_the_store(bucket: str, walk_store: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(walk_store), f"{bucket}/store", recursive=True)

    copy = SnapshotStore.open(copy_store(f"{bucket}/store", tmp_path / "copy"))

    original = SnapshotStore.open(walk_store)
    assert copy.layout == original.layout
    assert torch.equal(copy.steps, original.steps)
    assert torch.equal(copy.rows(), original.rows())


def test_a_share_of_the_columns_is_copied_and_the_rest_reads_as_zeros(
    bucket: str, walk_store: Path, tmp_path: Path
) -> None:
    fsspec.filesystem("memory").put(str(walk_store), f"{bucket}/store", recursive=True)

    copy = SnapshotStore.open(copy_store(f"{bucket}/store", tmp_path / "copy", lambda D: slice(D // 4, D // 2)))

    original = SnapshotStore.open(walk_store)
    assert torch.equal(copy.rows(12, 24), original.rows(12, 24))
    assert copy.rows(0, 12).abs().max() == 0
    assert copy.rows(24, 48).abs().max() == 0


@pytest.mark.parametrize("name", ["store-v1-sharded", "store-v1-joined"])
def test_a_store_that_ranks_wrote_is_copied_as_one(bucket: str, tmp_path: Path, name: str) -> None:
    fsspec.filesystem("memory").put(str(DATA / name), f"{bucket}/store", recursive=True)
    expected = SnapshotStore.open(DATA / name).rows()

    whole = SnapshotStore.open(copy_store(f"{bucket}/store", tmp_path / "whole"))
    share = SnapshotStore.open(copy_store(f"{bucket}/store", tmp_path / "share", lambda D: slice(3, 9)))

    assert torch.equal(whole.rows(), expected)
    assert torch.equal(share.rows(3, 9), expected[:, 3:9])
    assert share.rows(0, 3).abs().max() == 0
    assert share.rows(9, 14).abs().max() == 0


def test_a_damaged_chunk_in_the_bucket_is_reported_as_on_a_disk(bucket: str, walk_store: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(walk_store), f"{bucket}/store", recursive=True)
    fs.pipe(f"{bucket}/store/trajectories/run-001/chunk-000002.safetensors", b"half a file")

    copy = SnapshotStore.open(copy_store(f"{bucket}/store", tmp_path / "copy"))

    assert torch.equal(copy.rows(), SnapshotStore.open(walk_store).rows())
    assert "chunk-000002.safetensors: found an unreadable file" in copy.problems[0]


def test_no_store_in_the_bucket_is_said(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="memory://bucket/nothing is not a snapshot store"):
        copy_store(f"{bucket}/nothing", tmp_path / "copy")


@pytest.mark.parametrize("num_failures", [1, 99])
def test_a_bucket_that_refuses_the_last_files_is_asked_again_and_they_are_kept(
    bucket: str, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    fs = fsspec.filesystem("memory")
    put_file, failures = type(fs).put_file, []

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        if len(failures) < num_failures:
            failures.append(1)
            raise OSError("503 Slow Down")
        put_file(self, *args, **kwargs)

    monkeypatch.setattr("pdiff_plugin.snapshots.remote._PUSH_EVERY_S", 0.01)
    monkeypatch.setattr("pdiff_plugin.snapshots.remote._Mirror.push_until", lambda *_: None)
    monkeypatch.setattr(type(fs), "put_file", refuse)

    if num_failures == 1:
        with mirrored(f"{bucket}/fit", last="fit.json") as folder:
            (folder / "generator.safetensors").write_text("hours of work")
        assert fs.cat(f"{bucket}/fit/generator.safetensors") == b"hours of work"
        assert not folder.exists()
    else:
        with (
            pytest.raises(OSError, match="503 Slow Down") as caught,
            mirrored(f"{bucket}/fit", last="fit.json") as folder,
        ):
            (folder / "generator.safetensors").write_text("hours of work")
        assert f"All files are in {folder}: copy them there yourself" in str(caught.value)
        assert (folder / "generator.safetensors").read_text() == "hours of work"
        shutil.rmtree(folder)


def test_work_in_a_folder_that_another_process_has_taken_is_kept(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pdiff_plugin.snapshots.bucket_owner._TELL_EVERY_S", 0.02)
    monkeypatch.setattr("pdiff_plugin.snapshots.remote._Mirror.push_until", lambda *_: None)
    fs = fsspec.filesystem("memory")
    with ExitStack() as stack:
        folder = stack.enter_context(mirrored(f"{bucket}/fit", last="fit.json"))
        (folder / "generator.safetensors").write_text("hours of work")
        other = json.loads(fs.cat(f"{bucket}/fit/owner.json")) | {"id": "other", "pid": 7, "host": "far"}
        while "process 7 on far writes" not in caplog.text:
            fs.pipe(f"{bucket}/fit/owner.json", json.dumps(other).encode())
            time.sleep(0.05)
        with pytest.raises(FolderInUseError, match="process 7 on far"):
            stack.close()
    assert f"is in {folder}" in caplog.text
    assert (folder / "generator.safetensors").read_text() == "hours of work"
    assert not fs.exists(f"{bucket}/fit/generator.safetensors")
    shutil.rmtree(folder)


def test_what_changes_in_a_mirrored_folder_changes_in_the_bucket(bucket: str) -> None:
    fs = fsspec.filesystem("memory")
    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        (folder / "fit.json").write_text("one")
        (folder / "diffusion.checkpoint.safetensors").write_text("half way")
    assert [Path(name).name for name in fs.ls(f"{bucket}/fit", detail=False)].count("owner.json") == 0
    assert fs.cat(f"{bucket}/fit/fit.json") == b"one"

    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        assert (folder / "diffusion.checkpoint.safetensors").read_text() == "half way"
        (folder / "fit.json").write_text("two")
        (folder / "diffusion.checkpoint.safetensors").unlink()
    assert fs.cat(f"{bucket}/fit/fit.json") == b"two"
    assert [Path(name).name for name in fs.ls(f"{bucket}/fit", detail=False)] == ["fit.json"]


def test_a_run_that_ended_before_its_window_is_copied_with_its_sparse_snapshots(bucket: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    with PDiffRecorder(tmp_path / "store", layers="all", last_steps=20).attach(model, total_steps=100) as recorder:
        for _ in range(61):
            recorder.step()
    fsspec.filesystem("memory").put(str(tmp_path / "store"), "/bucket/store", recursive=True)
    copy = SnapshotStore.open(copy_store(f"{bucket}/store", tmp_path / "copy"))
    assert copy.problems == []
    assert copy.steps.tolist() == list(range(17, 62, 4))
    assert copy.sparse == SnapshotStore.open(tmp_path / "store").sparse
