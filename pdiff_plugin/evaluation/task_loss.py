"""The loss of a task's own training data, which a generator of conditions may learn from."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.condition_task import MakeTask, task_at
from pdiff_plugin.evaluation.task import Data, Task, batches
from pdiff_plugin.snapshots.conditions import Condition

# Tasks of so many conditions are kept: each may hold data.
_NUM_KEPT = 64


def task_loss(make: MakeTask) -> Callable[[Callable[..., Any], Condition], Tensor]:
    """The loss that :func:`pdiff_plugin.refine` takes, of the training data that a task has at each condition.

        def task(angle):
            return Task(model, eval_loader(angle), train_loader(angle))

        better = refine(generator, model, task_loss(task))

    Each call takes the first batch of a new pass over ``train_loader``, which should therefore shuffle
    (``DataLoader(..., shuffle=True)``, without workers of its own: they would be started for every batch).

    Args:
        make: makes the task at a condition, of whose values it names those that it wants.

    Returns:
        (model, condition) -> the mean loss of a batch, as the task's kind has it: cross-entropy of classes, squared
        error, negative log-likelihood, or the task's own ``loss``.

    Raises:
        ConfigError: when called for a task without training data.
        DataError: when called, for a loader that yields something else than the kind takes.
    """

    @lru_cache(maxsize=_NUM_KEPT)
    def task_of(key: tuple[tuple[str, Any], ...]) -> Task:
        return task_at(make, {name: list(value) if isinstance(value, tuple) else value for name, value in key})

    def loss(model: Callable[..., Any], condition: Condition) -> Tensor:
        task = task_of(tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in condition.items()))
        if task.train_loader is None:
            expected = "must be given: Task(model, eval_loader, train_loader), or a loss of your own (--loss)"
            raise ConfigError("train_loader", None, expected)
        kind, data = task.task_kind, Data(task.train_loader, "train_loader")
        args, kwargs, targets = next(batches(data, kind, task.target_device()))
        output = task.pick(model(*args, **kwargs))
        if task.loss is not None:
            return task.loss(output.cpu(), targets).mean()
        outputs = kind.check_outputs(output[None], targets, data.name).cpu()
        scores = kind.joined([kind.score_batch(outputs, targets, torch.arange(1))])
        return scores["member_loss"].mean().float()

    return loss
