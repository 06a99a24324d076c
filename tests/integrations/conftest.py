"""Real trainers on a small real task: handwritten digits, a network with two BatchNorms.

One driver per trainer in ``drivers/`` runs that task with the trainer's own means; the contract in ``test_contract.py``
looks only at what a :class:`Job` brings back.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

BATCH_SIZE = 32
# Trainers look for these, and some connect to a server or a tracker by them.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass
class Job:
    """One training: what a driver is asked to do, and what came of it.

    Attributes:
        folder: the trainer's own output folder.
        settings: of the recorder; None trains without one.
        probe: called by the driver after each optimizer step with name -> tensor; keeps copies, and may raise.
        save: write the trainer's checkpoint after the first epoch, the recorder's counters in it.
        resume: continue from that checkpoint.
    """

    folder: Path
    settings: dict[str, Any] | None = field(default_factory=dict)
    num_batches: int = 5
    epochs: int = 2
    accumulate: int = 1
    save: bool = False
    resume: bool = False
    fail_at: int | None = None
    error: type[BaseException] = ValueError
    history: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def probe(self, tensors: dict[str, Tensor]) -> None:
        self.history.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        if len(self.history) == self.fail_at:
            raise self.error("raised in training")

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        inputs, targets = digits()
        size = BATCH_SIZE
        return [(inputs[i * size :][:size], targets[i * size :][:size]) for i in range(self.num_batches)]

    def examples(self) -> tuple[Tensor, Tensor]:
        inputs, targets = digits()
        return inputs[: self.num_batches * BATCH_SIZE], targets[: self.num_batches * BATCH_SIZE]


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def make_optimizer(net: nn.Module, job: Job | None = None, model: nn.Module | None = None) -> torch.optim.Optimizer:
    """SGD that shows ``model`` (the network itself unless given) to the job after each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if job is not None:
        optimizer.register_step_post_hook(lambda *_: job.probe((model or net).state_dict()))
    return optimizer


@pytest.fixture
def toolbox() -> Any:
    """The functions above, for tests and drivers, which cannot import a conftest."""
    return _toolbox()


@pytest.fixture
def load_driver() -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        pytest.importorskip(PACKAGES[name])
        spec = importlib.util.spec_from_file_location(
            f"drivers_{name}", Path(__file__).parent / "drivers" / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.toolbox = _toolbox()
        spec.loader.exec_module(module)
        return module

    return load


PACKAGES = {
    "lightning": "lightning",
    "huggingface": "transformers",
    "accelerate": "accelerate",
    "ignite": "ignite",
    "fastai": "fastai",
    "keras": "keras",
    "ray_train": "ray.train",
    "ray_tune": "ray.tune",
    "composer": "composer",
}


def _toolbox() -> ModuleType:
    toolbox = ModuleType("toolbox")
    for thing in (Job, digits, make_net, make_optimizer):
        setattr(toolbox, thing.__name__, thing)
    toolbox.BATCH_SIZE = BATCH_SIZE
    return toolbox
