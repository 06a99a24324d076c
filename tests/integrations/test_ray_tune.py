"""Trials of Ray Tune, each run as Tune does, but in this process; tests/cluster/test_sweep.py has a whole sweep."""

import json
import math

import pytest
import torch

from pdiff_plugin import PDiffRecorder as CoreRecorder
from pdiff_plugin import SnapshotStore
from pdiff_plugin.cli import main
from pdiff_plugin.errors import ConfigError

tune = pytest.importorskip("ray.tune")
from pdiff_plugin.integrations.ray_tune import PDiffRecorder  # noqa: E402

STEPS = 40  # of an epoch
EPOCHS = 4


def steps_of(first, last):
    """Optimizer steps of these epochs, counted from 1."""
    return list(range((first - 1) * STEPS + 1, last * STEPS + 1))


@pytest.fixture
def run_trial(load_driver):
    return load_driver("ray_tune").run_trial


@pytest.fixture
def make_trial(toolbox):
    """A function to train a trial with: settings of the recorder, whether its counters are kept in checkpoints."""

    def make(path, *, keeps_counters=True, net=toolbox.make_net, **settings):
        def train(config):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=config.get("lr", 0.1))
            recorder, first = PDiffRecorder(**settings), 0
            if (checkpoint := tune.get_checkpoint()) is not None:
                state = torch.load(f"{checkpoint.path}/state.pt", weights_only=True)
                model.load_state_dict(state["model"])
                first = state["epoch"] + 1
                if "recorder" in state:
                    recorder.load_state_dict(state["recorder"])
            ends = {"total_steps": EPOCHS * STEPS, "steps_per_epoch": STEPS}
            with recorder.attach(model, optimizer, config=config, **ends):
                for epoch in range(first, EPOCHS):
                    for _ in range(STEPS):
                        optimizer.zero_grad()
                        model(torch.ones(4, 64)).square().mean().backward()
                        optimizer.step()
                    state = {"model": model.state_dict(), "epoch": epoch}
                    if keeps_counters:
                        state["recorder"] = recorder.state_dict()
                    folder = path / f"checkpoint-{epoch}"
                    folder.mkdir(parents=True, exist_ok=True)
                    torch.save(state, folder / "state.pt")
                    tune.report({"epoch": epoch})

        return train

    return make


def checkpoint_of(path, epoch):
    class Result:  # what Tune hands over
        checkpoint = tune.Checkpoint(str(path / f"checkpoint-{epoch}"))

    return Result


def trajectories(folder):
    store = SnapshotStore.open(folder / "pdiff-snapshots")
    index = store.trajectory_index
    return {name: store.steps[index == number].tolist() for number, name in enumerate(store.trajectories)}


def test_a_trial_is_a_trajectory_with_its_id_in_its_own_folder(run_trial, make_trial, tmp_path):
    train = make_trial(tmp_path, condition=["lr", "angle"])
    config = {"lr": 0.1, "angle": 45, "unused": None}
    folders = [run_trial(train, tmp_path, {**config, "angle": a}, trial=f"abc_0000{a}") for a in (1, 2)]
    assert [folder.parent for folder in folders] == [tmp_path / "sweep"] * 2
    for number, folder in enumerate(folders, start=1):
        store = SnapshotStore.open(folder / "pdiff-snapshots")
        assert trajectories(folder) == {f"abc_0000{number}": steps_of(4, 4)}
        assert store.conditions == {f"abc_0000{number}": {"lr": 0.1, "angle": number}}
        assert store.stopped_early == {}


def test_hparams_are_what_of_the_config_can_be_in_a_condition(run_trial, make_trial, tmp_path):
    config = {"lr": 0.1, "name": "ink", "loss": torch.relu, "nested": {"a": 1}, "none": None, "nan": math.nan}
    folder = run_trial(make_trial(tmp_path, condition="hparams"), tmp_path, config, trial="t")
    assert SnapshotStore.open(folder / "pdiff-snapshots").conditions == {"t": {"lr": 0.1, "name": "ink"}}


def test_a_name_that_the_config_does_not_have_is_refused_before_training(run_trial, make_trial, tmp_path):
    with pytest.raises(ConfigError, match=r"names 'angle', which the trial's config, attach\(config=config\) does not"):
        run_trial(make_trial(tmp_path, condition=["angle"]), tmp_path, {"lr": 0.1})
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_was_recorded_is_on_disk_before_a_scheduler_can_end_the_trial(
    run_trial, make_trial, tmp_path, monkeypatch
):
    # As the process is killed before the recorder can be closed.
    monkeypatch.setattr(CoreRecorder, "close", lambda self: None)
    train = make_trial(tmp_path, keeps_counters=False, last_epochs=3)
    folder = run_trial(train, tmp_path, stop_after=2, trial="t")
    assert trajectories(folder) == {"t": steps_of(2, 2)}
    monkeypatch.undo()


def test_of_two_recorders_of_a_trial_both_are_on_disk(run_trial, toolbox, tmp_path, monkeypatch):
    kept = []

    def train(config):
        for net in (toolbox.make_net(), torch.nn.Linear(64, 3)):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            kept.append(PDiffRecorder(layers="all").attach(net, optimizer))
            net(torch.ones(4, 64)).sum().backward()
            optimizer.step()
        tune.report({"a": 1})

    folder = run_trial(train, tmp_path, stop_after=1, trial="t")  # nobody closes them
    assert trajectories(folder) == {"t": [1]}
    assert SnapshotStore.open(folder / "pdiff-snapshots-2").steps.tolist() == [1]
    for recorder in kept:
        recorder.close()


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"last_epochs": 3}, 120),
        ({"last_epochs": 3, "every_n_steps": 3}, 118),
        ({"keep_newest": True, "every_n_steps": 8}, 120),
    ],
)
def test_a_trial_stopped_in_its_window_is_told_from_one_that_got_to_its_end(
    run_trial, make_trial, tmp_path, settings, last, capsys
):
    stopped = run_trial(make_trial(tmp_path, **settings), tmp_path, stop_after=3, trial="stopped")
    ended = run_trial(make_trial(tmp_path, **settings), tmp_path, trial="ended")
    assert SnapshotStore.open(stopped / "pdiff-snapshots").stopped_early == {"stopped": 160}
    assert SnapshotStore.open(ended / "pdiff-snapshots").stopped_early == {}
    main(["inspect", str(stopped / "pdiff-snapshots")])
    assert f"..{last} of 160" in capsys.readouterr().out
    main(["inspect", str(stopped / "pdiff-snapshots"), "--json"])
    (document,) = json.loads(capsys.readouterr().out)["trajectories"]
    assert (document["stopped_early"], document["planned_last_step"]) == (True, 160)
    main(["inspect", str(ended / "pdiff-snapshots")])
    assert " of 160" not in capsys.readouterr().out


def test_a_trial_stopped_before_its_window_keeps_what_was_taken_sparsely(run_trial, make_trial, tmp_path):
    folder = run_trial(make_trial(tmp_path), tmp_path, stop_after=2, trial="t")
    store = SnapshotStore.open(folder / "pdiff-snapshots")
    assert store.sparse["t"].total_steps == 160
    assert store.stopped_early == {"t": 160}
    assert store.steps[-1] == 79


def test_a_trial_that_was_paused_goes_on_in_its_trajectory(run_trial, make_trial, tmp_path, caplog):
    train = make_trial(tmp_path, last_epochs=3, condition="hparams")
    run_trial(train, tmp_path, {"lr": 0.1}, stop_after=2, trial="t")
    folder = run_trial(train, tmp_path, {"lr": 0.1}, checkpoint=checkpoint_of(tmp_path, 1), trial="t")
    assert trajectories(folder) == {"t": steps_of(2, 4)}
    assert "new trajectory" not in caplog.text


def test_a_trial_that_goes_on_from_another_begins_a_trajectory_with_its_new_condition(
    run_trial, make_trial, tmp_path, caplog
):
    train = make_trial(tmp_path, last_epochs=3, condition="hparams")
    other = run_trial(train, tmp_path, {"lr": 0.1}, stop_after=2, trial="other")
    run_trial(make_trial(tmp_path / "own", last_epochs=3, condition="hparams"), tmp_path, {"lr": 0.2}, stop_after=2)
    folder = run_trial(train, tmp_path, {"lr": 0.4}, checkpoint=checkpoint_of(tmp_path, 1))
    assert trajectories(folder) == {"run-001": steps_of(2, 2), "run-001-2": steps_of(3, 4)}
    store = SnapshotStore.open(folder / "pdiff-snapshots")
    assert store.conditions == {"run-001": {"lr": 0.2}, "run-001-2": {"lr": 0.4}}
    assert store.stopped_early == {"run-001": 160}
    assert trajectories(other) == {"other": steps_of(2, 2)}
    (told,) = [record.message for record in caplog.records if "new trajectory" in record.message]
    expected = "trial run-001 goes on from a checkpoint in a new trajectory, run-001-2: it is of step 80 of other"
    assert told == expected


def test_a_trial_that_goes_on_from_its_own_checkpoint_with_another_condition_begins_one_too(
    run_trial, make_trial, tmp_path, caplog
):
    train = make_trial(tmp_path, last_epochs=3, condition="hparams")
    run_trial(train, tmp_path, {"lr": 0.1}, stop_after=2, trial="t")
    folder = run_trial(train, tmp_path, {"lr": 0.4}, checkpoint=checkpoint_of(tmp_path, 1), trial="t")
    assert trajectories(folder) == {"t": steps_of(2, 2), "t-2": steps_of(3, 4)}
    assert "t-2: the condition is now {'lr': 0.4}, and that of t is {'lr': 0.1}" in caplog.text
    again = run_trial(train, tmp_path, {"lr": 0.4}, checkpoint=checkpoint_of(tmp_path, 2), trial="t")
    assert list(trajectories(again)) == ["t", "t-2", "t-3"]
    assert "t-3: t-2 has since been recorded to its end at step 160" in caplog.text


def test_a_checkpoint_without_the_counters_begins_a_trajectory_and_says_so(run_trial, make_trial, tmp_path, caplog):
    train = make_trial(tmp_path, keeps_counters=False, last_epochs=3)
    run_trial(train, tmp_path, stop_after=2, trial="t")
    folder = run_trial(train, tmp_path, checkpoint=checkpoint_of(tmp_path, 1), trial="t")
    found = trajectories(folder)
    assert found == {"t": steps_of(2, 2), "t-2": steps_of(2, 2)}
    assert "t-2: steps are counted from here on, since the recorder's state_dict() is not kept in it" in caplog.text


def test_a_trial_that_starts_again_replaces_nothing_but_what_did_not_get_to_its_window(
    run_trial, make_trial, tmp_path, caplog
):
    train = make_trial(tmp_path, last_epochs=2)
    run_trial(train, tmp_path, stop_after=1, trial="t")
    folder = run_trial(train, tmp_path, stop_after=3, trial="t")
    assert trajectories(folder) == {"t": steps_of(3, 3)}
    assert "snapshots of an unfinished run" in caplog.text
    run_trial(train, tmp_path, trial="t")
    assert trajectories(folder) == {"t": steps_of(3, 3), "t-2": steps_of(3, 4)}


def test_a_relative_store_is_below_the_trial_and_names_go_before_its_id(run_trial, make_trial, tmp_path):
    folder = run_trial(make_trial(tmp_path, store="rows", trajectory="mlp"), tmp_path, trial="t")
    assert SnapshotStore.open(folder / "rows").trajectories == ["mlp-t"]


def test_where_the_storage_path_is_a_bucket_the_log_says_where_snapshots_are(run_trial, make_trial, tmp_path, caplog):
    run_trial(make_trial(tmp_path), tmp_path, trial="t", bucket="mock:///bucket")
    folder = tmp_path / "session" / "working_dirs" / "trial_t"
    assert trajectories(folder) == {"t": steps_of(4, 4)}
    assert f"is no file system of this machine: its snapshots are in {folder}" in caplog.text


def test_a_store_that_cannot_be_used_costs_the_recording_and_not_the_trial(run_trial, make_trial, tmp_path, caplog):
    store = str(tmp_path / "shared")
    run_trial(make_trial(tmp_path, store=store), tmp_path, trial="one")
    other = make_trial(tmp_path / "two", store=store, net=lambda: torch.nn.Linear(64, 3), layers="all")
    run_trial(other, tmp_path, trial="two")
    assert (tmp_path / "two" / "checkpoint-3").is_dir()
    assert "this trial is not recorded, and goes on: " in caplog.text
    assert SnapshotStore.open(store).trajectories == ["one"]


def test_outside_of_a_sweep_it_records_as_in_a_loop_of_ones_own(toolbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = toolbox.make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="is meant to only be called inside a function that is executed by a Tuner"):
        recorder = PDiffRecorder(condition=["lr"]).attach(net, optimizer, config={"lr": 0.1})
    with recorder:
        net(torch.ones(4, 64)).sum().backward()
        optimizer.step()
    store = SnapshotStore.open("pdiff-snapshots")
    assert store.conditions == {"run-001": {"lr": 0.1}}
