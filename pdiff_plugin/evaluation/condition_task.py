"""The user's own functions of a condition: tasks, training and rows of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.conditions import Condition

# Takes names of the condition as keywords: def task(angle): return Task(model, loader(angle))
MakeTask = Callable[..., Task]
# Trains the recorded layers of a model in place: (model, conditions, num_steps).
Train = Callable[[nn.Module, list[Condition], int], object]
# Weights for a condition, or a task whose own model is judged as it is.
MakeRow = Callable[[Condition], "WeightSet | Mapping[str, Tensor] | Task"]


def check_function(make: Callable[..., Any], names: Sequence[str], field: str = "task") -> None:
    """Raise :class:`ConfigError` where a function asks for something that no condition has."""
    if not callable(make):
        raise ConfigError(field, type(make).__name__, f"must be a function of the condition ({', '.join(names)})")
    for parameter in inspect.signature(make).parameters.values():
        is_needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if is_needed and (parameter.name not in names or parameter.kind is parameter.POSITIONAL_ONLY):
            raise ConfigError(
                field,
                getattr(make, "__name__", str(make)),
                f"asks for {parameter.name!r}; its arguments must be names of the condition ({', '.join(names)}), or "
                "**condition for all of them",
            )


def task_at(make: MakeTask, condition: Condition) -> Task:
    """The task at a condition: the function is given those names of it that it asks for.

    Raises:
        ConfigError: it returns something else.
    """
    parameters = inspect.signature(make).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    asked = {parameter.name for parameter in parameters}
    task = make(**{name: value for name, value in condition.items() if takes_all or name in asked})
    if not isinstance(task, Task):
        found = type(task).__name__
        raise ConfigError("task", getattr(make, "__name__", str(make)), f"must return a Task, not a {found}")
    return task
