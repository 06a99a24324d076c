"""The fit on several workers: equal to the fit in one process, and clear about what cannot work.

Tests that kill processes or start clusters of their own are in ``test_fit_faults.py``.
"""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, WeightGenerator, fit
from pdiff_plugin.cluster import connection as cluster
from pdiff_plugin.cluster.fit import fit_distributed
from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.errors import (
    ClusterTooSmallError,
    ClusterUnreachableError,
    ConfigError,
    StorageNotSharedError,
    UnusableSnapshotsError,
)

# Starting Ray and its workers leaves sockets and files of Ray's own to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

QUICK = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=60, batch_size=16, eval_every_n_steps=20))


def relative_distance(one: WeightGenerator, other: WeightGenerator) -> float:
    """Largest over tensors of |a - b| / |a|, in the 2-norm."""
    a = {**one.denoiser.state_dict(), **one.autoencoder.state_dict()}
    b = {**other.denoiser.state_dict(), **other.autoencoder.state_dict()}
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).double().norm() / a[k].double().norm().clamp_min(1e-12)) for k in a)


def test_two_workers_fit_what_one_process_fits_and_show_progress(local_ray, make_store, tmp_path, recorder):
    store = make_store(trajectories=2)
    alone = fit(store, QUICK, out=tmp_path / "alone")
    seen = []

    together = fit_distributed(
        store,
        QUICK,
        DistributedConfig(num_workers=2),
        out=tmp_path / "together",
        on_progress=seen.append,
        loggers=[recorder],
    )

    assert relative_distance(alone, together) < 1e-5
    assert sorted(p.name for p in (tmp_path / "together").iterdir()) == ["fit.json", "generator.safetensors"]
    documents = [json.loads((tmp_path / name / "fit.json").read_text()) for name in ("alone", "together")]
    steps = [[entry["step"] for entry in document["history"]] for document in documents]
    assert steps[0] == steps[1]
    assert [attempt["num_workers"] for attempt in documents[1]["attempts"]] == [2]
    assert {"statistics", "autoencoder", "diffusion"} <= {report.stage for report in seen}
    assert seen[-1].metrics["workers"] == 2
    curve = {entry["step"]: entry["heldout_loss"] for entry in documents[1]["history"]}
    assert recorder.curves["diffusion/heldout_loss"] == pytest.approx(curve, abs=1e-6)
    assert recorder.curves["report/fidelity"] == {0: together.report["fidelity"]}
    assert not any(name.startswith("statistics/") for name in recorder.curves)


@pytest.mark.slow
def test_one_worker_fits_exactly_what_one_process_fits(local_ray, make_store, tmp_path):
    store = make_store()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives a worker of one CPU
    alone = fit(store, QUICK, out=tmp_path / "alone")
    torch.set_num_threads(threads)

    together = fit_distributed(store, QUICK, DistributedConfig(), out=tmp_path / "together")

    assert relative_distance(alone, together) == 0


@pytest.mark.slow
def test_workers_read_the_store_that_several_were_merged_into(local_ray, make_store, tmp_path):
    for number in range(2):
        make_store(trajectories=number + 1, name=f"runs/{number}")
    alone = fit([tmp_path / "runs" / "*"], QUICK, out=tmp_path / "alone")

    out = tmp_path / "together"
    together = fit_distributed([str(tmp_path / "runs" / "*")], QUICK, DistributedConfig(num_workers=2), out=out)

    assert together.trajectories == alone.trajectories
    assert relative_distance(alone, together) < 1e-3
    assert together.provenance["store"] == str(out / "merged-store")


@pytest.mark.slow
def test_a_fit_reads_its_store_from_a_bucket_and_writes_into_one(local_ray, make_store, tmp_path):
    store = make_store()
    bucket = f"file://{tmp_path}"  # goes through fsspec like any other, and workers see it

    generator = fit_distributed(f"{bucket}/store", QUICK, DistributedConfig(num_workers=2), out=f"{bucket}/fit")

    assert sorted(p.name for p in (tmp_path / "fit").iterdir()) == ["fit.json", "generator.safetensors"]
    assert relative_distance(fit(store, QUICK), generator) < 1e-5
    assert generator.provenance["store"] == f"{bucket}/store"


def test_a_finished_fit_is_returned_without_a_cluster(make_store, tmp_path):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "fit")
    before = (tmp_path / "fit" / "generator.safetensors").stat().st_mtime_ns

    fit_distributed(store, QUICK, DistributedConfig(address="127.0.0.1:9"), out=tmp_path / "fit")

    assert (tmp_path / "fit" / "generator.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_error_of_a_stage_comes_home_at_once(local_ray, make_store, tmp_path):
    rows = torch.ones(20, 40)
    with pytest.raises(UnusableSnapshotsError, match="20 snapshots that are all equal"):
        fit_distributed(make_store(rows), QUICK, DistributedConfig(), out=tmp_path / "fit")


def test_a_dead_address_is_named_within_five_seconds(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ClusterUnreachableError, match=f"no Ray cluster at {address}"):
        fit_distributed(make_store(), QUICK, DistributedConfig(address=address), out=tmp_path / "fit")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:10001", "head"])
def test_an_address_of_another_kind_says_what_to_give(make_store, tmp_path, monkeypatch, address):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="must be host:port"):
        fit_distributed(make_store(), QUICK, DistributedConfig(address=address), out=tmp_path / "fit")


def test_an_impossible_request_says_what_was_asked_and_what_exists(local_ray, make_store, tmp_path):
    asked = DistributedConfig(num_workers=3, cpus_per_worker=1.0)
    with pytest.raises(ClusterTooSmallError) as caught:
        fit_distributed(make_store(), QUICK, asked, out=tmp_path / "fit")
    text = str(caught.value)
    assert "asked for 3 worker(s) of 1 CPUs each" in text
    assert "there is room for 2 on 1 node(s)" in text
    assert "2 CPUs, 0 GPUs" in text

    with pytest.raises(ClusterTooSmallError, match="1 CPUs and 1 GPUs each; there is room for 0"):
        fit_distributed(make_store(name="b"), QUICK, DistributedConfig(gpus_per_worker=1.0), out=tmp_path / "fit-b")


def test_more_workers_than_a_batch_has_rows_are_refused(make_store, tmp_path):
    with pytest.raises(ConfigError, match=r"num_workers = 17: it must be at most diffusion\.batch_size"):
        fit_distributed(make_store(), QUICK, DistributedConfig(num_workers=17), out=tmp_path / "fit")


def test_a_node_that_sees_another_file_is_named(local_ray, monkeypatch):
    (node,) = cluster.alive_nodes().values()
    real = cluster.on_node
    # A second node that is in truth the first, and a file that is another one in every process.
    monkeypatch.setattr(cluster, "alive_nodes", lambda: {"second": {**node, "NodeManagerHostname": "other-host"}})
    monkeypatch.setattr(cluster, "on_node", lambda what, _: real(what, node["NodeID"]))
    with pytest.raises(StorageNotSharedError, match="/proc/self/stat cannot be seen from node other-host"):
        cluster.check_shared([Path("/proc/self/stat")])


def test_plain_fit_loads_no_ray(make_store, tmp_path):
    store = make_store()
    code = (
        "import sys; from pdiff_plugin.cli import main; "
        f"code = main(['fit', {str(store.path)!r}, '--out', {str(tmp_path / 'fit')!r}, '--diffusion.max-steps', '2']); "
        "sys.exit(code or 'ray' in sys.modules)"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
