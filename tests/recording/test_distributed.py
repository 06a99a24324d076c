"""Two processes on gloo. Both see the same batches, so that their training equals that of one process, bit for bit."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from pdiff_plugin import SnapshotStore
from pdiff_plugin.errors import FormatError
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from pdiff_plugin import PDiffRecorder

kind, store, num_steps, layers, state_path = sys.argv[1:6]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 1))
if kind != "single":
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}",
                            rank=int(os.environ["RANK"]), world_size=2)
if kind == "ddp":
    model = nn.parallel.DistributedDataParallel(model)
if kind == "fsdp1":
    from torch.distributed.fsdp import FullyShardedDataParallel
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
if kind == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
condition = json.loads(os.environ.get("CONDITION", "null"))
recorder = PDiffRecorder(store, layers=layers, last_steps=6, condition=condition)
rng = torch.Generator().manual_seed(1)
with recorder.attach(model, optimizer, total_steps=8):
    for step in range(int(num_steps)):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=rng)).square().mean().backward()
        optimizer.step()
    state = recorder.state_dict()
if int(os.environ.get("RANK", 0)) == 0:
    json.dump(state, open(state_path, "w"))
assert recorder.error is None, recorder.error
if kind != "single":
    dist.barrier()
    dist.destroy_process_group()
    # Now and then a thread of gloo's is still there when Python ends, and aborts it: what is tested is over.
    sys.stderr.flush()
    os._exit(0)
"""


def run(kind, store, tmp_path, num_steps=8, layers="all"):
    for status, errors in try_to_run(kind, store, tmp_path, num_steps, layers):
        assert status == 0, errors
    return store


def try_to_run(kind, store, tmp_path, num_steps=8, layers="all"):
    """Exit status and stderr of each rank."""
    ranks = 1 if kind == "single" else 2
    meeting = tmp_path / "meeting"
    meeting.unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, kind, str(store), str(num_steps), layers, str(tmp_path / "state.json")],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "MEETING": str(meeting)},
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


needs_fsdp2 = pytest.mark.skipif(torch.__version__ < "2.7", reason="fully_shard on the CPU came with PyTorch 2.7")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return SnapshotStore.open(run("single", folder / "store", folder))


def assert_same(store, expected):
    assert store.layout == expected.layout
    assert store.steps.tolist() == expected.steps.tolist() == [3, 4, 5, 6, 7, 8]
    assert torch.equal(store.rows(), expected.rows())
    base, expected_base = store.base(), expected.base()
    assert sorted(base) == sorted(expected_base)
    for name, tensor in expected_base.items():
        assert torch.equal(base[name], tensor), name


def test_ddp_records_on_rank_0_what_one_process_records(single, tmp_path):
    store = SnapshotStore.open(run("ddp", tmp_path / "store", tmp_path))
    assert store.trajectories == ["run-001"]
    assert_same(store, single)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fsdp2)])
def test_the_condition_of_a_distributed_run_is_in_the_store_once(single, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("CONDITION", '{"angle": 45.0}')
    store = SnapshotStore.open(run(kind, tmp_path / "store", tmp_path))
    assert_same(store, single)
    assert store.conditions == {"run-001": {"angle": 45.0}}
    assert len(list((tmp_path / "store").glob("**/condition.json"))) == 1
    monkeypatch.setenv("CONDITION", '{"tilt": 45.0}')
    for status, errors in try_to_run(kind, tmp_path / "store", tmp_path):
        assert status == 1
        assert "condition of this run: found 'angle' in run-001 alone" in errors


@needs_fsdp2
def test_shards_of_fsdp2_are_joined_to_what_one_process_records(single, tmp_path):
    path = run("fsdp", tmp_path / "store", tmp_path)
    assert sorted(folder.name for folder in (path / "shards").iterdir()) == [
        "rank-00000-of-00002",
        "rank-00001-of-00002",
    ]
    assert not (path / "layout.json").exists()
    store = SnapshotStore.open(path)
    assert_same(store, single)
    assert store.trajectories == ["run-001"]
    assert json.loads((tmp_path / "state.json").read_text())["trajectory"] == "run-001"
    assert float(store.base_header("run-001")["rest_drift"]) == 0.0

    written = {file: file.stat().st_mtime_ns for file in path.glob("trajectories/**/*.safetensors")}
    assert_same(SnapshotStore.open(path), single)
    assert {file: file.stat().st_mtime_ns for file in path.glob("trajectories/**/*.safetensors")} == written

    # A second run becomes a second trajectory; of one in which a rank was killed, the steps that all ranks have count.
    run("fsdp", path, tmp_path)
    part = SnapshotStore.open(path / "shards" / "rank-00001-of-00002")
    assert part.trajectories == ["run-001", "run-002"]
    TrajectoryWriter(part.path, part.layout, trajectory="run-002", resume_step=5)
    store = SnapshotStore.open(path)
    assert store.trajectories == ["run-001", "run-002"]
    assert store.steps.tolist() == [3, 4, 5, 6, 7, 8, 3, 4, 5]

    shutil.rmtree(path / "shards" / "rank-00001-of-00002")
    with pytest.raises(FormatError, match=r"found no snapshots of rank 1, expected one folder for each of 2 ranks"):
        SnapshotStore.open(path)


def test_fsdp1_is_refused_on_every_rank(tmp_path):
    for status, errors in try_to_run("fsdp1", tmp_path / "store", tmp_path):
        assert status == 1
        assert "0.weight' is sharded by FullyShardedDataParallel or DeepSpeed ZeRO-3; models are recorded" in errors
    assert not (tmp_path / "store").exists()


@needs_fsdp2
def test_shards_of_a_run_that_ends_before_its_window_are_joined_to_the_sparse_rows_of_one_process(tmp_path):
    expected = SnapshotStore.open(run("single", tmp_path / "single", tmp_path, num_steps=2))
    store = SnapshotStore.open(run("fsdp", tmp_path / "store", tmp_path, num_steps=2))
    assert store.steps.tolist() == expected.steps.tolist() == [1, 2]
    assert torch.equal(store.rows(), expected.rows())
    assert store.sparse == expected.sparse != {}
    assert store.stopped_early == expected.stopped_early != {}
