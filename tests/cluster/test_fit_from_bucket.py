"""A fit on machines that share no disk: the store and the run folder are in a bucket of S3, served by this process.

The machines are two nodes of a Ray cluster, each with a folder of its own for temporary files: ``pytest -m slow``.
"""

import importlib.util
import json
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, SubspaceConfig, WeightGenerator, fit
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

_spec = importlib.util.spec_from_file_location("processes", Path(__file__).with_name("processes.py"))
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
serving = pytest.importorskip("werkzeug.serving")

pytestmark = [
    pytest.mark.slow,
    # Connections of aiobotocore's are closed by the garbage collector, after the loop that they belong to.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

N, D = 40, 200_000
CONFIG = FitConfig(
    memory_gb=0.001,
    autoencoder=SubspaceConfig(latent_dim=8),
    diffusion=DiffusionConfig(
        width=32, num_blocks=1, max_steps=2000, eval_every_n_steps=50, patience=1000, distill_steps=12000
    ),
)
# Blocks of 3125 columns: each pass then takes some seconds, and what passes is fetched twice.
SMALL_CACHE_GB = 0.002


class Service:
    """A bucket service that counts the bytes of snapshots that it hands out."""

    def __init__(self) -> None:
        self.app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.num_bytes, self.lock = 0, threading.Lock()
        self.server = serving.make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ, start_response):
        body = list(self.app(environ, start_response))
        if environ["REQUEST_METHOD"] == "GET" and "chunk-" in environ["PATH_INFO"]:
            with self.lock:
                self.num_bytes += sum(map(len, body))
        return body


class _Quiet(serving.WSGIRequestHandler):
    def log(self, *_):
        pass


@pytest.fixture(scope="module")
def service():
    made = Service()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def alone(service, tmp_path_factory):
    """Run folder of the same fit in one process; the store is put into the bucket."""
    folder = tmp_path_factory.mktemp("alone")
    layout = Layout(tuple(TensorSpec(name, (D // 2,), "float32", "parameter") for name in ("a", "b")))
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(6, D, generator=rng)
    rows = torch.randn(N, 6, generator=rng).cumsum(0) @ directions
    writer = TrajectoryWriter(folder / "store", layout)
    for step, row in enumerate(rows, start=1):
        writer.write_chunk(row[None], [step])
    s3fs.S3FileSystem().put(str(folder / "store"), "bucket/store", recursive=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives a worker of one CPU
    fit(folder / "store", CONFIG, out=folder / "fit")
    torch.set_num_threads(threads)
    return folder / "fit"


@pytest.fixture
def start_node():
    """``start_node(address)`` is a node with temporary files of its own, and gone at the end of the test."""
    started = []
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # a socket's path has at most 107 characters

        def make(address=None):
            own = Path(folder, f"t{len(started)}")
            own.mkdir()
            started.append(processes.Node(folder, address=address, TMPDIR=str(own)))
            return started[-1]

        yield make
        for node in reversed(started):
            node.kill()


@pytest.fixture
def head(service, start_node):
    # One for each test: what a fit has reserved is free only some time after its driver was killed.
    return start_node()


@pytest.fixture
def start_fit(head):
    started = []

    def make(name, cache_gb):
        options = {"options": {"cache_gb": cache_gb}, "num_workers": 2, "address": head.address, "elastic": True}
        where = "s3://bucket/store", f"s3://bucket/{name}"
        started.append(processes.FitProcess(*where, CONFIG.to_json(), limit_s=400, **options))
        return started[-1]

    yield make
    for driver in started:
        driver.kill()


def fetched(name, folder):
    files = s3fs.S3FileSystem()
    files.invalidate_cache()
    files.get(f"bucket/{name}", str(folder), recursive=True)
    return folder


def difference(one: Path, other: Path) -> dict[str, float]:
    """Largest over the tensors of a part of |a - b| / |a|, in the 2-norm."""
    a, b = WeightGenerator.load(one), WeightGenerator.load(other)
    found = {}
    for part in ("autoencoder", "denoiser", "one_step"):
        mine, other_ones = (getattr(generator, part).state_dict() for generator in (a, b))
        assert mine.keys() == other_ones.keys()
        found[part] = max(
            float((mine[k] - other_ones[k]).double().norm() / mine[k].double().norm().clamp_min(1e-12)) for k in mine
        )
    return found


def test_two_machines_fit_what_one_process_fits_and_read_every_value_once(
    alone, service, head, start_node, start_fit, tmp_path
):
    second = start_node(head.address)
    service.num_bytes = 0
    driver = start_fit("once", 10.0)
    assert driver.finish() == 0, driver.text
    second.kill()

    document = json.loads((fetched("once", tmp_path / "fit") / "fit.json").read_text())
    report = document["report"]
    found = difference(alone, tmp_path / "fit")
    print(f"ONCE: differs by {found}, read {document['bytes_read']} of {report['bytes_in_store']} bytes", flush=True)
    assert [attempt["num_workers"] for attempt in document["attempts"]] == [2]
    assert found["autoencoder"] < 1e-5
    assert max(found.values()) < 1e-2
    # The driver reads the heads of files, and what tells whether the store is the same.
    assert report["bytes_read"] < service.num_bytes < report["bytes_read"] + N * (4096 + 256 + 1)
    assert report["bytes_read"] == 4 * N * D + 2 * 4096 * N


@pytest.mark.parametrize("stage", ["statistics", "autoencoder", "diffusion", "distill"])
def test_a_machine_that_is_lost_costs_seconds_and_nothing_else(alone, head, start_node, start_fit, tmp_path, stage):
    second = start_node(head.address)
    driver = start_fit(stage, SMALL_CACHE_GB)
    driver.wait_for(stage, 1)
    assert driver.reports[-1][4] == 2
    second.kill(grace_s=0.0)
    killed = time.time()

    def alone_again() -> list[list]:
        """What the one worker that is left has reported; the first one goes on alone until its partner is missed."""
        return [report for report in driver.reports if report[0] > killed and report[4] == 1]

    driver.wait_until(lambda: any(report[1] == stage for report in alone_again()), "report of one worker")
    started = alone_again()[0]
    recovered = next(report for report in alone_again() if report[1] == stage)
    assert driver.finish() == 0, driver.text

    document = json.loads((fetched(stage, tmp_path / "fit") / "fit.json").read_text())
    found = difference(alone, tmp_path / "fit")
    print(f"RECOVERY {stage}: started again after {started[0] - killed:.1f} s with {started[1:]}, and went on")
    print(f"  after {recovered[0] - killed:.1f} s at {recovered[1:]}; differs by {found}")
    print(
        f"  read {document['bytes_read']} of {document['report']['bytes_in_store']} bytes; {driver.errors}", flush=True
    )
    assert document["status"] == "finished"
    assert document["attempts"][-1]["num_workers"] == 1
    assert found["autoencoder"] < 1e-5
    assert max(found.values()) < 1e-2
    assert "workers stopped and are started again from the last checkpoint" in driver.text
