"""The files of ``examples/ray_job``: the script submits what it says, the manifests run commands that exist."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pdiff_plugin.cli import main

FOLDER = Path(__file__).parents[2] / "examples" / "ray_job"


def submit(tmp_path, *arguments):
    """Run submit.sh with a `ray` that only prints its arguments, one to a line."""
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    ray.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(
        [str(FOLDER / "submit.sh"), *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )


def test_submit_sends_its_own_folder_and_the_command(tmp_path):
    done = submit(tmp_path, "http://head:8265", "/shared/a b", "/shared/fit", "--num-workers", "4")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "job", "submit", "--address", "http://head:8265", "--working-dir", str(FOLDER),
        "--runtime-env", str(FOLDER / "runtime_env.yaml"),
        "--", "pdiff", "fit", "/shared/a b", "--out", "/shared/fit", "--num-workers", "4",
    ]  # fmt: skip


def test_submit_without_arguments_says_how_to_use_it(tmp_path):
    done = submit(tmp_path)
    assert done.returncode == 2
    assert "./submit.sh http://HEAD:8265 /shared/runs/a" in done.stderr


def test_the_manifest_runs_a_command_that_pdiff_understands(capsys):
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    program, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert program == "pdiff"
    # The flags are understood, so that what is missing is the store.
    assert main(arguments) == 1
    assert "is not a snapshot store" in " ".join(capsys.readouterr().err.split())
    for name in ("cluster.yaml", "runtime_env.yaml"):
        assert isinstance(yaml.safe_load((FOLDER / name).read_text()), dict)
