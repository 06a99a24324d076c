"""What every adapter owes its trainer, checked with the real trainer."""

import errno
import os
from pathlib import Path

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, SnapshotStore, fit
from pdiff_plugin.errors import ConditionError, ConfigError
from pdiff_plugin.snapshots import files

# The trainers' own warnings about themselves, each by its text.
IGNORED = {
    "lightning": [
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
        "ignore:The 'train_dataloader' does not have many workers",
        "ignore:Checkpoint directory .* exists and is not empty",
    ],
    "fastai": [
        "ignore:`torch.jit.script` is deprecated:FutureWarning",
        "ignore:The 'mode.chained_assignment' option is deprecated",
        "ignore:numpy.core is deprecated:DeprecationWarning",
    ],
    "keras": ["ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"],
}
# Composer pins an older torch than the others want: its environment is in docs/trainers/composer.md.
NAMES = ("lightning", "huggingface", "accelerate", "ignite", "fastai", "keras", "ray_train", "ray_tune", "composer")
TRAINERS = [
    pytest.param(name, marks=[pytest.mark.filterwarnings(text) for text in IGNORED.get(name, [])]) for name in NAMES
]


@pytest.fixture(params=TRAINERS)
def driver(request, load_driver):
    return load_driver(request.param)


def assert_recorded(folder, history, steps):
    store = SnapshotStore.open(folder / "pdiff-snapshots")
    assert store.problems == []
    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == steps
    for index, step in enumerate(steps):
        for name, tensor in store.state_dict(index).items():
            assert torch.equal(tensor, history[step - 1][name]), (step, name)
    return store


def test_every_adapter_is_under_contract():
    files = (Path(__file__).parents[2] / "integrations").glob("[!_]*.py")
    assert sorted(path.stem for path in files) == sorted(NAMES)


def test_the_default_records_each_step_of_the_last_epoch(driver, toolbox, tmp_path):
    job = toolbox.Job(tmp_path)
    driver.train(job)
    store = assert_recorded(tmp_path, job.history, [6, 7, 8, 9, 10])
    assert len([spec for spec in store.layout if spec.kind == "parameter"]) == 4
    assert len([spec for spec in store.layout if spec.kind == "buffer"]) == 4
    assert set(store.base()) == set(job.history[-1])


def test_gradient_accumulation_counts_optimizer_steps(driver, toolbox, tmp_path):
    job = toolbox.Job(tmp_path, num_batches=6, accumulate=2)
    driver.train(job)
    assert len(job.history) == 6
    assert_recorded(tmp_path, job.history, [4, 5, 6])


def test_training_ends_in_the_same_weights_and_random_state_as_without(driver, toolbox, tmp_path):
    ends = []
    for name, settings in (("without", None), ("with", {"layers": "all", "last_steps": 7})):
        torch.manual_seed(3)
        job = toolbox.Job(tmp_path / name, settings=settings)
        ends.append((driver.train(job), torch.get_rng_state()))
    (weights, rng), (weights2, rng2) = ends
    assert weights.keys() == weights2.keys()
    for name in weights:
        assert torch.equal(weights[name], weights2[name]), name
    assert torch.equal(rng, rng2)


def test_a_resumed_training_gives_the_store_of_an_uninterrupted_one(driver, toolbox, tmp_path):
    settings = {"last_steps": 7, "condition": {"angle": 45.0}}
    whole = toolbox.Job(tmp_path / "whole", settings=settings)
    driver.train(whole)

    with pytest.raises(ValueError, match="raised in training"):
        driver.train(toolbox.Job(tmp_path / "parts", settings=settings, save=True, fail_at=7))
    driver.train(toolbox.Job(tmp_path / "parts", settings=settings, resume=True))

    for name in ("whole", "parts"):
        store = assert_recorded(tmp_path / name, whole.history, [4, 5, 6, 7, 8, 9, 10])
        assert store.conditions == {"run-001": {"angle": 45.0}}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_is_not_swallowed_and_leaves_a_readable_store(driver, toolbox, tmp_path, error):
    job = toolbox.Job(tmp_path, settings={"last_steps": 10}, fail_at=7, error=error)
    expected = (KeyboardInterrupt, SystemExit) if error is KeyboardInterrupt else ValueError
    with pytest.raises(expected):
        driver.train(job)
    assert len(job.history) == 7
    # The step that raised may or may not have reached the recorder first.
    num_rows = len(SnapshotStore.open(tmp_path / "pdiff-snapshots"))
    assert_recorded(tmp_path, job.history, [1, 2, 3, 4, 5, 6, 7][:num_rows])
    assert num_rows >= 6


def test_an_exception_before_the_window_leaves_what_was_recorded_sparsely(driver, toolbox, tmp_path):
    job = toolbox.Job(tmp_path, settings={"last_steps": 2}, fail_at=7)
    with pytest.raises(ValueError, match="raised in training"):
        driver.train(job)
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert_recorded(tmp_path, job.history, [1, 5])
    assert store.sparse["run-001"].total_steps == 10


def test_a_full_disk_leaves_training_untouched(driver, toolbox, tmp_path, monkeypatch, caplog):
    without = driver.train(toolbox.Job(tmp_path / "without", settings=None))
    fsync, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr("pdiff_plugin.recording.writer.CHUNK_ROWS", 2)
    monkeypatch.setattr(files.os, "fsync", full)
    job = toolbox.Job(tmp_path / "with", settings={"last_steps": 10})
    weights = driver.train(job)
    monkeypatch.undo()
    assert all(torch.equal(weights[name], without[name]) for name in without)
    (told,) = [r.message for r in caplog.records if r.name.startswith("pdiff_plugin")]
    assert told.startswith("recording stopped, training goes on; snapshots written so far stay readable: ")
    assert "chunk-000003.safetensors cannot be written: the disk is full" in told
    assert_recorded(tmp_path / "with", job.history, [1, 2, 3, 4])


def test_the_condition_ends_up_in_the_store(driver, toolbox, tmp_path):
    condition = {"angle": 45.0, "style": "ink", "on": True, "user": torch.tensor([0.5, 1.0])}
    job = toolbox.Job(tmp_path, settings={"condition": condition})
    driver.train(job)
    store = assert_recorded(tmp_path, job.history, [6, 7, 8, 9, 10])
    assert store.conditions == {"run-001": {"angle": 45.0, "style": "ink", "on": True, "user": [0.5, 1.0]}}


@pytest.mark.parametrize("condition", ["hparams", ["lr"]])
def test_names_that_a_trainer_cannot_look_up_are_refused_before_training(driver, toolbox, tmp_path, condition):
    job = toolbox.Job(tmp_path, settings={"condition": condition})
    with pytest.raises(
        ConfigError, match=r"condition = .*(must be a dict|hparams of the module|trial of a search|'s config)"
    ):
        driver.train(job)
    assert job.history == []


def test_a_training_that_is_resumed_at_another_condition_is_refused(driver, toolbox, tmp_path):
    if driver.__name__ == "drivers_ray_tune":
        pytest.skip("schedulers of Tune change the condition: a trajectory of its own is begun, see test_ray_tune.py")
    settings = {"last_steps": 7, "condition": {"angle": 45.0}}
    with pytest.raises(ValueError, match="raised in training"):
        driver.train(toolbox.Job(tmp_path, settings=settings, save=True, fail_at=7))
    again = {**settings, "condition": {"angle": 90.0}}
    with pytest.raises(ConditionError, match=r"found {'angle': 90.0}, expected {'angle': 45.0}, that of run-001"):
        driver.train(toolbox.Job(tmp_path, settings=again, resume=True))


def test_a_generator_can_be_fitted_to_the_store(driver, toolbox, tmp_path):
    driver.train(toolbox.Job(tmp_path, epochs=6, settings={"last_epochs": 6}))
    config = FitConfig(diffusion=DiffusionConfig(max_steps=20, width=16, num_blocks=1), device="cpu")
    generator = fit(tmp_path / "pdiff-snapshots", config, out=tmp_path / "fit")
    assert generator.sample(2).num_members == 2
