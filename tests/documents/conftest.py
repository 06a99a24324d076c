"""What the pages take for granted: a model, its data, stores, fits, checkpoints, and a module of the user's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import (
    ConditionConfig,
    Cycle,
    DiffusionConfig,
    FitConfig,
    PDiffRecorder,
    RefineConfig,
    Task,
    cli,
    collect,
    fit,
)
from pdiff_plugin.fitting import centre_stage, condition_stage

STYLES = ("oil", "ink")


def new_model(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def turned(x: Tensor, angle: float) -> Tensor:
    """Brighter or darker with the angle: all that these tests need of a rotation."""
    return x * (1.0 + 0.5 * math.sin(math.radians(angle)))


class Problem:
    """A small classifier on digits; trained where a file with its weights is given."""

    def __init__(self, weights: Path | None = None) -> None:
        digits = load_digits()
        x = torch.tensor(digits.data[:600], dtype=torch.float32) / 16
        y = torch.tensor(digits.target[:600])
        self.train_data, self.eval_data = TensorDataset(x[:200], y[:200]), TensorDataset(x[200:], y[200:])
        self.model, self.optimizer = new_model()
        self.model.eval()
        if weights is not None:
            self.model.load_state_dict(torch.load(weights, weights_only=True))

    def train_loader(self, angle: float = 0.0, style: str = "oil") -> DataLoader[Any]:
        x, y = self.train_data.tensors
        return DataLoader(TensorDataset(turned(x, angle), y), batch_size=50)

    def eval_loader(self, angle: float = 0.0, style: str = "oil") -> DataLoader[Any]:
        x, y = self.eval_data.tensors
        return DataLoader(TensorDataset(turned(x, angle), y), batch_size=400)

    def train(
        self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, num_steps: int = 60
    ) -> None:
        model, optimizer = model or self.model, optimizer or self.optimizer
        model.train()
        batches = list(self.train_loader())
        for step in range(num_steps):
            x, y = batches[step % len(batches)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()

    def module(self) -> ModuleType:
        """The user's own, `my_module`."""

        def loss(model: Any, condition: dict[str, Any]) -> Tensor:
            x, y = next(iter(self.train_loader(condition["angle"])))
            return nn.functional.cross_entropy(model(x), y)

        module = ModuleType("my_module")
        module.model, module.task, module.loss = lambda: self.model, self.task, loss
        module.task_at = lambda angle, style: self.task(angle, style)
        module.task_at_angle = lambda angle: self.task(angle)
        return module

    def task(self, angle: float = 0.0, style: str = "oil") -> Task:
        return Task(self.model, self.eval_loader(angle, style))

    def names(self) -> dict[str, Any]:
        """What the blocks of every page know."""
        batches = (batch for _ in range(10**6) for batch in self.train_loader())
        return {
            "__name__": "__main__",
            "model": self.model,
            "optimizer": self.optimizer,
            "train": self.train,
            "new_model": new_model,
            "train_loader": self.train_loader(),
            "eval_loader": self.eval_loader(),
            "loader": self.eval_loader(),
            "loader_at": self.train_loader,
            "eval_loader_at": self.eval_loader,
            "x": self.eval_data.tensors[0],
            "batches": batches,
            "rotated": turned,
        }


@pytest.fixture(scope="module")
def brief() -> Iterator[None]:
    """Fits of a second, for one module: all works as at the defaults, figures mean nothing."""
    defaults = {DiffusionConfig: {"max_steps": 40, "eval_every_n_steps": 20}, RefineConfig: {"num_steps": 20}}
    with pytest.MonkeyPatch.context() as patch:
        for kind, changes in defaults.items():
            for name, value in changes.items():
                patch.setitem(kind.__init__.__kwdefaults__, name, value)
        patch.setattr(centre_stage, "_MAX_STEPS", 50)
        patch.setattr(condition_stage, "_MAX_FOLDS", 1)
        patch.setattr(condition_stage, "_LEAST_STEPS", 40)
        patch.setitem(cli.refine.__kwdefaults__, "config", RefineConfig())
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, brief: None) -> Path:
    """A folder as the pages expect it, to be copied."""
    folder, problem = tmp_path_factory.mktemp("pages") / "home", Problem()
    model, optimizer = problem.model, problem.optimizer
    with PDiffRecorder(folder / "runs" / "a").attach(model, optimizer, total_steps=100):
        problem.train(num_steps=100)
    fit(folder / "runs" / "a", out=folder / "fits" / "a")
    conditions = [{"angle": angle, "style": STYLES[number % 2]} for number, angle in enumerate(range(0, 360, 30))]
    for name, kept in (("sweep", ("angle", "style")), ("angles", ("angle",))):
        collect(
            model,
            loss_fn=nn.CrossEntropyLoss(),
            store=folder / "runs" / name,
            num_snapshots=3,
            trajectory="run",
            restart=Cycle(warmup_steps=3),
            conditions=[{key: float(one[key]) if key == "angle" else one[key] for key in kept} for one in conditions],
            data=problem.train_loader,
        )
    config = FitConfig(condition=ConditionConfig(kinds=("angle:cyclic=360",)))
    fit(folder / "runs" / "sweep", config, out=folder / "fits" / "dial")
    fit(folder / "runs" / "angles", config, out=folder / "fits" / "angles")
    (folder / "ckpts").mkdir()
    for angle in range(0, 360, 30):
        torch.save(model.state_dict(), folder / "ckpts" / f"angle{angle}.pt")
    lines = ["trajectory,angle", *(f"angle{angle},{angle}" for angle in range(0, 360, 30))]
    (folder / "table.csv").write_text("\n".join(lines))
    (folder / "angles.jsonl").write_text("\n".join(f'{{"angle": {angle}}}' for angle in range(10, 360, 30)))
    torch.save(model.state_dict(), folder / "model.pt")
    return folder
