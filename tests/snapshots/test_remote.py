"""Run folders in a bucket, here fsspec's own in memory."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest

from pdiff_plugin.errors import FolderInUseError
from pdiff_plugin.snapshots.remote import is_remote, mirrored


@pytest.fixture
def bucket() -> str:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return "memory://bucket"


def test_a_url_is_remote_and_a_path_is_not(tmp_path: Path) -> None:
    assert is_remote("s3://bucket/runs/a")
    assert not is_remote(tmp_path)


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
