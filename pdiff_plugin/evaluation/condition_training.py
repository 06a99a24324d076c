"""Rows that need training or data at a condition: the base model, a joint model, a few steps there."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pdiff_plugin.ensemble.batchnorm import recalibrate_batchnorm
from pdiff_plugin.evaluation.condition_task import Train
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.modules.names import unwrap
from pdiff_plugin.modules.swap import swap_
from pdiff_plugin.snapshots.conditions import Condition


def can_recalibrate(task: Task) -> bool:
    """Whether there are BatchNorm statistics to recompute, and data to do it on."""
    layers = (module for module in task.model.modules() if isinstance(module, _BatchNorm))
    return task.train_loader is not None and any(layer.running_mean is not None for layer in layers)


def recalibrated(task: Task) -> Task:
    """The task with a copy of its model whose BatchNorm statistics are those of its training data."""
    model = _copy_of(task)
    assert task.train_loader is not None
    recalibrate_batchnorm(model, task.train_loader)
    return replace(task, model=model)


@dataclass
class Trainer:
    """Runs the user's training function on copies of the task's model.

    Attributes:
        train: the function.
        seed: of the global generators while it runs; they are left as they were.
        seconds: spent in it so far.
        steps: that these took.
    """

    train: Train
    seed: int
    seconds: float = 0.0
    steps: int = 0

    def trained(
        self, task: Task, start: Mapping[str, Tensor] | None, conditions: list[Condition], num_steps: int
    ) -> tuple[Task, float]:
        """The task with a trained copy of its model, and the seconds of the training.

        Args:
            task: whose model, as it is, supplies every tensor that ``start`` does not name.
            start: tensors to start from.
            conditions: to train at.
            num_steps: of the optimizer.
        """
        model = _copy_of(task)
        if start is not None:
            swap_(model, start)
        model.train()
        started = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.train(model, conditions, num_steps)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.steps += num_steps
        return replace(task, model=model.eval()), seconds


def _copy_of(task: Task) -> nn.Module:
    return copy.deepcopy(unwrap(task.model)).to(task.target_device()).eval()
