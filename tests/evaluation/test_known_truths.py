"""Stores and generated members of known truth, each with the verdict that it has to get; `pytest -m slow -s` prints it.

Digits, 64-32-10 networks. A noisy run trains on 400 of them in batches of 16 at a high rate; a run on a line has learnt
its 150 by heart and drifts, all of them in every step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pdiff_plugin.config import DiffusionConfig, FitConfig
from pdiff_plugin.evaluation.baselines import BASELINES, average, gaussian, rng_for
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.result import Evaluation
from pdiff_plugin.evaluation.rows import SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.movement import movement
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

from .conftest import digits

pytestmark = pytest.mark.slow
M = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: on ``num_train`` digits, ``num_warmup`` steps before the recorded ones."""

    num_train: int
    batch: int | None
    lr: float
    num_warmup: int

    def train(self, seed: int, num_recorded: int) -> tuple[nn.Module, Tensor, Layout]:
        x, y = digits()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr)
        rng = torch.Generator().manual_seed(seed)
        layout = Layout.from_tensors(named_tensors(model))
        rows = []
        for step in range(self.num_warmup + num_recorded):
            pick = (
                slice(self.num_train)
                if self.batch is None
                else torch.randint(self.num_train, (self.batch,), generator=rng)
            )
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
            optimizer.step()
            if step >= self.num_warmup:
                rows.append(layout.flatten(named_tensors(model)))
        return model, torch.stack(rows), layout


NOISY = Recipe(num_train=400, batch=16, lr=2e-2, num_warmup=100)
LINE = Recipe(num_train=150, batch=None, lr=1e-2, num_warmup=300)


@dataclasses.dataclass(frozen=True)
class Place:
    """A store and the task that its snapshots are for."""

    task: Task
    store: SnapshotStore
    recipe: Recipe
    model: nn.Module

    @classmethod
    def make(cls, path: Path, recipe: Recipe, num_runs: int, num_snapshots: int) -> Place:
        for seed in range(num_runs):
            model, rows, layout = recipe.train(seed, num_snapshots)
            TrajectoryWriter(path, layout).write_chunk(rows, range(1, num_snapshots + 1))
        x, y = digits()
        return cls(
            Task(model, [(x[recipe.num_train :], y[recipe.num_train :])]), SnapshotStore.open(path), recipe, model
        )

    @property
    def rows(self) -> SnapshotRows:
        return SnapshotRows.measure(self.store)

    def judged(self, generated: WeightGenerator | WeightSet) -> Evaluation:
        return evaluate(self.task, self.store, generated, num_members=M)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("noisy") / "store", NOISY, 1, 100)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A noisy run that no longer gets better."""
    return Place.make(tmp_path_factory.mktemp("settled") / "store", dataclasses.replace(NOISY, num_warmup=600), 1, 100)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("line") / "store", LINE, 1, 100)


@pytest.fixture(scope="module")
def four_noisy(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("four") / "store", NOISY, 4, 60)


@pytest.fixture(scope="module")
def four_lines(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("lines") / "store", LINE, 4, 60)


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fitted(place: Place) -> WeightGenerator:
    return fit(place.store.path, FitConfig(diffusion=DiffusionConfig(max_steps=800, width=64)))


def repeats(place: Place, noise: float = 0.0) -> WeightSet:
    members = place.rows.members(evenly_spaced(len(place.store), M))
    rng = torch.Generator().manual_seed(5)
    return WeightSet({k: t * (1 + noise * torch.randn(t.shape, generator=rng)) for k, t in members.items()})


def averages(place: Place, k: int = 16) -> WeightSet:
    return average(place.rows, M, rng_for(5, "averages"), k=k).made(place.rows)


def gaussians(place: Place) -> WeightSet:
    return gaussian(place.rows, M, rng_for(5, "gaussians")).made(place.rows)


def swags(place: Place) -> WeightSet:
    return BASELINES["swag"].draw(place.rows, M, rng_for(5, "swag")).made(place.rows)


def independent(place: Place) -> WeightSet:
    as_long = dataclasses.replace(place.recipe, num_warmup=place.recipe.num_warmup + len(place.store) - 1)
    rows = [as_long.train(100 + seed, 1)[1][0] for seed in range(32)]
    return WeightSet.from_flat(torch.stack(rows), place.store.layout)


def random_networks(place: Place) -> WeightSet:
    untrained = dataclasses.replace(place.recipe, num_warmup=0, lr=1e-6)
    rows = [untrained.train(100 + seed, 1)[1][0] for seed in range(M)]
    return WeightSet.from_flat(torch.stack(rows), place.store.layout)


def later_checkpoints(place: Place) -> WeightSet:
    later = dataclasses.replace(place.recipe, num_warmup=place.recipe.num_warmup + len(place.store))
    return WeightSet.from_flat(later.train(0, M)[1], place.store.layout)


def with_nan(place: Place) -> WeightSet:
    members = averages(place)
    members["0.weight"][3, 2, 1] = float("nan")
    members["2.bias"][7, 0] = float("inf")
    return members


def on_forty_items(place: Place) -> Place:
    (x, y) = next(iter(place.task.eval_loader))
    return dataclasses.replace(place, task=Task(place.model, [(x[:40], y[:40])]))


# What was made of which store, and what is true of it.
TRUTHS: dict[str, tuple[str, Callable[[Place], WeightGenerator | WeightSet], str]] = {
    "one noisy run, fit": ("noisy", fitted, "no better than averaging"),
    "one run on a line, fit": ("line", fitted, "snapshots hardly differ"),
    "four noisy runs, fit": ("four_noisy", fitted, "no better than averaging"),
    # The four networks differ, and the table says what their ensemble gains; but each stood still while it was
    # recorded, so that a generator has nothing to add to the last snapshots of the four, and no generator can be
    # blamed for it. "No better than averaging" would be true as well, and would leave the user without the reason.
    "four runs on a line each, fit": ("four_lines", fitted, "snapshots hardly differ"),
    "repeats of snapshots": ("noisy", repeats, "copies the snapshots"),
    "repeats with 1e-4 noise": ("noisy", partial(repeats, noise=1e-4), "copies the snapshots"),
    "averages as generated": ("noisy", averages, "no better than averaging"),
    "Gaussians as generated": ("noisy", gaussians, "no better than averaging"),
    "independent networks beside one run": ("noisy", independent, "worth it"),
    "random networks": ("noisy", random_networks, "no better than averaging"),
    "forty items": ("forty", averages, "too few data to tell"),
    "NaN members": ("noisy", with_nan, "no better than averaging"),
    # Beyond the twelve: what an outcome of its own for a line must not hide.
    "repeats on a line": ("line", repeats, "copies the snapshots"),
    "averages on a line": ("line", averages, "snapshots hardly differ"),
    "Gaussians on a line": ("line", gaussians, "snapshots hardly differ"),
    "averages of 4 on four lines": ("four_lines", partial(averages, k=4), "no better than averaging"),
    "independent networks beside a line": ("line", independent, "worth it"),
    "random networks beside a line": ("line", random_networks, "no better than averaging"),
    "later checkpoints of a noisy run": ("settled", later_checkpoints, "no better than averaging"),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_verdict_is_what_is_true(name: str, request: pytest.FixtureRequest) -> None:
    where, make, expected = TRUTHS[name]
    place = on_forty_items(request.getfixturevalue("noisy")) if where == "forty" else request.getfixturevalue(where)
    started = time.perf_counter()
    result = place.judged(make(place))
    print(
        f"\n{name:36s} {result.verdict.outcome:26s} {time.perf_counter() - started:5.1f} s  {result.verdict.sentence}"
    )
    assert result.verdict.outcome == expected
    assert result.details["num_left_out"] == ({"generated": 2} if name == "NaN members" else {})
    assert ("2 of 64 of the generated members" in result.verdict.sentence) == (name == "NaN members")


def test_the_stores_are_what_they_are_said_to_be(
    noisy: Place, line: Place, four_noisy: Place, four_lines: Place
) -> None:
    for place, is_line in ((noisy, False), (line, True), (four_noisy, False), (four_lines, True)):
        found = movement(place.rows.statistics.gram, place.rows.trajectory)
        assert found is not None
        assert found.is_line == is_line
