"""A fit that is killed again and again ends as one that was left alone.

pytest -m slow tests/fitting/test_kills.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

pytestmark = pytest.mark.slow

FIT = """
    import sys
    from pdiff_plugin import cli
    from pdiff_plugin.fitting import training
    training.CHECKPOINT_EVERY_S = 0.2
    print("ready", flush=True)
    steps = ["--diffusion.max-steps", "600", "--diffusion.eval-every-n-steps", "20", "--diffusion.patience", "1000"]
    raise SystemExit(cli.main(["fit", sys.argv[1], "--out", sys.argv[2], *steps]))
"""


def start(store: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(FIT), str(store), str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def is_finished(out: Path) -> bool:
    path = out / "fit.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("number", "code", "times"), [(signal.SIGKILL, -9, 50), (signal.SIGTERM, 143, 20)], ids=["kill", "term"]
)
def test_a_fit_that_is_ended_again_and_again_is_bit_identical(tmp_path, number, code, times):
    layout = Layout.from_tensors({"w": torch.zeros(40, 50)})
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, generator=rng).cumsum(0) @ torch.randn(5, 2000, generator=rng)
    TrajectoryWriter(tmp_path / "store", layout).write_chunk(rows, range(1, 61))
    began = time.monotonic()
    alone = start(tmp_path / "store", tmp_path / "alone")
    alone.communicate()
    seconds = time.monotonic() - began
    assert alone.returncode == 0
    wanted = (tmp_path / "alone" / "generator.safetensors").read_bytes()

    moment, ended, attempt = random.Random(), 0, 0
    while ended < times:
        attempt += 1
        out = tmp_path / str(attempt)
        while True:
            process = start(tmp_path / "store", out)
            time.sleep(moment.uniform(0.0, seconds / 2))
            process.send_signal(number)
            process.communicate()
            if is_finished(out):
                break
            # Before the command begins, and after it, SIGTERM is not ours.
            assert process.returncode in (code, -number)
            ended += process.returncode == code
        assert (out / "generator.safetensors").read_bytes() == wanted
        assert not list(out.glob(".*"))
    print(f"{ended} x {number.name} in {attempt} fits")
