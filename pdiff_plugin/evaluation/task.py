"""A user's model together with the data it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.snapshots.layout import unwrap

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Task:
    """What `pdiff evaluate` needs to know of a user's problem: classification by one model.

    Loaders yield ``(inputs, targets)``. Inputs are a tensor, a tuple of positional arguments or a dictionary of keyword
    arguments of the model; targets are class indices, (B,). The items must come in the same order each time
    (``shuffle=False``), so that differences between sets can be paired item by item.
    """

    model: nn.Module
    """The trained model; modes, flags and weights are left as they were found."""
    eval_loader: Iterable[Any]
    """Held-out data that nothing was trained or chosen on."""
    train_loader: Iterable[Any] | None = None
    """Training data, for what has to be fitted on it (BatchNorm statistics)."""
    _: KW_ONLY
    name: str = "task"
    """Title in tables and reports."""
    device: str | torch.device | None = None
    """Where to run; the model is moved there and back. Unless given, where the model is."""

    def target_device(self) -> torch.device:
        """Where inputs have to go."""
        return _device_of(self.model) if self.device is None else torch.device(self.device)


def batches(loader: Iterable[Any], device: torch.device, name: str = "eval_loader") -> Iterator[Batch]:
    """Yield (inputs, targets (B,) int64) on ``device``.

    Raises:
        ConfigError: the loader is empty, or yields something else.
    """
    empty = True
    for batch in loader:
        empty = False
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigError(name, type(batch).__name__, "must yield pairs (inputs, targets)")
        inputs, targets = batch
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
            found = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ConfigError(f"targets of {name}", found, "must be class indices, integers of shape (B,)")
        yield to_device(inputs, device), targets.to(device=device, dtype=torch.int64)
    if empty:
        raise ConfigError(name, "no batch", "must yield at least one batch")


def to_device(inputs: Any, device: torch.device) -> Any:
    """``inputs`` with every tensor in it on ``device``; other values are kept."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(to_device(value, device) for value in inputs)
    return inputs


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model's call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def logits_of(output: Any) -> Tensor:
    """Logits (B, C) from what a model returned: a tensor, an object or mapping with ``logits``, or a tuple.

    Raises:
        ConfigError: there are none of shape (B, C).
    """
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        text = str(tuple(found.shape)) if isinstance(found, Tensor) else type(output).__name__
        raise ConfigError("output of the model", text, "must be logits of shape (B, C), or hold them as `logits`")
    return found


@contextmanager
def evaluating(task: Task) -> Iterator[nn.Module]:
    """Yield the task's own model, unwrapped, in eval mode and on its device; afterwards it is as it was.

    Modes are remembered module by module: a frozen BatchNorm in eval mode inside a training model stays so.
    """
    model = unwrap(task.model)
    modes = {module: module.training for module in model.modules()}
    before = _device_of(model)
    moved = before != task.target_device()
    try:
        model.eval()
        if moved:
            model.to(task.target_device())
        yield model
    finally:
        if moved:
            model.to(before)
        for module, mode in modes.items():
            module.training = mode


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters(), next(model.buffers(), torch.empty(0))).device
