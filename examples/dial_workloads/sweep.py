"""What all sweeps share: one base model, one short training per condition, and what they are judged by.

    FOLDER/base.pt      the model that every run of the sweep starts from, trained once
    FOLDER/store/       one trajectory per condition, recorded by PDiffRecorder in a plain training loop
    FOLDER/seconds.json what the recording took

A killed recording goes on from the first condition that is not complete.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload_data import Split, loader

from pdiff_plugin import PDiffRecorder, SnapshotStore, SubspaceConfig, Task, WeightGenerator, WeightSet

Condition = dict[str, Any]
ExtraRow = Callable[[Condition], WeightSet | Mapping[str, Tensor] | Task]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the chosen layers are trained at each condition: AdamW, its rate falling along a cosine."""

    num_steps: int
    batch_size: int
    lr: float
    final_lr: float
    last_steps: int
    """Steps at the end that snapshots are taken of."""
    every_n_steps: int = 1
    joint_steps: int
    """Steps of the joint model, which sees all fitted conditions mixed."""
    fine_tune_steps: tuple[int, ...] = (10, 50)
    """Steps of training at a new condition, where labels could be had there."""


@dataclass(frozen=True)
class Variant:
    """One reading of a sweep.

    Attributes:
        name: in tables; empty if there is but one.
        held_out: trajectories that are not fitted, and judged.
        store: that is fitted.
        ignored: trajectories that are neither fitted nor judged.
        original: a condition as the sweep knows it, of one as the store has it.
    """

    name: str
    held_out: list[str]
    store: Path
    ignored: list[str] = field(default_factory=list)
    original: Callable[[Condition], Condition] = dict


class Sweep:
    """One workload for one seed.

    A subclass says what the base model is, what the conditions are, what a batch at a condition is, and how the
    conditions are split.

    Args:
        folder: of this workload and seed.
        train: images and labels that everything is trained on.
        test: those that rows are judged on.
        seed: of every draw.
        smoke: everything but brief.
    """

    name: str
    recipe: Recipe
    kinds: tuple[str, ...] = ()
    """As `pdiff fit --kinds` takes them."""
    layers: Any = "all"
    latent_dim = SubspaceConfig.latent_dim
    """Of the fit; more where many runs have little in common."""
    num_tests = 2000
    """Test images at each condition."""
    num_unlabelled = 0
    """Images at the condition that BatchNorm statistics may be recomputed on."""

    def __init__(self, folder: Path, train: Split, test: Split, seed: int, smoke: bool = False) -> None:
        self.folder, self.train_split, self.seed, self.smoke = folder, train, seed, smoke
        self.test_split = test[0][: self.num_tests], test[1][: self.num_tests]
        if smoke:
            brief = {"num_steps": 10, "batch_size": 16, "last_steps": 4, "every_n_steps": 1, "joint_steps": 10}
            brief["fine_tune_steps"] = self.recipe.fine_tune_steps[:1]
            self.recipe = replace(self.recipe, **brief)
        self._base: nn.Module | None = None

    def build(self) -> nn.Module:
        """The model, untrained."""
        raise NotImplementedError

    def train_base(self, model: nn.Module) -> None:
        """Train the model that every run starts from, in place."""
        raise NotImplementedError

    def conditions(self) -> list[Condition]:
        """All conditions that are recorded, in order; the n-th is that of trajectory ``cond-n``."""
        raise NotImplementedError

    def variants(self) -> list[Variant]:
        """The readings of the sweep that are fitted and judged."""
        raise NotImplementedError

    def drawn(self, variant: Variant) -> list[Condition]:
        """Conditions that the task can make, none of which is recorded or judged, to refine a generator at."""
        return []

    def loss(self, model: nn.Module, condition: Condition, rng: torch.Generator) -> Tensor:
        """Loss of one batch, drawn by ``rng`` from the training data at the condition."""
        x, y = self.batch(rng)
        found: Tensor = F.cross_entropy(model(self.altered(x, condition, rng)), y)
        return found

    def altered(self, x: Tensor, condition: Condition, rng: torch.Generator) -> Tensor:
        """Images as they are at the condition."""
        raise NotImplementedError

    def task(self, **condition: Any) -> Task:
        """The base model and the test images at a condition."""
        # The same noise for all conditions, so that they can be compared image by image.
        rng = torch.Generator().manual_seed(77)
        x = self.altered(self.test_split[0], condition, rng)
        unlabelled = None
        if self.num_unlabelled:
            rows = slice(0, self.num_unlabelled)
            own = self.altered(self.train_split[0][rows], condition, rng), self.train_split[1][rows]
            unlabelled = loader(own, 64)
        return Task(self.base(), loader((x, self.test_split[1]), 500), unlabelled, name=self.name)

    def extra(self, variant: Variant, generator: WeightGenerator) -> dict[str, ExtraRow]:
        """Rows beside the usual ones."""
        return {}

    # What follows is the same for all of them.

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def base(self) -> nn.Module:
        """The model that every run starts from, trained the first time and read from its file afterwards."""
        if self._base is None:
            torch.manual_seed(self.seed)
            model, path = self.build(), self.folder / "base.pt"
            if not path.exists():
                self.train_base(model)
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)
            model.load_state_dict(torch.load(path, weights_only=True))
            self._base = model.eval()
        return self._base

    def batch(self, rng: torch.Generator) -> Split:
        rows = torch.randint(len(self.train_split[0]), (self.recipe.batch_size,), generator=rng)
        return self.train_split[0][rows], self.train_split[1][rows]

    def record(self) -> None:
        """Record what is missing of the sweep."""
        started = time.perf_counter()
        model = self.base()
        seconds = {"base": time.perf_counter() - started, "runs": 0.0}
        path = self.folder / "seconds.json"
        if path.exists():
            seconds = json.loads(path.read_text())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            for number, condition in enumerate(self.conditions()):
                if not self.has_recorded(run_name(number)):
                    started = time.perf_counter()
                    model.load_state_dict(state)
                    self.record_at(model, number, condition)
                    seconds["runs"] += time.perf_counter() - started
                    path.write_text(json.dumps(seconds))
                    print(f"{self.name} {run_name(number)} {seconds['runs']:.0f} s", flush=True)
        finally:
            model.load_state_dict(state)
            model.eval()

    def has_recorded(self, run: str, folder: Path | None = None) -> bool:
        """Whether a run is complete; what an interruption left of it is deleted."""
        folder = folder or self.store
        if not (folder / "trajectories" / run).exists():
            return False
        store = SnapshotStore.open(folder)
        if run in store.trajectories:
            found = int((store.trajectory_index == store.trajectories.index(run)).sum())
            if found == self.recipe.last_steps // self.recipe.every_n_steps and run in store.conditions:
                return True
        shutil.rmtree(folder / "trajectories" / run)
        return False

    def record_at(self, model: nn.Module, number: int, condition: Condition) -> None:
        """Train the model at one condition, in place, and record its last steps."""
        seed = 1000 * self.seed + number
        torch.manual_seed(seed)
        recorder = PDiffRecorder(
            self.store,
            layers=self.layers,
            condition=condition,
            trajectory=run_name(number),
            last_steps=self.recipe.last_steps,
            every_n_steps=self.recipe.every_n_steps,
            save_base=number == 0,
        )
        self.train(model, [condition], self.recipe.num_steps, seed=seed, recorder=recorder)
        if recorder.error is not None:
            raise recorder.error

    def train(
        self,
        model: nn.Module,
        conditions: Sequence[Condition],
        num_steps: int,
        *,
        seed: int | None = None,
        recorder: PDiffRecorder | None = None,
    ) -> None:
        """Train the chosen layers in place; at each step at one of the conditions, drawn at random.

        This is what records a run (one condition), what trains a joint model (all of them), and what a few steps at a
        new condition are.
        """
        rng = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        chosen = self.trained(model)
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        model.train()
        optimizer = torch.optim.AdamW(chosen, lr=self.recipe.lr)
        if recorder is not None:
            recorder.attach(model, optimizer, total_steps=num_steps)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = self.rate(step / max(num_steps - 1, 1))
            which = int(torch.randint(len(conditions), (), generator=rng)) if len(conditions) > 1 else 0
            optimizer.zero_grad()
            self.loss(model, conditions[which], rng).backward()
            optimizer.step()
        if recorder is not None:
            recorder.close()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    def rate(self, progress: float) -> float:
        """The learning rate at a place of the training from 0 to 1."""
        low, high = self.recipe.final_lr, self.recipe.lr
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that are trained and recorded."""
        return list(model.parameters())


def run_name(number: int) -> str:
    return f"cond-{number:03d}"


def sobol(num_points: int, num_dimensions: int, seed: int) -> Tensor:
    """Points that fill the unit cube evenly, (num_points, num_dimensions): scrambled Sobol points."""
    return torch.quasirandom.SobolEngine(num_dimensions, scramble=True, seed=seed).draw(num_points)
