"""Stores and run folders in a bucket of S3, by its own protocol, and what such a service does on a bad day."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, WeightGenerator, fit, merge_stores
from pdiff_plugin.errors import BucketError, FolderInUseError, StoreNotFoundError
from pdiff_plugin.snapshots import bucket_owner, remote
from pdiff_plugin.snapshots.bucket_store import BucketStore, opened_in_bucket
from pdiff_plugin.snapshots.remote import mirrored
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
serving = pytest.importorskip("werkzeug.serving")

# Connections of aiobotocore's are closed by the garbage collector, after the loop that they belong to.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

Answer = Iterable[bytes]
# (environ of a request, start_response) -> an answer, or None to leave it to the service
Fault = Callable[[dict[str, Any], Callable[..., Any]], "Answer | None"]


class Service:
    """A bucket service with a fault now and then, and the requests that reached it."""

    def __init__(self) -> None:
        self.app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self.server = serving.make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        found = self.fault(environ, start_response) if self.fault else None
        return self.app(environ, start_response) if found is None else found


class _Quiet(serving.WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "2")  # the library's own patience takes half a minute
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def bucket(service: Service, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a new bucket, whose service is quick to try again."""
    monkeypatch.setattr(remote, "_PUSH_EVERY_S", 0.05)
    monkeypatch.setattr(bucket_owner, "_TELL_EVERY_S", 0.2)
    monkeypatch.setattr(bucket_owner, "_GONE_AFTER_S", 1.0)
    name = f"bucket-{abs(hash(request.node.name)):x}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    service.fault = None


def files() -> Any:
    found = s3fs.S3FileSystem()
    found.invalidate_cache()
    return found


def error(status: str, code: str) -> Fault:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no: {code}</Message></Error>".encode()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


def first(count: int, fault: Fault, method: str = "") -> Fault:
    """``fault`` for the first requests of a method, or of any."""
    left = [count]

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer | None:
        if not left[0] or method not in ("", environ["REQUEST_METHOD"]):
            return None
        left[0] -= 1
        return fault(environ, start_response)

    return answer


def opened(url: str) -> AbstractContextManager[BucketStore]:
    """A store that is read through a cache of less than its size."""
    return opened_in_bucket(url, lambda D: slice(0, D), cache_bytes=8000, memory_bytes=10**6)


def test_a_store_is_read_and_a_missing_one_is_told(bucket: str, walk_store: Path) -> None:
    files().put(str(walk_store), f"{bucket}/store", recursive=True)

    with opened(f"{bucket}/store") as store:
        assert torch.equal(store.rows(), SnapshotStore.open(walk_store).rows())
    with pytest.raises(StoreNotFoundError, match="is not a snapshot store"), opened(f"{bucket}/other"):
        pytest.fail("there is none")


def cut(environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer | None:
    """An answer that ends in the middle, as when a connection breaks."""
    if "bytes=" not in environ.get("HTTP_RANGE", ""):
        return None
    start_response("206 Partial Content", [("Content-Length", "100")])
    return [b"half"]


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_columns_are_asked_for_again_where_the_service_is_busy_or_the_line_is_cut(
    bucket: str, service: Service, walk_store: Path, fault: str
) -> None:
    files().put(str(walk_store), f"{bucket}/store", recursive=True)
    with opened(f"{bucket}/store") as store:
        store.take_num_bytes()
        service.fault = first(3, error("503 Slow Down", "SlowDown") if fault == "busy" else cut)
        rows = store.rows(0, 24)
        assert torch.equal(rows, SnapshotStore.open(walk_store).rows(0, 24))


def test_a_service_that_stays_away_and_an_object_that_goes_are_told(
    bucket: str, service: Service, walk_store: Path
) -> None:
    files().put(str(walk_store), f"{bucket}/store", recursive=True)
    with opened(f"{bucket}/store") as store:
        service.fault = error("503 Slow Down", "SlowDown")
        with pytest.raises(BucketError, match=f"{bucket}/store: .*SlowDown"):
            store.rows(0, 24)
        service.fault = None
        files().rm(f"{bucket}/store/trajectories", recursive=True)
        with pytest.raises(BucketError, match=r"chunk-000001\.safetensors is gone since the store was opened"):
            store.rows(0, 24)


def test_stores_in_a_bucket_are_merged_and_a_service_that_fails_leaves_whole_trajectories_alone(
    bucket: str, service: Service, walk_store: Path, tmp_path: Path
) -> None:
    for number in range(3):
        files().put(str(walk_store), f"{bucket}/runs/lr-{number}", recursive=True)
    chunk = next(walk_store.rglob("chunk-*"))
    data = bytearray(chunk.read_bytes())
    for number in range(1, 3):
        data[-4:] = bytes([0, 0, 128, 62 + number])  # the last value of the last row
        files().pipe(f"{bucket}/runs/lr-{number}/{chunk.relative_to(walk_store)}", bytes(data))
    denied = error("403 Forbidden", "AccessDenied")
    service.fault = lambda environ, start: denied(environ, start) if "lr-1/traj" in environ["PATH_INFO"] else None
    out = tmp_path / "merged"

    with pytest.raises(BucketError, match=f"{bucket}/runs/lr-1: "):
        merge_stores([f"{bucket}/runs/*"], out)
    assert SnapshotStore.open(out).trajectories == ["run-001"]
    assert sorted(path.name for path in out.iterdir()) == ["layout.json", "trajectories"]

    service.fault = None
    report = merge_stores([f"{bucket}/runs/*"], out)
    assert list(report.added) == ["lr-1-run-001", "lr-2-run-001"]
    assert list(report.duplicates) == [f"{bucket}/runs/lr-0/trajectories/run-001"]
    last = SnapshotStore.open(out).rows(47, 48)[[59, 119, 179], 0]
    assert last[0] != last[1] != last[2]


def test_what_was_merged_from_a_bucket_is_not_read_again_until_it_changes(
    bucket: str, service: Service, walk_store: Path, tmp_path: Path
) -> None:
    files().put(str(walk_store), f"{bucket}/runs/a", recursive=True)
    out, origin = tmp_path / "merged", tmp_path / "merged" / "trajectories" / "run-001" / "origin.json"

    def merged() -> list[str]:
        """What is read of chunks, in a merge that finds all of them there."""
        service.requests.clear()
        report = merge_stores([f"{bucket}/runs/*"], out)
        assert (list(report.duplicates.values()), report.left_out) == (["run-001"], [])
        return [path for method, path in service.requests if method == "GET" and "chunk-" in path]

    assert list(merge_stores([f"{bucket}/runs/*"], out).added) == ["run-001"]
    assert merged() == []
    for damage in (
        "{",
        "{}",
        '{"format": "pdiff-origin", "format_version": 99}',
        origin.read_text().replace("s3:", "s4:"),
    ):
        origin.write_text(damage)
        assert len(merged()) == 1

    writer = TrajectoryWriter(walk_store, SnapshotStore.open(walk_store).layout, trajectory="run-001", resume_step=60)
    writer.write_chunk(torch.ones(1, 48), [61])
    writer.close()
    files().put(f"{walk_store}/", f"{bucket}/runs/a", recursive=True)
    assert list(merge_stores([f"{bucket}/runs/*"], out).extended) == ["run-001"]
    assert len(SnapshotStore.open(out)) == 61
    assert merged() == []


def test_what_is_written_arrives_and_the_folder_is_left(bucket: str) -> None:
    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        (folder / "fit.json").write_text("running")
        (folder / "diffusion.checkpoint.safetensors").write_text("half way")
    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        assert (folder / "diffusion.checkpoint.safetensors").read_text() == "half way"
        (folder / "diffusion.checkpoint.safetensors").unlink()
        (folder / "generator.safetensors").write_bytes(b"w" * 1000)
        (folder / "fit.json").write_text("finished")

    found = {path.rpartition("/")[2]: files().cat(path) for path in files().ls(f"{bucket}/fit")}
    assert found == {"fit.json": b"finished", "generator.safetensors": b"w" * 1000}


def test_the_file_that_tells_of_the_others_is_put_behind_them(bucket: str, service: Service) -> None:
    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        (folder / "generator.safetensors").write_text("old")
        (folder / "fit.json").write_text("finished")
    service.requests.clear()
    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        (folder / "generator.safetensors").unlink()  # as a fresh fit does
        (folder / "fit.json").write_text("running")

    changes = [(method, path.rpartition("/")[2]) for method, path in service.requests if method in ("PUT", "DELETE")]
    ours = [change for change in changes if change[1] != "owner.json"]
    assert ours == [("DELETE", "generator.safetensors"), ("PUT", "fit.json")]


def test_an_upload_that_is_cut_in_the_middle_is_made_again_whole(bucket: str, service: Service) -> None:
    content = os.urandom(3_000_000)

    def cut(environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer | None:
        if int(environ.get("CONTENT_LENGTH") or 0) < 1_000_000:
            return None
        environ["wsgi.input"].read(500_000)
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        service.fault = None
        return [b""]

    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        service.fault = cut
        (folder / "generator.safetensors").write_bytes(content)
    assert service.fault is None, "nothing was cut"
    assert files().cat(f"{bucket}/fit/generator.safetensors") == content


@pytest.mark.parametrize("count", [1, 5])
def test_a_service_that_is_busy_for_a_while_costs_seconds(bucket: str, service: Service, count: int) -> None:
    slow = error("503 Slow Down", "SlowDown")
    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        (folder / "fit.json").write_text("finished")
        service.fault = first(count, slow, "PUT")
    assert files().cat(f"{bucket}/fit/fit.json") == b"finished"

    service.fault = first(count, slow)
    with mirrored(f"{bucket}/fit", last="fit.json", is_final=lambda _: True) as folder:
        assert (folder / "fit.json").read_text() == "finished"


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_wrong_credentials_name_the_bucket_and_where_they_come_from(bucket: str, service: Service, code: str) -> None:
    service.fault = error("403 Forbidden", code)
    started = time.monotonic()
    variables = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    with pytest.raises(BucketError, match=rf"{bucket}/store: .*{variables}"), opened(f"{bucket}/store"):
        pytest.fail("there is nothing to work on")
    with pytest.raises(BucketError, match=f"{bucket}/fit: "), mirrored(f"{bucket}/fit", last="fit.json"):
        pytest.fail("there is nothing to work on")
    assert time.monotonic() - started < 10


def test_what_a_listing_does_not_show_yet_is_found_all_the_same(bucket: str, service: Service) -> None:
    def stale(environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer | None:
        if "list-type=2" not in environ.get("QUERY_STRING", ""):
            return None
        body = b"<?xml version='1.0'?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
        start_response("200 OK", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        (folder / "generator.safetensors").write_text("weights")
        (folder / "fit.json").write_text("finished")
    service.fault = stale
    with mirrored(f"{bucket}/fit", last="fit.json", always=("fit.json", "generator.safetensors")) as folder:
        assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
            "fit.json",
            "generator.safetensors",
        ]


def test_a_second_fit_to_the_same_folder_is_told(bucket: str) -> None:
    with mirrored(f"{bucket}/fit", last="fit.json") as folder:
        (folder / "fit.json").write_text("the first")
        with (
            pytest.raises(FolderInUseError, match=f"{bucket}/fit is in use: process {os.getpid()} on"),
            mirrored(f"{bucket}/fit", last="fit.json"),
        ):
            pytest.fail("it is in use")
    assert files().cat(f"{bucket}/fit/fit.json") == b"the first"


def test_a_finished_fit_is_read_from_a_bucket_that_takes_nothing(bucket: str, service: Service) -> None:
    files().pipe(f"{bucket}/fit/fit.json", b"finished")
    service.fault = first(99, error("403 Forbidden", "AccessDenied"), "PUT")
    with mirrored(f"{bucket}/fit", last="fit.json", is_final=lambda _: True) as folder:
        assert (folder / "fit.json").read_text() == "finished"


LONG = FitConfig(
    diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=4000, eval_every_n_steps=50, patience=1000)
)
FIT = """
import json, sys
import torch
from torch import distributed
from pdiff_plugin import FitConfig
from pdiff_plugin.fitting import training
from pdiff_plugin.fitting.ranks import fit_on_ranks
from pdiff_plugin.snapshots import bucket_owner, remote

training.CHECKPOINT_EVERY_S = remote._PUSH_EVERY_S = 0.2
bucket_owner._TELL_EVERY_S, bucket_owner._GONE_AFTER_S = 0.2, 1.0
torch.set_num_threads(1)
meeting, store, out, config = sys.argv[1:]
distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
fit_on_ranks(store, FitConfig.from_json(json.loads(config)), out=out)
"""


@pytest.mark.slow
def test_a_fit_killed_while_it_writes_to_a_bucket_goes_on_to_the_same_result(
    bucket: str, walk_store: Path, tmp_path: Path
) -> None:
    files().put(str(walk_store), f"{bucket}/store", recursive=True)
    out = f"{bucket}/fit"

    def start(number: int) -> subprocess.Popen[bytes]:
        arguments = [str(tmp_path / f"meet-{number}"), f"{bucket}/store", out, json.dumps(LONG.to_json())]
        return subprocess.Popen([sys.executable, "-c", FIT, *arguments])

    for number in range(3):
        killed = start(number)
        deadline = time.monotonic() + 60
        while not files().exists(f"{out}/diffusion.checkpoint.safetensors"):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3 * number)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert start(9).wait(120) == 0

    files().get(out, str(tmp_path / "fit"), recursive=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = fit(walk_store, LONG).denoiser.state_dict()
    torch.set_num_threads(threads)
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == ["fit.json", "generator.safetensors"]
    for name, tensor in WeightGenerator.load(tmp_path / "fit").denoiser.state_dict().items():
        assert torch.equal(tensor, alone[name]), name
