"""A sweep by Ray Tune whose driver is killed, as examples/ray_tune_sweep.py has it: nothing of any trial is lost."""

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

from pdiff_plugin import SnapshotStore, WeightGenerator

from .processes import Process

pytest.importorskip("ray.tune")

ROOT = Path(__file__).parents[2]
WINDOW = list(range(121, 321))  # the last five of eight epochs of 40 steps


def start(out, temporary):
    command = [sys.executable, str(ROOT / "examples" / "ray_tune_sweep.py"), "--out", str(out), "--smoke"]
    # A socket's path has at most 107 characters.
    return Process(command, 200.0, PYTHONPATH=str(ROOT), HOME=str(temporary), RAY_TMPDIR=str(temporary))


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_becomes_a_dial_of_all_trials(tmp_path):
    trials = tmp_path / "trials" / "sweep"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as temporary:
        killed = start(tmp_path, temporary)
        killed.wait_until(lambda: len({path.parent for path in trials.glob("*/checkpoint_*")}) >= 5, "a fifth trial")
        killed.kill()
        assert "took" not in killed.text  # it was in the middle

        again = start(tmp_path, temporary)
        assert again.finish() == 0, again.text

    epochs = {name: int(number) for name, number in re.findall(r"trial (\w+) took (\d) of 8 epochs", again.text)}
    assert len(epochs) == 12
    store = SnapshotStore.open(tmp_path / "store")
    assert store.problems == []
    configs = {
        next(name for name in epochs if name in path.parent.name): json.loads(path.read_text())
        for path in trials.glob("*/params.json")
    }
    for trial, number in epochs.items():
        # A trial that was over before Tune had noted it is trained once more, and recorded beside what there is.
        own = [name for name in store.trajectories if name.partition("-")[0] == trial]
        ended = [name for name in own if name not in store.stopped_early]
        assert bool(ended) == (number == 8), (trial, number, own)
        for name in own:
            assert store.conditions[name] == configs[trial]
        for name in ended:
            assert store.steps[store.trajectory_index == store.trajectories.index(name)].tolist() == WINDOW
    assert 0 < list(epochs.values()).count(8) < 12
    assert "8 members at {'lr':" in again.text
    assert len(WeightGenerator.load(tmp_path / "fit").trajectories) >= list(epochs.values()).count(8)


def train_in_a_trial(config):
    import ray.train.torch
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    def loop(config):
        import torch

        from pdiff_plugin.integrations.ray_train import PDiffRecorder

        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
        recorder = PDiffRecorder(layers="all", condition=["lr"])
        with recorder.attach(model, optimizer, config=config, total_steps=20):
            for _ in range(20):
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
        ray.train.report({"loss": config["lr"]})

    trial = tune.get_context().get_trial_id()
    ray.train.torch.TorchTrainer(
        loop,
        train_loop_config={"lr": config["lr"]},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(
            name=f"train-{trial}", storage_path=config["out"], callbacks=[TuneReportCallback()]
        ),
    ).fit()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(is deprecated|will be deprecated).*:DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_train_in_trials_of_ray_tune_leaves_a_store_each(local_ray, tmp_path):
    from ray import tune

    results = tune.Tuner(
        tune.with_resources(train_in_a_trial, {"cpu": 0.5}),
        param_space={"lr": tune.grid_search([0.1, 0.2]), "out": str(tmp_path)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="sweep", storage_path=str(tmp_path)),
    ).fit()
    assert results.num_errors == 0
    for result in results:
        store = SnapshotStore.open(tmp_path / f"train-{result.metrics['trial_id']}" / "pdiff-snapshots")
        assert store.conditions == {"run-001": {"lr": result.config["lr"]}}
        assert store.steps.tolist() == list(range(1, 21))
