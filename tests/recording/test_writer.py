import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from pdiff_plugin import PDiffRecorder, SnapshotStore
from pdiff_plugin.recording import writer as writer_module
from pdiff_plugin.recording.writer import BackgroundWriter, RowInfo
from pdiff_plugin.snapshots import files
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

VALUE = torch.zeros(3)
LAYOUT = Layout.from_tensors({"w": VALUE})


@pytest.fixture
def make(tmp_path):
    made = []

    def make(**kwargs):
        opened = lambda: TrajectoryWriter(tmp_path, LAYOUT)  # noqa: E731
        made.append(BackgroundWriter(opened, LAYOUT, torch.float32, torch.device("cpu"), **kwargs))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


def add(writer, steps):
    for step in steps:
        writer.add([torch.full((3,), float(step))], RowInfo(step))


def chunk_sizes(path):
    return [len(chunk.steps) for _, chunk in SnapshotStore.open(path)._chunks]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_chunk_closes_at_64_rows(make, tmp_path):
    writer = make()
    add(writer, range(1, 131))
    writer.close()
    assert chunk_sizes(tmp_path) == [64, 64, 2]
    assert SnapshotStore.open(tmp_path).rows()[:, 0].tolist() == list(range(1, 131))


def test_a_chunk_closes_at_64_mib(monkeypatch, make, tmp_path):
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 3 * 4 * 5)
    writer = make()
    add(writer, range(1, 8))
    writer.close()
    assert chunk_sizes(tmp_path) == [5, 2]


def test_a_chunk_closes_after_its_time_even_when_no_step_follows(monkeypatch, make, tmp_path):
    monkeypatch.setattr(writer_module, "CHUNK_SECONDS", 0.05)
    writer = make()
    add(writer, [1, 2])
    wait_for(lambda: list(tmp_path.glob("trajectories/run-001/chunk-000001.safetensors")))
    assert chunk_sizes(tmp_path) == [2]


def test_training_waits_for_a_slow_disk_and_no_row_is_lost(monkeypatch, make, tmp_path):
    gate = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda fd: gate.wait(20) and fsync(fd))
    writer = make()
    num_rows = 64 * 5
    trainer = threading.Thread(target=add, args=(writer, range(1, num_rows + 1)))
    trainer.start()
    wait_for(lambda: not writer._free and not writer._num_unmade and writer._current is None)
    assert trainer.is_alive()
    gate.set()
    trainer.join(20)
    writer.close()
    assert SnapshotStore.open(tmp_path).steps.tolist() == list(range(1, num_rows + 1))


def test_flush_puts_every_row_on_disk(make, tmp_path):
    writer = make()
    add(writer, [1, 2, 3])
    writer.flush()
    assert len(SnapshotStore.open(tmp_path)) == 3
    writer.flush()
    add(writer, [4])
    writer.close()
    assert chunk_sizes(tmp_path) == [3, 1]


def test_a_closed_writer_takes_no_more_rows_and_closes_twice(make, tmp_path):
    writer = make()
    add(writer, [1])
    writer.close()
    writer.close()
    add(writer, [2])
    assert len(SnapshotStore.open(tmp_path)) == 1


def test_a_writer_that_got_no_rows_leaves_no_store(make, tmp_path):
    make().close()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_writes_nothing(make, tmp_path):
    writer = make()
    add(writer, [1])
    child = os.fork()
    if child == 0:
        add(writer, [2])
        writer.flush()
        writer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    add(writer, [3])
    writer.close()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 3]


def test_a_full_disk_stops_recording_with_one_warning_and_training_goes_on(net, train, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fsync, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(files.os, "fsync", full)
    with PDiffRecorder(tmp_path).attach(net, optimizer) as recorder:
        history = train(net, optimizer, 20)
    assert len(history) == 20
    assert isinstance(recorder.error, OSError)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "recording stopped, training goes on" in caplog.text
    assert "cannot be written: the disk is full" in caplog.text
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [1, 2, 3, 4]
    assert store.problems == []
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_file_size_limit_of_the_system_leaves_a_readable_store(tmp_path):
    script = """
        import resource, signal, sys, logging
        logging.basicConfig(level="WARNING")
        import torch
        from pdiff_plugin import PDiffRecorder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model = torch.nn.Linear(500, 10)
        recorder = PDiffRecorder(sys.argv[1], layers="head", save_base=False).attach(model)
        for _ in range(10):
            recorder.step()
        recorder.state_dict()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for _ in range(200):
            recorder.step()
        recorder.close()
        print("trained to the end", recorder.error)
    """
    done = run(script, tmp_path)
    assert "trained to the end" in done.stdout
    assert done.stderr.count("recording stopped, training goes on") == 1
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == list(range(1, 11))
    assert store.problems == []


def test_rows_are_written_at_interpreter_exit(tmp_path):
    script = """
        import sys, torch
        from pdiff_plugin import PDiffRecorder
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = PDiffRecorder(sys.argv[1], layers="head").attach(model, optimizer)
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        raise SystemExit(3)
    """
    done = run(script, tmp_path, expected=3)
    store = SnapshotStore.open(tmp_path)
    assert done.stderr == ""
    assert store.steps.tolist() == [1, 2, 3]
    assert store.base() is not None


def kill_at_random_moments(start_counting, tmp_path, times, rng):
    for attempt in range(times):
        path = tmp_path / str(attempt)
        process = start_counting(path)
        time.sleep(rng.uniform(0.0, 1.0))
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        last = process.output.split("\n")[-2]  # the last line that is whole
        if int(last) < 2 * writer_module.CHUNK_ROWS and not (path / "layout.json").exists():
            continue  # killed before the first chunk was written
        store = SnapshotStore.open(path)
        assert store.problems == []
        assert store.steps.tolist() == list(range(1, len(store) + 1))
        assert torch.equal(store.rows(0, 1)[:, 0].long(), store.steps)
        # The chunk that was being filled, and the one that was being written.
        assert int(last) - len(store) < 2 * writer_module.CHUNK_ROWS
        with PDiffRecorder(path, layers="all", max_snapshots=10**6) as recorder:
            recorder.load_state_dict({"step": len(store), "trajectory": "run-001"})
            recorder.attach(torch.nn.Linear(40, 25)).step()
        assert len(SnapshotStore.open(path)) == len(store) + 1
        assert not list(path.rglob(".tmp-*"))


def test_a_killed_run_loses_at_most_the_open_chunk(start_counting, tmp_path):
    kill_at_random_moments(start_counting, tmp_path, 2, random.Random())


@pytest.mark.slow
def test_a_run_killed_200_times_loses_at_most_the_open_chunk(start_counting, tmp_path):
    kill_at_random_moments(start_counting, tmp_path, 200, random.Random())


@pytest.mark.gpu
def test_rows_from_a_cuda_device_are_the_values_at_the_time_of_the_call(tmp_path):
    device = torch.device("cuda")
    values = torch.zeros(1000, 1000, device=device)
    layout = Layout.from_tensors({"w": values})
    writer = BackgroundWriter(lambda: TrajectoryWriter(tmp_path, layout), layout, torch.float32, device)
    for step in range(1, 101):
        values += 1
        skipped = torch.tensor(float(step % 10 == 0), device=device)
        writer.add([values], RowInfo(step, metrics={"loss": torch.tensor(step, device=device)}), skipped)
    writer.close()
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [step for step in range(1, 101) if step % 10]
    assert torch.equal(store.rows(0, 2)[:, 1].long(), store.steps)
    assert [metrics["loss"] for metrics in store.metrics] == store.steps.tolist()


def run(script, path, expected=0):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == expected, done.stderr
    return done
