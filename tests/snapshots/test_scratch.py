"""Temporary folders: gone with their process, or at the next start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdiff_plugin import DiffusionConfig, FitConfig, fit
from pdiff_plugin.cli import main
from pdiff_plugin.snapshots.scratch import keep, remove_abandoned, scratch_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files are locked there alone")

HOLDER = """
from pdiff_plugin.snapshots.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "basis").write_bytes(b"much")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files, of this process and those that it starts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def hold() -> Iterator[Callable[[], tuple[subprocess.Popen[str], Path]]]:
    """``hold()`` gives a process and the folder that it is using."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], Path]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", HOLDER], text=True, **pipes)
        started.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_is_gone_afterwards(temporary: Path) -> None:
    with scratch_folder() as folder:
        (folder / "inside").mkdir()
    assert list(temporary.iterdir()) == []


def test_a_killed_process_leaves_a_folder_until_the_next_start_of_a_command(hold, capsys) -> None:
    process, folder = hold()
    process.kill()
    process.wait()
    assert (folder / "basis").exists()

    assert main(["layers", "torch.nn:Identity"]) == 1  # whatever comes of it

    assert not folder.exists()


def test_the_next_fit_removes_them_too(hold, walk_store: Path) -> None:
    process, folder = hold()
    process.kill()
    process.wait()

    fit(walk_store, FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=2)))

    assert not folder.exists()


def test_a_folder_in_use_stays(hold) -> None:
    _, theirs = hold()
    with scratch_folder() as mine:
        remove_abandoned()
        assert (theirs / "basis").exists()
        assert mine.exists()


def test_what_others_put_into_the_folder_for_temporary_files_stays(temporary: Path) -> None:
    (temporary / "pdiff-notes").mkdir()
    (temporary / "pdiff-notes" / "mine.txt").write_text("keep")
    remove_abandoned()
    assert (temporary / "pdiff-notes" / "mine.txt").read_text() == "keep"


def test_a_folder_that_is_kept_stays_for_good() -> None:
    with scratch_folder() as folder:
        (folder / "generator.safetensors").write_text("hours of work")
        keep(folder)
    remove_abandoned()
    assert [path.name for path in folder.iterdir()] == ["generator.safetensors"]
