"""The condition of a run on its way into the store: checked before training goes on, kept with the first rows."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from pdiff_plugin import PDiffRecorder, RecorderConfig, SnapshotStore
from pdiff_plugin.errors import ConditionError, ConfigError
from pdiff_plugin.snapshots.conditions import set_condition


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def record(net, train, tmp_path):
    """Train with a recorder of these settings; returns the store."""

    def record(num_steps=3, **settings):
        optimizer = sgd(net)
        with PDiffRecorder(tmp_path / "sweep", **settings).attach(net, optimizer, total_steps=num_steps):
            train(net, optimizer, num_steps)
        return SnapshotStore.open(tmp_path / "sweep")

    return record


def test_the_condition_of_each_run_is_in_the_store(record):
    record(condition={"angle": 45.0, "style": "ink"})
    record()
    store = record(condition={"angle": torch.tensor(90), "style": "oil"})
    assert store.trajectories == ["run-001", "run-002", "run-003"]
    assert store.conditions == {"run-001": {"angle": 45.0, "style": "ink"}, "run-003": {"angle": 90, "style": "oil"}}
    assert store.problems == []


def test_without_a_condition_the_files_are_those_of_before(record, tmp_path):
    record()
    files = sorted(path.name for path in (tmp_path / "sweep" / "trajectories" / "run-001").iterdir())
    assert files == ["base.safetensors", "chunk-000001.safetensors"]


def test_the_condition_is_there_before_the_first_rows(net, tmp_path):
    with PDiffRecorder(tmp_path, condition={"a": 1}).attach(net) as recorder:
        recorder.step()
        recorder.state_dict()  # waits for the disk
        assert SnapshotStore.open(tmp_path).conditions == {"run-001": {"a": 1}}
    store = tmp_path / "empty"
    with PDiffRecorder(store, condition={"a": 1}, last_steps=1).attach(net, total_steps=9) as recorder:
        recorder.step()
        recorder.state_dict()
        assert (store / "trajectories" / "run-001" / "condition.json").is_file()


def test_a_condition_unlike_those_of_other_runs_is_refused_before_training(record, net, tmp_path):
    record(condition={"angle": 45.0})
    with pytest.raises(ConditionError, match=r"condition of this run: found 'style' in this run alone, .* run-001"):
        PDiffRecorder(tmp_path / "sweep", condition={"angle": 1, "style": "ink"}).attach(net)
    with pytest.raises(ConditionError, match="found text under 'angle', expected a number, as in run-001"):
        PDiffRecorder(tmp_path / "sweep", condition={"angle": "east"}).attach(net)
    assert SnapshotStore.open(tmp_path / "sweep").trajectories == ["run-001"]


def test_what_is_no_condition_is_refused_when_the_recorder_is_made():
    with pytest.raises(ConditionError, match="condition of this run: found nan under 'lr', expected a finite number"):
        PDiffRecorder(condition={"lr": float("nan")})
    with pytest.raises(ConditionError, match="found a int"):
        PDiffRecorder(condition=3)


@pytest.mark.parametrize("condition", ["hparams", ["lr"], ("lr",), "lr"])
def test_names_alone_are_refused_where_there_is_nothing_to_look_them_up_in(net, tmp_path, condition):
    recorder = PDiffRecorder(tmp_path / "s", condition=condition)
    with pytest.raises(
        ConfigError, match="must be a dict of names to values here: only Lightning, transformers and Ray"
    ):
        recorder.attach(net)
    assert not (tmp_path / "s").exists()


def resume(net, train, folder, **settings):
    """Record three steps of six at angle 45, then go on from the counters with other settings."""
    optimizer = sgd(net)
    with PDiffRecorder(folder, last_steps=6, condition={"angle": 45.0}).attach(net, optimizer, total_steps=6) as first:
        train(net, optimizer, 3)
        state = json.loads(json.dumps(first.state_dict()))
    recorder = PDiffRecorder(folder, last_steps=6, **settings)
    recorder.load_state_dict(state)
    with recorder.attach(net, optimizer, total_steps=6):
        train(net, optimizer, 3, first_step=4)
    return SnapshotStore.open(folder)


@pytest.mark.parametrize("settings", [{"condition": {"angle": 45}}, {}])
def test_a_resumed_run_keeps_its_condition(net, train, tmp_path, settings):
    store = resume(net, train, tmp_path / "s", **settings)
    assert store.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert store.conditions == {"run-001": {"angle": 45.0}}


def test_a_resumed_run_with_another_condition_is_an_error_that_names_both(net, train, tmp_path):
    with pytest.raises(ConditionError) as caught:
        resume(net, train, tmp_path / "s", condition={"angle": 90.0})
    assert "found {'angle': 90.0}, expected {'angle': 45.0}, that of run-001, which goes on" in str(caught.value)
    assert SnapshotStore.open(tmp_path / "s").steps.tolist() == [1, 2, 3]


def test_a_resumed_run_with_other_names_is_an_error_that_names_both(net, train, tmp_path):
    with pytest.raises(ConditionError, match="found 'angle' in run-001 alone"):
        resume(net, train, tmp_path / "s", condition={"tilt": 90.0})


def test_a_resumed_run_gives_its_trajectory_a_condition_that_it_did_not_have(net, train, tmp_path):
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path, last_steps=6).attach(net, optimizer, total_steps=6) as first:
        train(net, optimizer, 3)
        state = first.state_dict()
    recorder = PDiffRecorder(tmp_path, last_steps=6, condition={"angle": 1})
    recorder.load_state_dict(state)
    with recorder.attach(net, optimizer, total_steps=6):
        train(net, optimizer, 3, first_step=4)
    assert SnapshotStore.open(tmp_path).conditions == {"run-001": {"angle": 1}}


def test_a_damaged_condition_of_another_run_keeps_nobody_from_recording(record, tmp_path):
    record(condition={"a": 1})
    (tmp_path / "sweep" / "trajectories" / "run-001" / "condition.json").write_text("{")
    assert record(condition={"a": 2}).conditions == {"run-002": {"a": 2}}


def test_settings_with_a_condition_are_plain_json_and_those_without_are_as_before():
    config = RecorderConfig(condition={"a": np.float32(0.5), "b": torch.arange(2)})
    recorder = PDiffRecorder(config=config)
    assert json.loads(json.dumps(recorder.settings()))["condition"] == {"a": 0.5, "b": [0.0, 1.0]}
    assert PDiffRecorder(**json.loads(json.dumps(recorder.settings()))).settings() == recorder.settings()
    assert pickle.loads(pickle.dumps(recorder)).settings() == recorder.settings()
    assert recorder.identity() == PDiffRecorder().settings()
    assert "condition" not in PDiffRecorder().settings()


def test_a_condition_that_was_set_later_is_one_that_recording_looks_at(record, net, tmp_path):
    record()
    set_condition(tmp_path / "sweep", "run-001", {"angle": 1})
    with pytest.raises(ConditionError, match="run-001"):
        PDiffRecorder(tmp_path / "sweep", condition={"tilt": 1}).attach(net)
