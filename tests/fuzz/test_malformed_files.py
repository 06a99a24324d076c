"""Whatever stands in the place of a file of ours, its reader opens it or says what is wrong: in ten seconds, within two
gigabytes, without a write elsewhere.

A failure names the seed and the number of the case: ``python tests/fuzz/worker.py FOLDER SEED NUMBER NUMBER+1``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
SEED = 20
MAX_MB = 2048


def read_spoiled(folder: Path, seed: int, last: int, *options: str) -> list[dict[str, Any]]:
    """Run cases 0 to ``last`` of a seed; what went wrong. A process that dies of a case is followed by another one."""
    found: list[dict[str, Any]] = []
    first = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "agg"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    while first < last:
        inside = folder / str(first)
        inside.mkdir()
        command = [sys.executable, str(WORKER), str(inside), *map(str, (seed, first, last)), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found += [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode == 0:
            break
        assert (inside / "at").exists(), done.stderr
        at = (inside / "at").read_text(encoding="utf-8")
        found.append({"number": at, "seed": seed, "wrong": f"ended the process\n{done.stderr[-2000:]}"})
        first = int(at.split()[0]) + 1
    peaks = [one for one in found if "peak_mb" in one]
    assert all(one["peak_mb"] < MAX_MB for one in peaks)
    return [{"seed": seed, **one} for one in found if "peak_mb" not in one]


def test_three_hundred_spoiled_files_are_opened_or_refused(tmp_path: Path) -> None:
    wrong = read_spoiled(tmp_path, SEED, 300, "quick")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_spoiled_files_are_opened_or_refused(tmp_path: Path, part: int) -> None:
    for module in ("ray", "matplotlib", "jinja2"):
        pytest.importorskip(module)
    wrong = read_spoiled(tmp_path, SEED + 1 + part, 2500)
    assert wrong == []
