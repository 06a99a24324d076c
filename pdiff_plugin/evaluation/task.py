"""A user's model together with the data it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import DataError
from pdiff_plugin.modules.batches import LABELS, arguments_of
from pdiff_plugin.modules.modes import modes_kept
from pdiff_plugin.modules.names import unwrap

# Positional and keyword arguments of the model, and targets.
Batch = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@dataclass(frozen=True)
class Task:
    """What `pdiff evaluate` needs to know of a user's problem: classification by one model.

    Loaders yield ``(inputs, targets)``. Inputs are a tensor, a tuple of positional arguments or a dictionary of keyword
    arguments of the model; targets are class indices, (B,). A dictionary with ``labels`` of its own, as transformers'
    collators make it, does as well. The items must come in the same order each time (``shuffle=False``), so that
    differences between sets can be paired item by item.
    """

    model: nn.Module
    """The trained model; modes, flags and weights are left as they were found."""
    eval_loader: Iterable[Any]
    """Held-out data that nothing was trained or chosen on."""
    train_loader: Iterable[Any] | None = None
    """Training data, read only to recompute BatchNorm statistics (``evaluate(..., recalibrate=True)``)."""
    _: KW_ONLY
    name: str = "task"
    """Title in tables and reports."""
    shifted: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    """Other data of the same classes (corrupted, from elsewhere), by name: scored as ``eval_loader`` is."""
    out_of_distribution: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    """Data of no class, by name: how well an ensemble's entropy tells it from ``eval_loader`` (AUROC). Batches are
    inputs, or pairs whose targets are ignored."""
    device: str | torch.device | None = None
    """Where to run; the model is moved there and back. Unless given, where the model is."""

    def target_device(self) -> torch.device:
        """Where inputs have to go."""
        return _device_of(self.model) if self.device is None else torch.device(self.device)


def batches(
    loader: Iterable[Any], device: torch.device, name: str = "eval_loader", has_targets: bool = True
) -> Iterator[Batch]:
    """Yield positional and keyword arguments of the model on ``device``, and targets (B,) int64 on the CPU.

    Without targets, zeros stand for them.

    Raises:
        DataError: the loader is empty, or yields something else.
    """
    empty = True
    for batch in loader:
        empty = False
        args, kwargs = arguments_of(batch, device)
        yield args, kwargs, _targets_of(batch, name) if has_targets else _no_targets(args, kwargs, name)
    if empty:
        raise DataError(name, "no batch", "must yield at least one batch")


def _targets_of(batch: Any, name: str) -> Tensor:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        targets = batch[1]
    elif isinstance(batch, Mapping) and any(key in batch for key in LABELS):
        targets = next(batch[key] for key in LABELS if key in batch)
    else:
        raise DataError(name, type(batch).__name__, "must yield pairs (inputs, targets), or mappings with `labels`")
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        found = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(f"targets of {name}", found, "must be class indices, integers of shape (B,)")
    return targets.to(device="cpu", dtype=torch.int64)


def _no_targets(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise DataError(name, "batches without a tensor", "must yield tensors, or tuples or dictionaries of them")
    return torch.zeros(len(tensors[0]), dtype=torch.int64)


def check_logits(logits: Tensor, targets: Tensor, name: str) -> Tensor:
    """``logits`` again, if they are (M, B, C) and every one of ``targets`` (B,) is a class.

    Raises:
        DataError: they are not.
    """
    if logits.ndim != 3 or logits.shape[1] != len(targets):
        found = str(tuple(logits.shape[1:]))
        raise DataError("output of the model", found, f"must be logits of shape ({len(targets)}, C), one per target")
    if targets.min() < 0 or targets.max() >= logits.shape[2]:
        found = f"from {int(targets.min())} to {int(targets.max())}"
        raise DataError(f"targets of {name}", found, f"must be from 0 to {logits.shape[2] - 1}, the model's classes")
    return logits


@contextmanager
def evaluating(task: Task) -> Iterator[nn.Module]:
    """Yield the task's own model, unwrapped, in eval mode and on its device; afterwards it is as it was.

    Modes are remembered module by module: a frozen BatchNorm in eval mode inside a training model stays so.
    """
    model = unwrap(task.model)
    before = _device_of(model)
    moved = before != task.target_device()
    with modes_kept(model):
        try:
            model.eval()
            if moved:
                model.to(task.target_device())
            yield model
        finally:
            if moved:
                model.to(before)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters(), next(model.buffers(), torch.empty(0))).device
