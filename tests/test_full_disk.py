"""Disks without room, and disks that can only be read: every command ends in one panel that says what to do.

A limit on the size of files stands in for a full disk, as it needs no rights; so does an error of the system's calls.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pdiff_plugin import FitConfig, fit
from pdiff_plugin.cli import main
from pdiff_plugin.config import DiffusionConfig
from pdiff_plugin.snapshots.files import replacing, write_json

DATA = Path(__file__).parent / "data"
QUICK = DiffusionConfig(width=16, num_blocks=1, max_steps=20, eval_every_n_steps=10)


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """This process can write no larger files."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """``fail(errno, suffix)``: files of that name can no longer be brought to disk."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("the name of an open file is not told here")

    def start(number: int, suffix: str) -> None:
        sync = os.fsync

        def refuse(file: int) -> None:
            if os.readlink(f"/proc/self/fd/{file}").endswith(suffix):
                raise OSError(number, os.strerror(number))
            sync(file)

        monkeypatch.setattr(os, "fsync", refuse)

    return start


@pytest.mark.parametrize(
    ("size_bytes", "args"),
    [
        (2000, ("fit", "store", "--out", "out", "--diffusion.max-steps", "10")),
        (100, ("generate", "fit", "--out", "out", "--num-members", "20")),
        (2000, ("import", "weights.pt", "--store", "out", "--layers", "all")),
        (500, ("report", "evaluation", "--out", "out")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_without_room_says_so_in_one_panel_and_leaves_no_half_file(
    walk_store: Path, tmp_path: Path, monkeypatch, capsys, size_bytes: int, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA / "fit-v1", "fit")
    shutil.copytree(DATA / "evaluation-v1", "evaluation")
    torch.save(torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.ReLU()).state_dict(), "weights.pt")

    with files_of_at_most(size_bytes):
        code = main(list(args))

    told = capsys.readouterr().err
    panel = " ".join(told.rpartition("StorageError")[2].replace("│", " ").split())
    assert code == 1, told
    assert told.count("StorageError") == 1
    assert "Traceback" not in told
    assert "cannot be written: the file would be larger than its disk or `ulimit -f` allows" in panel
    assert "Run again, a fit or a search goes on where it was." in panel
    assert "out/" in panel, "the file is named"
    assert [name for name in all_files(tmp_path / "out") if ".tmp-" in name or "member" in name] == []


def test_a_full_disk_says_what_is_needed_and_what_is_free(tmp_path: Path, fail, capsys) -> None:
    write_json(tmp_path / "kept.json", {"kept": True})
    fail(errno.ENOSPC, "kept.json")

    with pytest.raises(OSError, match=r"kept\.json cannot be written: the disk is full") as caught:
        write_json(tmp_path / "kept.json", {"long": "x" * 5_000_000})

    assert "(it takes 5.000 MB or more, and " in str(caught.value)
    assert f"Free room in {tmp_path}, or choose a folder elsewhere" in str(caught.value)
    assert (tmp_path / "kept.json").read_text() == '{\n  "kept": true\n}\n'
    assert all_files(tmp_path) == ["kept.json"]


def test_a_quota_is_told_apart_from_a_full_disk(tmp_path: Path, fail) -> None:
    fail(errno.EDQUOT, "a.json")
    with pytest.raises(OSError, match="the quota there is used up"):
        write_json(tmp_path / "a.json", {})


def test_an_error_of_another_kind_stays_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "a") as temp:
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(temp))


def test_a_fit_goes_on_once_there_is_room(walk_store: Path, tmp_path: Path, monkeypatch, fail) -> None:
    config = FitConfig(diffusion=QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", os.fsync)
        fail(errno.ENOSPC, "generator.safetensors")
        with pytest.raises(OSError, match="the disk is full"):
            fit(walk_store, config, out=tmp_path / "out")
        monkeypatch.undo()
    assert "diffusion.checkpoint.safetensors" in all_files(tmp_path / "out")

    again = fit(walk_store, config, out=tmp_path / "out")

    whole = fit(walk_store, config)
    for name, tensor in again.denoiser.state_dict().items():
        assert torch.equal(tensor, whole.denoiser.state_dict()[name])


def test_a_demo_that_cannot_record_says_why(tmp_path: Path, fail, capsys) -> None:
    fail(errno.ENOSPC, "chunk-000001.safetensors")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    panel = capsys.readouterr().err.rpartition("StorageError")[2]
    assert "the disk is full" in " ".join(panel.replace("│", " ").split())
    assert not (tmp_path / "demo" / "store").exists()


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the test's folder can only be read."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("touch", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(
        Path, "mkdir", lambda path, mode=0o777, parents=False, exist_ok=False: path.is_dir() or refuse(path)
    )


def test_a_finished_fit_on_a_disk_that_can_only_be_read_returns_at_once(
    walk_store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = FitConfig(diffusion=QUICK)
    fit(walk_store, config, out=tmp_path / "out")
    request.getfixturevalue("read_only")

    again = fit(walk_store, config, out=tmp_path / "out")

    assert again.path is not None


def test_a_disk_that_can_only_be_read_is_named(walk_store: Path, tmp_path: Path, read_only: None, capsys) -> None:
    for args in (["fit", str(walk_store), "--out", str(tmp_path / "out")], ["condition", str(walk_store), "--set"]):
        args = [*args, "run-001", "angle=3"] if args[-1] == "--set" else args
        assert main(args) == 1
        told = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "cannot be written: this disk can only be read. Choose a folder elsewhere. Run again" in told
