"""Whatever the training loop does, the recorder is right about it or says so, and never ends it."""

import copy
import logging
import pickle
import random
import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn

from pdiff_plugin import PDiffRecorder, SnapshotStore


def test_a_training_that_changes_its_folder_does_not_move_the_store(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = PDiffRecorder("runs/a").attach(net)
    recorder.step()
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path / "outputs")
    recorder.step()
    recorder.close()
    assert len(SnapshotStore.open(tmp_path / "runs/a")) == 2
    assert not list((tmp_path / "outputs").iterdir())
    assert recorder.state_dict()["store"] == str(tmp_path / "runs/a")


def test_steps_inside_and_outside_of_inference_mode_are_recorded_alike(net, tmp_path):
    recorder = PDiffRecorder(tmp_path, layers="norms").attach(net)
    with torch.inference_mode():
        recorder.step()
    recorder.step()
    with torch.inference_mode():
        recorder.step()
        recorder.close()
    assert recorder.error is None
    assert recorder.rest_drift == 0.0
    assert len(SnapshotStore.open(tmp_path)) == 3


@pytest.mark.parametrize("value", [10**400, 1j, torch.tensor(1j)], ids=["beyond floats", "complex", "complex tensor"])
def test_a_metric_that_no_float_can_hold_is_left_out(net, tmp_path, value):
    recorder = PDiffRecorder(tmp_path).attach(net)
    recorder.step(metrics={"odd": value, "inf": 1e400, "loss": 0.5})
    recorder.close()
    assert recorder.error is None
    assert SnapshotStore.open(tmp_path).metrics == [{"inf": float("inf"), "loss": 0.5}]


def test_a_tensor_that_changes_its_shape_stops_the_recording_with_its_name(net, tmp_path, caplog):
    recorder = PDiffRecorder(tmp_path, layers="head").attach(net)
    recorder.step()
    net.fc.bias.data = torch.zeros(1)  # would broadcast to (3,)
    recorder.step()
    recorder.step()
    recorder.close()
    assert "tensor 'fc.bias'" in str(recorder.error)
    assert caplog.text.count("recording stopped, training goes on: tensor 'fc.bias'") == 1
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1]


def test_no_row_of_several_threads_is_lost(tmp_path):
    model = nn.Linear(4, 4)
    recorder = PDiffRecorder(tmp_path, layers="all", max_snapshots=2000).attach(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [recorder.step() for _ in range(100)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    recorder.close()
    assert SnapshotStore.open(tmp_path).steps.tolist() == list(range(1, 801))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_of_a_running_recorder_has_its_settings_and_not_its_run(net, tmp_path, caplog, copied):
    recorder = PDiffRecorder(tmp_path, layers="head", max_snapshots=7).attach(net)
    recorder.step()
    recorder.state_dict()  # it has its trajectory
    again = copied(recorder)
    assert "the copy has its settings, not its run" in caplog.text
    assert again.settings() == recorder.settings()
    assert again.state_dict()["step"] == 0
    again.attach(net).step()
    again.close()
    recorder.step()
    recorder.close()
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [1, 2, 1]
    assert store.trajectory_index.tolist() == [0, 0, 1]


def test_a_copy_of_a_restored_recorder_is_restored(net, tmp_path, caplog):
    with PDiffRecorder(tmp_path).attach(net) as recorder:
        recorder.step()
        state = recorder.state_dict()
    again = PDiffRecorder(tmp_path)
    again.load_state_dict(state)
    with pickle.loads(pickle.dumps(again)).attach(net) as last:
        last.step()
    assert caplog.text == ""
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2]


def test_a_training_that_is_resumed_twice_is_recorded_in_two_trajectories(net, tmp_path, caplog):
    with PDiffRecorder(tmp_path).attach(net) as recorder:
        recorder.step()
        state = recorder.state_dict()
    first, second = PDiffRecorder(tmp_path), PDiffRecorder(tmp_path)
    for again in (first, second):
        again.load_state_dict(state)
        again.attach(net).step()
        again.state_dict()  # both have opened their trajectory
    assert "run-001 belongs to process" in caplog.text
    assert f"This training goes on in {tmp_path}/trajectories/run-002." in caplog.text
    assert (first.state_dict()["trajectory"], second.state_dict()["trajectory"]) == ("run-001", "run-002")
    second.step()
    first.close()
    second.close()
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [1, 2, 2, 3]
    assert store.trajectory_index.tolist() == [0, 0, 1, 1]


def terminated(start_counting, path, wait_s, before="", after=""):
    """Start a training, send it SIGTERM, and return its exit code, its last printed step and what it told."""
    process = start_counting(path, before, after)
    time.sleep(wait_s)
    process.send(signal.SIGTERM)
    code = process.wait()
    lines = process.output.splitlines()
    return code, int([line for line in lines if line.isdigit()][-1]), process.output


def check_terminated(start_counting, path, wait_s):
    code, last, err = terminated(start_counting, path, wait_s)
    store = SnapshotStore.open(path)
    assert code == -signal.SIGTERM
    assert "told to end (SIGTERM): every snapshot so far is on disk" in err
    assert "Traceback" not in err
    assert len(store) in (last, last + 1)
    assert torch.equal(store.rows(0, 1)[:, 0].long(), store.steps)
    assert not list(path.rglob(".*"))


def test_sigterm_writes_what_is_left_and_ends_the_process_as_it_would_have(start_counting, tmp_path):
    check_terminated(start_counting, tmp_path / "a", 0.3)


@pytest.mark.slow
def test_20_sigterms_lose_no_row(start_counting, tmp_path):
    rng = random.Random()
    for attempt in range(20):
        check_terminated(start_counting, tmp_path / str(attempt), rng.uniform(0.0, 1.0))


def test_a_handler_of_the_users_own_stays_the_only_one(start_counting, tmp_path):
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    for place in ({"before": handler}, {"after": handler}):
        code, _, err = terminated(start_counting, tmp_path / next(iter(place)), 0.1, **place)
        assert code == 7
        assert "told to end" not in err  # sys.exit closes the recorder at exit
        assert len(SnapshotStore.open(tmp_path / next(iter(place)))) >= 1


@pytest.fixture
def default_sigterm():
    """Other tests' Ray takes the signal for itself."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_handler_goes_with_the_last_recorder(net, tmp_path, default_sigterm):
    before = signal.getsignal(signal.SIGTERM)
    one, two = PDiffRecorder(tmp_path / "a").attach(net), PDiffRecorder(tmp_path / "b").attach(net)
    assert signal.getsignal(signal.SIGTERM) is not before
    one.close()
    assert signal.getsignal(signal.SIGTERM) is not before
    two.close()
    assert signal.getsignal(signal.SIGTERM) is before


RESUMED = """
    import json, sys, time, torch
    from pdiff_plugin import PDiffRecorder
    mark = float(sys.argv[2])
    time.sleep(float(sys.argv[3]))
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = PDiffRecorder(sys.argv[1], layers="all")
    recorder.load_state_dict({"step": 5, "trajectory": "run-001"})
    recorder.attach(model, optimizer)
    for step in range(40):
        with torch.no_grad():
            model.weight.fill_(mark)
        optimizer.step()
        if step % 10 == 9:
            recorder.state_dict()
        time.sleep(0.002)
    recorder.close()
"""


def start_twice(start, path, times, rng):
    """The same resumed script started twice at random offsets; returns how often both ran at the same time."""
    both = 0
    for attempt in range(times):
        store = path / str(attempt)
        with PDiffRecorder(store, layers="all").attach(nn.Linear(4, 4)) as recorder:
            for _ in range(5):
                recorder.step()
        processes = [start(RESUMED, store, mark, rng.uniform(0.0, 0.15)) for mark in (1, 2)]
        codes = [process.wait() for process in processes]
        errors = [process.output for process in processes]
        assert codes == [0, 0], errors
        opened = SnapshotStore.open(store)
        for index in range(len(opened.trajectories)):
            is_own = (opened.trajectory_index == index) & (opened.steps > 5)
            assert len(opened.rows(0, 1)[is_own].unique()) == 1  # rows of one model
            assert opened.steps[is_own].tolist() == list(range(6, 46))
        both += len(opened.trajectories) == 2
        assert any("belongs to process" in error for error in errors) == (len(opened.trajectories) == 2)
        assert not list(store.rglob(".*"))
    return both


def test_a_script_that_is_started_twice_does_not_mix_its_rows(start, tmp_path):
    start_twice(start, tmp_path, 5, random.Random())


@pytest.mark.slow
def test_100_scripts_that_are_started_twice_do_not_mix_their_rows(start, tmp_path):
    assert start_twice(start, tmp_path, 100, random.Random()) > 50


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.WARNING)
