import copy
import gc
import json
import logging
import pickle
import threading

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn

from pdiff_plugin import PDiffRecorder, RecorderConfig, SnapshotStore
from pdiff_plugin.errors import (
    ConfigError,
    LayoutMismatchError,
    NotHookableError,
    SelectionError,
    StoreNotFoundError,
    TrajectoryExistsError,
    UnsupportedTensorError,
)
from pdiff_plugin.recording.selection import select


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def assert_rows_equal_history(store, history, steps):
    assert store.steps.tolist() == steps
    for index, step in enumerate(steps):
        for name, tensor in store.state_dict(index).items():
            assert torch.equal(tensor, history[step - 1][name]), (step, name)


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2)])
def test_training_with_the_recorder_is_bit_identical(net, train, tmp_path, make):
    twin = copy.deepcopy(net)
    ends = []
    for model, is_recorded in ((net, False), (twin, True)):
        torch.manual_seed(5)
        optimizer = make(model)
        if is_recorded:
            with PDiffRecorder(tmp_path, layers="all").attach(model, optimizer, total_steps=6):
                train(model, optimizer, 6)
        else:
            train(model, optimizer, 6)
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        ends.append((list(model.state_dict().values()), state, torch.get_rng_state()))
    (weights, state, rng), (weights2, state2, rng2) = ends
    assert all(torch.equal(a, b) for a, b in zip(weights, weights2, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, state2, strict=True))
    assert state
    assert torch.equal(rng, rng2)
    assert len(SnapshotStore.open(tmp_path)) == 6


def test_rows_are_the_weights_after_each_step_of_the_window(net, train, tmp_path):
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path, last_steps=4).attach(net, optimizer, total_steps=9) as recorder:
        history = train(net, optimizer, 9)
    store = SnapshotStore.open(tmp_path)
    assert_rows_equal_history(store, history, [6, 7, 8, 9])
    assert store.trajectories == ["run-001"]
    assert recorder.error is None
    base = store.base()
    assert set(base) == set(history[-1])
    assert all(torch.equal(base[name], tensor) for name, tensor in history[-1].items())
    assert float(store.base_header("run-001")["rest_drift"]) == recorder.rest_drift > 0


@pytest.mark.parametrize(
    ("settings", "total", "per_epoch", "steps"),
    [
        ({}, 9, 4, [6, 7, 8, 9]),
        ({"last_epochs": 2}, 9, 4, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"max_snapshots": 3}, 9, None, [7, 8, 9]),
        ({"max_snapshots": 3}, 10, 10, [2, 6, 10]),
        ({"last_steps": 6, "every_n_steps": 3}, 10, 4, [7, 10]),
        ({"last_steps": 9, "every_n_steps": 2, "max_snapshots": 2}, 10, None, [8, 10]),
        ({"last_steps": 50}, 5, None, [1, 2, 3, 4, 5]),
        ({"max_snapshots": 3}, None, None, [8, 9, 10]),
        ({"max_snapshots": 3, "every_n_steps": 2}, None, None, [6, 8, 10]),
        ({"max_snapshots": 5, "last_steps": 9}, None, None, [2, 4, 6, 8, 10]),
        ({"max_snapshots": 100}, None, 4, [7, 8, 9, 10]),
        ({"max_snapshots": 3, "keep_newest": True}, 9, 4, [6, 8]),
    ],
)
def test_the_window_holds_exactly_the_steps_it_should(net, train, tmp_path, settings, total, per_epoch, steps):
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path, **settings).attach(net, optimizer, total_steps=total, steps_per_epoch=per_epoch):
        history = train(net, optimizer, total or 10)
    assert_rows_equal_history(SnapshotStore.open(tmp_path), history, steps)


def test_a_ring_keeps_its_length_on_disk_over_many_chunks(net, train, tmp_path, monkeypatch):
    monkeypatch.setattr("pdiff_plugin.recording.writer.CHUNK_ROWS", 4)
    optimizer = sgd(net)
    files = []
    with PDiffRecorder(tmp_path, max_snapshots=6).attach(net, optimizer) as recorder:
        history = []
        for first in range(1, 31, 5):
            history += train(net, optimizer, 5, first)
            recorder.state_dict()
            files.append(len(list(tmp_path.glob("trajectories/run-001/chunk-*"))))
    assert max(files) <= 4
    store = SnapshotStore.open(tmp_path)
    assert_rows_equal_history(store, history, list(range(25, 31)))
    assert torch.equal(store.base()["fc.weight"], history[-1]["fc.weight"])
    assert store.base_header("run-001")["rest_drift_from_step"] == "19"


def test_a_ring_keeps_no_base_when_other_weights_were_loaded_at_the_end(net, train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path).attach(net, optimizer):
        history = train(net, optimizer, 3)
        net.load_state_dict(history[0])
    store = SnapshotStore.open(tmp_path)
    assert len(store) == 3
    assert store.base() is None
    assert "the model has changed since its last snapshot at step 3" in caplog.text


def test_gradient_accumulation_gives_one_row_per_optimizer_step(net, batches, tmp_path):
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path).attach(net, optimizer):
        for index, (inputs, targets) in enumerate(batches * 3):
            nn.functional.cross_entropy(net(inputs), targets).backward()
            if index % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_gradient_scaler_skips_is_not_recorded(net, batches, tmp_path, fused):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    history = []
    with PDiffRecorder(tmp_path).attach(net, optimizer):
        for index, (inputs, targets) in enumerate(batches):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(net(inputs), targets)).backward()
            if index == 1:
                net.fc.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            if index != 1:
                history.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    assert_rows_equal_history(SnapshotStore.open(tmp_path), history, [1, 2, 3])


class CallsSuper(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)
        return loss


@pytest.mark.parametrize(
    "make",
    [
        lambda model: CallsSuper(model.parameters(), lr=0.1),
        lambda model: timm.optim.Lookahead(sgd(model), k=2),
    ],
    ids=["super", "lookahead"],
)
def test_an_optimizer_that_runs_hooks_twice_is_recorded_once_and_after_its_own_step(net, train, tmp_path, make):
    optimizer = make(net)
    with PDiffRecorder(tmp_path).attach(net, optimizer):
        history = train(net, optimizer, 5)
    assert_rows_equal_history(SnapshotStore.open(tmp_path), history, [1, 2, 3, 4, 5])


def test_recording_goes_on_after_a_step_that_raised(net, train, tmp_path):
    optimizer = sgd(net)

    def closure():
        raise ValueError("in the user's closure")

    with PDiffRecorder(tmp_path).attach(net, optimizer):
        history = train(net, optimizer, 2)
        with pytest.raises(ValueError, match="in the user's closure"):
            optimizer.step(closure)
        history += train(net, optimizer, 2, 3)
    assert_rows_equal_history(SnapshotStore.open(tmp_path), history, [1, 2, 3, 4])


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer that never ran Optimizer.__init__."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self):
        self.optimizer.zero_grad()


def test_a_wrapped_optimizer_is_unwrapped(net, train, tmp_path):
    optimizer = Wrapper(sgd(net))
    with PDiffRecorder(tmp_path).attach(net, optimizer):
        history = train(net, optimizer, 2)
    assert_rows_equal_history(SnapshotStore.open(tmp_path), history, [1, 2])


def test_an_object_without_step_hooks_is_refused(net, tmp_path):
    with pytest.raises(NotHookableError, match="has no step hooks"):
        PDiffRecorder(tmp_path).attach(net, nn.Linear(1, 1))


def test_of_several_optimizers_the_last_that_trains_a_chosen_tensor_is_followed(net, train, tmp_path):
    others = [p for name, p in net.named_parameters() if not name.startswith("bn")]
    norms = torch.optim.SGD([p for name, p in net.named_parameters() if name.startswith("bn")], lr=0.1)
    rest = torch.optim.SGD(others, lr=0.1)
    with PDiffRecorder(tmp_path).attach(net, [norms, rest]):
        train(net, rest, 3)
        train(net, norms, 2)
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2]


def test_compiled_models_and_steps_are_recorded(net, train, tmp_path):
    optimizer = sgd(net)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    compiled = torch.compile(net, backend="eager")
    with PDiffRecorder(tmp_path, layers=["bn3", "head"]).attach(compiled, optimizer):
        history = train(net, optimizer, 3)
    assert_rows_equal_history(SnapshotStore.open(tmp_path), history, [1, 2, 3])
    assert set(SnapshotStore.open(tmp_path).base()) == set(net.state_dict())


def test_parameters_that_the_model_replaces_are_found_again(net, train, tmp_path):
    recorder = PDiffRecorder(tmp_path, layers="head").attach(net)
    recorder.step()
    net.fc.weight = nn.Parameter(torch.full_like(net.fc.weight, 7.0))
    recorder.step()
    recorder.close()
    assert SnapshotStore.open(tmp_path).state_dict(1)["fc.weight"].unique().tolist() == [7.0]


def test_manual_steps_carry_epoch_and_metrics(net, tmp_path):
    recorder = PDiffRecorder(tmp_path).attach(net)
    recorder.step(epoch=0.5, metrics={"loss": torch.tensor(2.0), "note": "text", "acc": 1, "vector": torch.zeros(2)})
    recorder.step()
    recorder.close()
    store = SnapshotStore.open(tmp_path)
    assert store.epochs == [0.5, None]
    assert store.metrics == [{"loss": 2.0, "acc": 1.0}, {}]


@pytest.mark.filterwarnings("error")
def test_metrics_that_are_no_numbers_do_not_stop_the_recording(net, tmp_path):
    class Failing:
        def __float__(self):
            raise ValueError("no number")

    recorder = PDiffRecorder(tmp_path).attach(net)
    arrays = {"one": np.array([0.5]), "scalar": np.float32(0.25), "none": np.empty(0), "several": np.array([0.1, 0.2])}
    recorder.step(metrics={**arrays, "failing": Failing(), "text": np.str_("text")})
    recorder.close()
    assert recorder.error is None
    assert SnapshotStore.open(tmp_path).metrics == [{"one": 0.5, "scalar": 0.25}]


@pytest.mark.parametrize("total", [0, -1])
def test_a_run_of_no_steps_is_refused(net, tmp_path, total):
    with pytest.raises(ConfigError, match=f"total_steps = {total}: it must be at least 1"):
        PDiffRecorder(tmp_path).attach(net, total_steps=total)


def test_epochs_are_worked_out_from_their_length(net, train, tmp_path):
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path).attach(net, optimizer, total_steps=4, steps_per_epoch=2):
        train(net, optimizer, 4)
    assert SnapshotStore.open(tmp_path).epochs == [1.5, 2.0]


def test_a_step_before_attach_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must be given with attach\(model\) before step\(\)"):
        PDiffRecorder(tmp_path).step()


def test_observe_skips_a_step_it_has_seen(net, tmp_path):
    recorder = PDiffRecorder(tmp_path)
    for step in (1, 1, 2, 2, 2, 3):
        recorder.observe(net, step=step)
    recorder.close()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize("total", [12, None])
@pytest.mark.parametrize("saved_at", [2, 7])
def test_a_resumed_run_gives_the_same_store_as_an_uninterrupted_one(net, train, tmp_path, total, saved_at):
    twin = copy.deepcopy(net)
    settings = {"last_steps": 8, "layers": ["bn3", "head"]}
    net.eval()  # dropout would draw from one random state for both runs
    twin.eval()
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path / "whole", **settings).attach(net, optimizer, total_steps=total):
        train(net, optimizer, 12)

    optimizer = sgd(twin)
    killed = PDiffRecorder(tmp_path / "parts", **settings).attach(twin, optimizer, total_steps=total)
    train(twin, optimizer, saved_at)
    checkpoint = copy.deepcopy((twin.state_dict(), optimizer.state_dict(), killed.state_dict()))
    train(twin, optimizer, 3, saved_at + 1)
    killed.close()

    twin.load_state_dict(checkpoint[0])
    optimizer = sgd(twin)
    optimizer.load_state_dict(checkpoint[1])
    resumed = PDiffRecorder(tmp_path / "parts", **settings)
    resumed.load_state_dict(json.loads(json.dumps(checkpoint[2])))
    with resumed.attach(twin, optimizer, total_steps=total):
        train(twin, optimizer, 12 - saved_at, saved_at + 1)

    whole, parts = SnapshotStore.open(tmp_path / "whole"), SnapshotStore.open(tmp_path / "parts")
    assert parts.trajectories == whole.trajectories
    assert parts.steps.tolist() == whole.steps.tolist() == list(range(5, 13))
    assert torch.equal(parts.rows(), whole.rows())


def test_state_can_be_loaded_after_attach_and_rolls_back(net, tmp_path):
    recorder = PDiffRecorder(tmp_path).attach(net)
    for _ in range(3):
        recorder.step()
    state = recorder.state_dict()
    assert len(SnapshotStore.open(tmp_path)) == 3
    for _ in range(3):
        recorder.step()
    recorder.load_state_dict(state)
    recorder.step()
    recorder.close()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3, 4]
    assert recorder.state_dict() == {"step": 4, "trajectory": "run-001", "store": str(tmp_path)}


def run_to(net, store, total, restored=None, **settings):
    """Record every step up to ``total``; the states after each."""
    recorder = PDiffRecorder(store, **settings)
    if restored is not None:
        recorder.load_state_dict(restored)
    recorder.attach(net, total_steps=total)
    states = []
    for _ in range(0 if restored is None else restored["step"], total):
        recorder.step()
        states.append(recorder.state_dict())
    recorder.close()
    return states


@pytest.mark.parametrize("name", [None, "a"])
def test_a_run_started_from_the_middle_of_a_finished_one_leaves_it_alone(net, tmp_path, caplog, name):
    states = run_to(net, tmp_path, 4, trajectory=name)
    run_to(net, tmp_path, 5, states[1], trajectory=name)
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == [name or "run-001", "run-002" if name is None else "run-001"]
    assert store.steps.tolist() == [1, 2, 3, 4, 3, 4, 5]
    assert "the run of this checkpoint (step 2) is left as it is and another is begun" in caplog.text
    assert "has since been recorded to its end at step 4" in caplog.text


def test_a_finished_run_is_continued_from_its_end(net, tmp_path, caplog):
    run_to(net, tmp_path, 7, run_to(net, tmp_path, 4)[-1])
    assert SnapshotStore.open(tmp_path).trajectories == ["run-001"]
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert caplog.text == ""


@pytest.mark.parametrize("loads_after_attach", [True, False])
def test_a_run_in_another_store_does_not_touch_that_of_its_checkpoint(net, tmp_path, caplog, loads_after_attach):
    with PDiffRecorder(tmp_path / "a").attach(net) as recorder:
        recorder.step()
        state = recorder.state_dict()
        recorder.step()
    run_to(net, tmp_path / "b", 3)
    recorder = PDiffRecorder()
    if not loads_after_attach:
        recorder.load_state_dict(state)
    recorder.attach(net, default_store=tmp_path / "b")
    if loads_after_attach:
        recorder.load_state_dict(state)
    recorder.step()
    recorder.close()
    assert SnapshotStore.open(tmp_path / "a").steps.tolist() == [1, 2]
    assert SnapshotStore.open(tmp_path / "b").trajectories == ["run-001", "run-002"]
    assert SnapshotStore.open(tmp_path / "b").steps.tolist() == [1, 2, 3, 2]
    assert f"it was recorded in another store, {tmp_path / 'a'}" in caplog.text


def test_a_store_that_was_moved_is_gone_on_in(net, tmp_path):
    with PDiffRecorder(tmp_path / "a").attach(net) as recorder:
        recorder.step()
        state = recorder.state_dict()
    (tmp_path / "a").rename(tmp_path / "b")
    recorder = PDiffRecorder()
    recorder.load_state_dict(state)
    with recorder.attach(net, default_store=tmp_path / "b"):
        recorder.step()
    assert SnapshotStore.open(tmp_path / "b").trajectories == ["run-001"]
    assert SnapshotStore.open(tmp_path / "b").steps.tolist() == [1, 2]


def test_each_run_without_a_name_is_a_trajectory_of_its_own(net, tmp_path):
    for _ in range(2):
        with PDiffRecorder(tmp_path).attach(net) as recorder:
            recorder.step()
    assert SnapshotStore.open(tmp_path).trajectories == ["run-001", "run-002"]


def test_a_named_trajectory_is_not_added_to_by_accident(net, train, tmp_path):
    for attempt in range(2):
        optimizer = sgd(net)
        with PDiffRecorder(tmp_path, trajectory="a").attach(net, optimizer):
            if attempt == 0:
                train(net, optimizer, 2)
            else:
                with pytest.raises(TrajectoryExistsError, match="already holds 2 snapshots"):
                    train(net, optimizer, 1)


def test_a_rank_that_writes_nothing_does_not_take_the_chunks_of_rank_0_for_those_of_another_run(
    net, tmp_path, monkeypatch
):
    with PDiffRecorder(tmp_path, trajectory="a").attach(net) as rank_0:
        rank_0.step()
        rank_0.state_dict()  # its first chunk is on disk
        monkeypatch.setattr("pdiff_plugin.recording.session._rank", lambda: 1)
        with PDiffRecorder(tmp_path, trajectory="a").attach(net) as rank_1:
            rank_1.step()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1]


def empty_as_zero_3_does(model):
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.data = number, torch.empty(0)


def test_a_model_that_deepspeed_has_emptied_is_refused(net, tmp_path):
    recorder = PDiffRecorder(tmp_path).attach(net)
    empty_as_zero_3_does(net)
    for begin in (recorder.step, lambda: PDiffRecorder(tmp_path).attach(net)):
        with pytest.raises(
            UnsupportedTensorError, match=r"'conv1.weight' is sharded by .* ZeRO-3; models are recorded"
        ):
            begin()
    recorder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_in_training", [True, False])
def test_closing_does_not_raise_about_a_tensor_that_is_gone(net, tmp_path, caplog, fails_in_training):
    recorder = PDiffRecorder(tmp_path, layers="head").attach(net)
    recorder.step()
    del net.fc.weight
    if fails_in_training:
        recorder.step()
    recorder.close()
    assert isinstance(recorder.error, KeyError)
    assert caplog.text.count("recording stopped, training goes on: 'weight'") == 1
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1]


def test_a_store_of_other_tensors_is_refused_at_attach(net, tmp_path):
    with PDiffRecorder(tmp_path, layers="head").attach(net) as recorder:
        recorder.step()
    with pytest.raises(
        LayoutMismatchError, match=r"tensor 'bn2.weight': the store .* recorded 'fc.weight' in its place"
    ):
        PDiffRecorder(tmp_path).attach(net)


def test_a_store_path_that_is_a_file_is_refused_at_attach(net, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreNotFoundError, match="it is a file"):
        PDiffRecorder(tmp_path / "file").attach(net)


def test_a_selection_of_nothing_is_refused_at_attach(net, tmp_path):
    with pytest.raises(SelectionError, match="Nearest names"):
        PDiffRecorder(tmp_path, layers="head2").attach(net)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"every_n_steps": 0}, "every_n_steps = 0: it must be at least 1."),
        ({"max_snapshots": 0}, "max_snapshots = 0: it must be at least 1."),
        ({"last_steps": -1}, "last_steps = -1: it must be at least 1."),
        (
            {"freeze_rest": True, "keep_newest": True},
            "freeze_rest = True: it needs to know where the window begins: leave keep_newest out.",
        ),
        (
            {"store": "s3://bucket/run"},
            "store = 's3://bucket/run': it must be a folder of this machine; copy it to the bucket after the run.",
        ),
        ({"dtype": "int8"}, "dtype = 'int8': it must be one of float64, float32, float16, bfloat16."),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, text):
    with pytest.raises(ConfigError) as caught:
        PDiffRecorder(**settings)
    assert str(caught.value) == text


def test_one_object_says_the_same_as_its_fields_and_fields_change_it():
    config = RecorderConfig(layers=["head"], last_steps=5)
    assert PDiffRecorder("a", config).settings() == PDiffRecorder("a", layers=["head"], last_steps=5).settings()
    assert PDiffRecorder("a", config, dtype="bfloat16").config == RecorderConfig(
        layers=("head",), last_steps=5, dtype="bfloat16"
    )
    with pytest.raises(TypeError, match="unexpected argument 'layer'; RecorderConfig has layers, every_n_steps"):
        PDiffRecorder(layer="head")


def test_the_tensors_are_selected_once_where_the_model_stays_the_same(net, train, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return select(*args, **kwargs)

    monkeypatch.setattr("pdiff_plugin.recording.session.select", counted)
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path, freeze_rest=True, last_steps=3).attach(net, optimizer, total_steps=4):
        train(net, optimizer, 4)
    assert len(calls) == 1
    assert len(SnapshotStore.open(tmp_path)) == 3


@pytest.mark.parametrize("change", ["replaced", "frozen"])
def test_tensors_that_change_between_attach_and_the_first_step_are_selected_anew(net, tmp_path, change):
    recorder = PDiffRecorder(tmp_path, layers=["bn3", "head"]).attach(net)
    if change == "frozen":
        net.bn3.requires_grad_(False)
    else:
        net.fc = nn.Linear(6, 2)
    recorder.step()
    recorder.close()
    layout = SnapshotStore.open(tmp_path).layout
    if change == "frozen":
        assert layout.names == ["fc.weight", "fc.bias"]
    else:
        assert {spec.name: spec.shape for spec in layout}["fc.weight"] == (2, 6)


def test_a_recorder_that_is_forgotten_ends_its_thread_and_keeps_its_rows(net, tmp_path):
    recorder = PDiffRecorder(tmp_path).attach(net)
    recorder.step()
    threads = [thread for thread in threading.enumerate() if thread.name == "pdiff-writer"]
    assert len(threads) == 1
    del recorder
    gc.collect()
    assert not threads[0].is_alive()
    assert SnapshotStore.open(tmp_path).steps.tolist() == [1]


def test_the_constructor_opens_no_file_and_takes_plain_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = PDiffRecorder(layers=["head", "norms"], last_steps=5)
    assert list(tmp_path.iterdir()) == []
    again = PDiffRecorder(**json.loads(json.dumps(recorder.settings())))
    assert again.settings() == recorder.settings()
    assert pickle.loads(pickle.dumps(recorder)).settings() == recorder.settings()


def test_the_settings_are_plain_json_for_a_tuple_and_a_function_too():
    settings = PDiffRecorder(layers=("norms", "head")).settings()
    assert settings == json.loads(json.dumps(settings))

    settings = PDiffRecorder(layers=lambda name, _: name == "fc.weight").settings()
    assert settings["layers"] == "<function <lambda>>"
    with pytest.raises(ConfigError, match="was a function, which settings in a checkpoint only name"):
        PDiffRecorder(**json.loads(json.dumps(settings)))


def test_the_default_store_is_in_the_working_folder(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with PDiffRecorder().attach(net) as recorder:
        recorder.step()
    assert len(SnapshotStore.open("pdiff-snapshots")) == 1


def test_training_that_ends_before_the_window_says_so_where_sparse_snapshots_are_switched_off(
    net, train, tmp_path, caplog
):
    optimizer = sgd(net)
    recorder = PDiffRecorder(tmp_path / "s", last_steps=3, keep_sparse=False)
    with recorder.attach(net, optimizer, total_steps=100):
        train(net, optimizer, 5)
    assert (
        "training ended at step 5 of the planned 100, and the recording window begins at step 98: no snapshot was "
        "taken. For training that may stop early, keep_newest=True keeps the newest 300 snapshots, wherever it ends."
    ) in caplog.text
    assert not (tmp_path / "s").exists()


def test_freeze_rest_trains_only_the_chosen_tensors_in_the_window_and_restores_everything(net, train, tmp_path):
    net.conv1.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    with PDiffRecorder(tmp_path, layers="bn3", freeze_rest=True, last_steps=3).attach(
        net, optimizer, total_steps=6
    ) as recorder:
        history = train(net, optimizer, 6)
    chosen = {"bn3.weight", "bn3.bias", "bn3.running_mean", "bn3.running_var"}
    for name in history[0]:
        if name.endswith("num_batches_tracked") or name == "conv1.bias":
            continue
        moved_before = not torch.equal(history[0][name], history[2][name])
        moved_inside = not torch.equal(history[2][name], history[5][name])
        assert moved_before, name
        assert moved_inside == (name in chosen), name
    assert recorder.rest_drift == 0.0
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert net.bn1.momentum == net.bn2.momentum == 0.1


def test_training_that_stops_early_leaves_the_newest_snapshots_where_they_are_asked_for(net, train, tmp_path, caplog):
    optimizer = sgd(net)
    with PDiffRecorder(tmp_path, last_steps=3, keep_newest=True).attach(net, optimizer, total_steps=100):
        history = train(net, optimizer, 5)
    assert_rows_equal_history(SnapshotStore.open(tmp_path), history, [3, 4, 5])
    assert caplog.text == ""


def test_freeze_rest_needs_a_known_length(net, tmp_path):
    with pytest.raises(ConfigError, match="needs to know where the window begins: pass total_steps"):
        PDiffRecorder(tmp_path, freeze_rest=True).attach(net)


def test_the_drift_of_the_rest_is_its_relative_change_over_the_window(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = nn.Sequential(nn.Conv2d(3, 70, (60, 60)).to(memory_format=torch.channels_last), nn.Linear(2, 2))
    recorder = PDiffRecorder(tmp_path, layers="head").attach(model, total_steps=3)
    recorder.step()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1.25)
    recorder.step()
    recorder.step()
    recorder.close()
    assert recorder.rest_drift == pytest.approx(0.25, rel=1e-3)
    assert "recorded 3 snapshots" in caplog.text
    assert "the rest of the network moved by 25.00% since step 1" in caplog.text


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_the_drift_of_the_rest_does_not_see_masks(tmp_path, masked):
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 3))
    model.register_buffer("mask", torch.full((300, 300), masked).triu(1))
    recorder = PDiffRecorder(tmp_path, layers="head").attach(model)
    recorder.step()
    with torch.no_grad():
        for tensor in [*model[0].parameters(), *model[1].parameters(), model[1].running_mean, model[1].running_var]:
            tensor.mul_(1.25)
    recorder.step()
    recorder.close()
    assert recorder.rest_drift == pytest.approx(0.25, rel=1e-3)


def test_half_precision_models_are_exact_and_rows_may_be_bfloat16(net, tmp_path):
    half = net.bfloat16()
    for dtype in ("float32", "bfloat16"):
        with PDiffRecorder(tmp_path / dtype, layers="all", dtype=dtype).attach(half) as recorder:
            recorder.step()
        state = SnapshotStore.open(tmp_path / dtype).state_dict(0)
        assert all(torch.equal(state[name], half.state_dict()[name]) for name in state)


def test_a_bfloat16_recorder_keeps_its_base_in_a_float32_store_too(net, tmp_path):
    for dtype in ("float32", "bfloat16"):
        with PDiffRecorder(tmp_path, layers="all", dtype=dtype).attach(net) as recorder:
            recorder.step()
    store = SnapshotStore.open(tmp_path)
    assert store.row_dtype == torch.float32
    assert recorder.rest_drift == 0.0
    assert torch.equal(store.base("run-002")["fc.weight"], net.fc.weight)


def test_tied_weights_are_stored_once_and_the_base_has_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with PDiffRecorder(tmp_path, layers="all").attach(model, total_steps=1) as recorder:
        recorder.step()
    store = SnapshotStore.open(tmp_path)
    assert store.layout.names == ["0.weight", "0.bias", "1.bias"]
    assert torch.equal(store.base()["1.weight"], model[0].weight)


def test_an_averaged_copy_can_be_recorded(net, train, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.requires_grad_(False)
    optimizer = sgd(net)
    recorder = PDiffRecorder(tmp_path, layers="head").attach(average.module, averaged=True)

    def after_step():
        average.update_parameters(net)
        recorder.step()

    train(net, optimizer, 3, after_step=after_step)
    recorder.close()
    store = SnapshotStore.open(tmp_path)
    assert store.layout.names == ["fc.weight", "fc.bias"]
    assert torch.equal(store.state_dict(2)["fc.weight"], average.module.fc.weight)


def test_an_error_inside_the_recorder_does_not_reach_the_training_step(net, train, tmp_path, monkeypatch, caplog):
    optimizer = sgd(net)

    def broken(*args, **kwargs):
        raise RuntimeError("a bug of ours")

    with PDiffRecorder(tmp_path).attach(net, optimizer) as recorder:
        train(net, optimizer, 2)
        monkeypatch.setattr("pdiff_plugin.recording.writer.BackgroundWriter.add", broken)
        train(net, optimizer, 3)
    assert caplog.text.count("recording stopped, training goes on: a bug of ours") == 1
    assert str(recorder.error) == "a bug of ours"
    assert len(SnapshotStore.open(tmp_path)) == 2


def test_close_can_be_called_twice_and_an_exception_passes_through(net, tmp_path):
    recorder = PDiffRecorder(tmp_path)

    def fail():
        recorder.step()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recorder.attach(net):
        fail()
    recorder.close()
    assert len(SnapshotStore.open(tmp_path)) == 1
