"""What is lost when a worker, a node or the driver of a distributed fit dies: seconds, and nothing else.

Every test starts processes of its own, with a time limit, and ends them: ``pytest -m slow tests/cluster``.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, WeightGenerator, fit
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

_spec = importlib.util.spec_from_file_location("processes", Path(__file__).with_name("processes.py"))
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

pytestmark = pytest.mark.slow

# Small reads and many steps, so that every stage lasts some seconds.
CONFIG = FitConfig(
    memory_gb=0.001,
    diffusion=DiffusionConfig(width=32, num_blocks=1, max_steps=2000, eval_every_n_steps=50, patience=1000),
)


@pytest.fixture(scope="module")
def long_store(tmp_path_factory) -> Path:
    """250 snapshots of 1,200,000 values in two tensors."""
    layout = Layout(tuple(TensorSpec(name, (600_000,), "float32", "parameter") for name in ("a", "b")))
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(6, layout.num_values, generator=rng)
    rows = torch.randn(250, 6, generator=rng).cumsum(0) @ directions
    path = tmp_path_factory.mktemp("faults") / "store"
    TrajectoryWriter(path, layout).write_chunk(rows, range(1, 251))
    return path


@pytest.fixture(scope="module")
def alone(long_store, tmp_path_factory) -> Path:
    """Run folder of the same fit in one process."""
    out = tmp_path_factory.mktemp("faults") / "alone"
    fit(long_store, CONFIG, out=out)
    return out


@pytest.fixture
def start():
    """``start(kind, ...)`` gives a process that is gone at the end of the test; the last one started goes first."""
    started = []

    def make(kind, *args, **kwargs):
        started.append(kind(*args, **kwargs))
        return started[-1]

    yield make
    for process in reversed(started):
        process.kill()


@pytest.fixture
def start_node(start):
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # a socket's path has at most 107 characters
        yield lambda **options: start(processes.Node, folder, **options)


def start_fit(start, store, out, **distributed):
    return start(processes.FitProcess, store, out, CONFIG.to_json(), **distributed)


def finished(folder: Path) -> set[str]:
    """Stages that a fit has behind it."""
    return set(json.loads((folder / "fit.json").read_text())["seconds"])


def check_same_fit(one: Path, other: Path) -> None:
    """Weights to rounding, the same steps, and no step twice."""
    a, b = WeightGenerator.load(one), WeightGenerator.load(other)
    for name, tensor in a.denoiser.state_dict().items():
        assert float((tensor - b.denoiser.state_dict()[name]).norm()) <= 1e-2 * float(tensor.norm()) + 1e-6, name
    torch.testing.assert_close(a.autoencoder.basis, b.autoencoder.basis, rtol=1e-4, atol=1e-6)
    first, second = (json.loads((folder / "fit.json").read_text()) for folder in (one, other))
    assert second["status"] == "finished"
    assert [e["step"] for e in first["history"]] == [e["step"] for e in second["history"]]
    assert not list(other.glob("*.checkpoint.safetensors"))


@pytest.mark.parametrize("stage", ["statistics", "autoencoder", "diffusion"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_a_stage_costs_seconds_and_nothing_else(start, long_store, alone, tmp_path, stage, rank):
    driver = start_fit(start, long_store, tmp_path / "fit", num_workers=2)
    driver.wait_for(stage, 100)
    workers = driver.workers()
    assert len(workers) == 2
    os.kill(workers[rank], signal.SIGKILL)
    killed = time.time()
    behind = finished(tmp_path / "fit")

    # A restart takes longer than a report that was on its way.
    recovered = driver.wait_for(stage, since=killed + 3.0)
    assert driver.finish() == 0, driver.text

    assert stage not in behind, "the kill came too late for this stage"
    print(f"RECOVERY {stage} worker {rank}: {recovered[0] - killed:.1f} s, went on at {recovered[1:]}", flush=True)
    check_same_fit(alone, tmp_path / "fit")
    assert "workers stopped and are started again from the last checkpoint (worker" in driver.text
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert [attempt["num_workers"] for attempt in document["attempts"]] == [2, 2]


def test_a_killed_driver_goes_on_when_the_same_command_is_run_again(start, long_store, alone, tmp_path):
    out = tmp_path / "fit"
    driver = start_fit(start, long_store, out, num_workers=2)
    driver.wait_for("diffusion", 300)
    driver.wait_until((out / "diffusion.checkpoint.safetensors").exists, "checkpoint")
    driver.kill()
    before = json.loads((out / "fit.json").read_text())
    assert before["status"] == "running"

    again = start_fit(start, long_store, out, num_workers=2)
    assert again.finish() == 0, again.text

    check_same_fit(alone, out)
    after = json.loads((out / "fit.json").read_text())
    assert len(after["attempts"]) == 2
    # Entries up to the checkpoint are the first attempt's own, times of the clock included.
    kept = [a for a, b in zip(before["history"], after["history"], strict=False) if a == b]
    print(f"KEPT {len(kept)} of {len(before['history'])} measurements of the first attempt", flush=True)
    assert kept == before["history"][: len(kept)]
    assert len(kept) > 1
    assert "statistics" not in {report[1] for report in again.reports}


def test_a_worker_lost_more_often_than_allowed_is_named(start, long_store, tmp_path):
    driver = start_fit(start, long_store, tmp_path / "fit", num_workers=2, max_failures=0)
    driver.wait_for("autoencoder", 100)
    os.kill(driver.workers()[1], signal.SIGKILL)

    assert driver.finish() == 1, driver.text

    print(f"GIVEN UP: {driver.errors[-1]}", flush=True)
    assert "WorkersFailedError: worker 1 on node " in driver.text
    assert "It was tried 1 times (--max-failures). What was finished is kept" in driver.text


@pytest.mark.parametrize("stage", ["statistics", "diffusion"])
def test_an_elastic_fit_outlives_a_node(start, start_node, long_store, alone, tmp_path, stage):
    head = start_node()
    second = start_node(address=head.address)
    driver = start_fit(start, long_store, tmp_path / "fit", num_workers=2, address=head.address, elastic=True)
    driver.wait_for(stage, 100)
    second.kill(grace_s=0.0)
    killed = time.time()

    recovered = driver.wait_for(stage, since=killed + 3.0)
    assert driver.finish() == 0, driver.text

    print(f"RECOVERY node in {stage}: {recovered[0] - killed:.1f} s, went on at {recovered[1:]}", flush=True)
    check_same_fit(alone, tmp_path / "fit")
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert [attempt["num_workers"] for attempt in document["attempts"]][-1] == 1


def test_a_fit_that_needs_a_lost_node_ends_and_names_it(start, start_node, long_store, tmp_path):
    head = start_node()
    second = start_node(address=head.address)
    driver = start_fit(start, long_store, tmp_path / "fit", num_workers=2, address=head.address, start_timeout_s=15.0)
    driver.wait_for("diffusion", 50)
    second.kill(grace_s=0.0)
    killed = time.monotonic()

    assert driver.finish() == 1, driver.text

    seconds = time.monotonic() - killed
    print(f"ENDED {seconds:.1f} s after the node: {driver.errors[-1]}", flush=True)
    assert seconds < 90
    assert "WorkersFailedError: node " in driver.text
    assert "there is room for 1 of 2 workers" in driver.text
    assert "goes on from the last checkpoint" in driver.text
    # Not the log of what was lost: ours, a line of Ray's or two, and the workers'.
    assert len(driver.errors) < 8, driver.text
    assert all(line.startswith("[") for line in driver.lines), driver.text


def test_a_cluster_that_asks_for_a_token_says_which_variable_to_set(start, start_node, long_store, tmp_path):
    secret = "0123456789abcdef0123456789abcdef"
    head = start_node(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secret)
    started = time.monotonic()
    driver = start_fit(start, long_store, tmp_path / "fit", address=head.address)
    assert driver.finish() == 1, driver.text
    print(f"REFUSED after {time.monotonic() - started:.1f} s: {driver.errors[-1]}", flush=True)
    assert "ClusterAccessError" in driver.text
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in driver.text


def test_a_submitted_job_fits_and_a_failing_one_is_a_failure(start, start_node, long_store, tmp_path):
    for package in ("aiohttp_cors", "opencensus", "opentelemetry"):
        pytest.importorskip(package, reason="job submission needs ray[default]")
    head = start_node(num_cpus=2)
    (tmp_path / "code").mkdir()

    def submit(*command: str) -> subprocess.CompletedProcess:
        to_head = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address=http://{head.dashboard}"]
        run_here = ["--working-dir", str(tmp_path / "code"), "--", sys.executable, "-m", "pdiff_plugin.cli"]
        return subprocess.run(
            [*to_head, *run_here, *command],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )

    quick = ["--diffusion.max-steps", "60", "--num-workers", "2"]
    done = submit("fit", str(long_store), "--out", str(tmp_path / "fit"), *quick)
    print(done.stdout, flush=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "diffusion: 60/60" in done.stdout
    assert "succeeded" in done.stdout
    assert json.loads((tmp_path / "fit" / "fit.json").read_text())["status"] == "finished"

    failed = submit("fit", str(tmp_path / "nowhere"), "--out", str(tmp_path / "other"), *quick)
    assert failed.returncode != 0
    assert "is not a snapshot store: there is no such folder" in " ".join(failed.stdout.replace("│", " ").split())


def test_a_killed_search_goes_on_and_ends_with_its_table(start, tmp_path):
    out = tmp_path / "tuned"
    short = ["--config.diffusion.max-steps", "180", "--config.diffusion.eval-every-n-steps", "20"]
    command = [sys.executable, "-m", "pdiff_plugin.cli", "tune", str(tiny_store(tmp_path)), "--out", str(out)]
    command += ["--num-trials", "5", *short]
    search = start(processes.Process, command, 300.0)
    # Not by its lines of progress, which come at most every ten seconds.
    search.wait_until(lambda: len(list((out / "search").glob("*/trial.json"))) >= 2, "two trials")
    search.kill()
    assert not (out / "tune.json").exists() or json.loads((out / "tune.json").read_text())["status"] != "finished"
    again = start(processes.Process, command, 300.0)
    assert again.finish() == 0, again.text

    document = json.loads((out / "tune.json").read_text())
    assert document["status"] == "finished"
    assert len(document["trials"]) == 5
    assert "lower is better" in again.text
    (default,) = (trial for trial in document["trials"] if trial["is_default"])
    assert document["trials"][0]["score"] <= default["score"]
    assert not (out / "search").exists()


def tiny_store(folder: Path) -> Path:
    layout = Layout((TensorSpec("a", (200,), "float32", "parameter"),))
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 4, generator=rng).cumsum(0) @ torch.randn(4, 200, generator=rng)
    TrajectoryWriter(folder / "tiny", layout).write_chunk(rows, range(1, 81))
    return folder / "tiny"
