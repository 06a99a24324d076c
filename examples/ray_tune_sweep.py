"""A search by Ray Tune that leaves a dial: twelve trials, ASHA, one generator for all the settings in between.

Every trial trains the same network on scikit-learn's digits at its own learning rate and label smoothing, and records
itself into a store in its own folder. ASHA stops those that lag behind; these are marked. The stores are merged, a
generator is fitted to the trials that got to their end, and makes weights for a setting that nobody tried.

Killed at any moment, it goes on when called again: trials that were being trained from their last checkpoint, recorded
without a gap.

    python examples/ray_tune_sweep.py --out sweep            # about two minutes on two CPU cores
    python examples/ray_tune_sweep.py --out sweep --smoke    # a minute, figures mean nothing
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pdiff_plugin import ConditionConfig, DiffusionConfig, FitConfig, SnapshotStore, fit, merge_stores, swapped
from pdiff_plugin.integrations.ray_tune import PDiffRecorder

NUM_TRIALS, NUM_EPOCHS, EPOCHS_RECORDED, BATCH_SIZE = 12, 8, 5, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tune-sweep"), help="folder of everything that is made")
    parser.add_argument("--smoke", action="store_true", help="run everything, but briefly")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    diffusion = DiffusionConfig(max_steps=50 if arguments.smoke else 2000, eval_every_n_steps=25)

    results = search(out)
    for result in results:
        found = result.metrics
        epochs = f"{found['training_iteration']} of {NUM_EPOCHS} epochs"
        print(f"trial {found['trial_id']} took {epochs}: loss {found['loss']:.3f} on held-out digits")

    merge_stores([f"{out}/trials/sweep/*/pdiff-snapshots"], out / "store")
    store = SnapshotStore.open(out / "store")
    ended = store.only([name for name in store.trajectories if name not in store.stopped_early])
    print(f"{len(ended.trajectories)} trajectories got to their end; stopped early: {', '.join(store.stopped_early)}")

    config = FitConfig(diffusion=diffusion, condition=ConditionConfig(kinds=("lr:log",)))
    generator = fit(ended, config, out=out / "fit")
    untried = {name: median(run[name] for run in ended.conditions.values()) for name in ("lr", "smoothing")}
    model, (_, test) = make_model(), data()
    losses = []
    for member in generator.sample_members(8, condition=untried):
        with swapped(model, member):
            losses.append(loss_of(model, *test))
    print(f"{len(losses)} members at {untried}: loss {sum(losses) / len(losses):.3f} on held-out digits")


def search(out: Path) -> tune.ResultGrid:
    """Train the trials, two at a time; those of an interrupted call are gone on with."""
    ray.init(address="local", num_cpus=2, object_store_memory=150 << 20, include_dashboard=False, logging_level="ERROR")
    trainable = tune.with_parameters(train, start=starting_weights())
    space = {"lr": tune.loguniform(0.005, 0.2), "smoothing": tune.uniform(0.0, 0.3)}
    path = out / "trials" / "sweep"
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(str(path), trainable, resume_errored=True, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                num_samples=NUM_TRIALS,
                max_concurrent_trials=2,
                # Most of the trials get to their end: a dial needs six of them, and better more.
                scheduler=ASHAScheduler(max_t=NUM_EPOCHS, grace_period=5, reduction_factor=1.6),
                search_alg=BasicVariantGenerator(random_state=0),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name=path.name, storage_path=str(path.parent), verbose=1),
        )
    results = tuner.fit()
    ray.shutdown()
    return results


def train(config: dict[str, Any], start: dict[str, Tensor]) -> None:
    """One trial."""
    (x, y), test = data()
    model = make_model()
    model.load_state_dict(start)  # all of them: weights of independent starts cannot be interpolated
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    recorder = PDiffRecorder(layers="all", condition=["lr", "smoothing"], last_epochs=EPOCHS_RECORDED)

    first_epoch = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        recorder.load_state_dict(state["recorder"])
        first_epoch = state["epoch"] + 1

    steps_per_epoch = len(x) // BATCH_SIZE
    ends = {"total_steps": NUM_EPOCHS * steps_per_epoch, "steps_per_epoch": steps_per_epoch}
    with recorder.attach(model, optimizer, config=config, **ends):
        for epoch in range(first_epoch, NUM_EPOCHS):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
            for batch in order.split(BATCH_SIZE):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch], label_smoothing=config["smoothing"]).backward()
                optimizer.step()
            with tempfile.TemporaryDirectory() as folder:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save({**state, "recorder": recorder.state_dict()}, Path(folder) / "state.pt")
                loss = loss_of(model, *test)
                tune.report({"loss": loss}, checkpoint=tune.Checkpoint.from_directory(folder))


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def starting_weights() -> dict[str, Tensor]:
    """A short training that all trials go on from."""
    torch.manual_seed(0)
    (x, y), _ = data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    loss = F.cross_entropy(model(x), y).item()
    model.train()
    return loss


if __name__ == "__main__":
    main()
