"""A user's model together with the data it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import DataError
from pdiff_plugin.evaluation.kind import TaskKind
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.modules.batches import LABELS, arguments_of
from pdiff_plugin.modules.modes import modes_kept
from pdiff_plugin.modules.names import unwrap

# Positional and keyword arguments of the model, and targets.
Batch = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@dataclass(frozen=True)
class Data:
    """What sets are scored on."""

    loader: Iterable[Any]
    """Yields batches, in the same order each time."""
    name: str = "eval_loader"
    """In errors."""
    has_targets: bool = True
    """False where targets mean nothing (out-of-distribution data); then only the uncertainty of an answer does."""


@dataclass(frozen=True)
class Task:
    """What `pdiff evaluate` needs to know of a user's problem: one model, its data, and how answers are scored.

    Loaders yield ``(inputs, targets)``. Inputs are a tensor, a tuple of positional arguments or a dictionary of keyword
    arguments of the model; targets of a classification are class indices, (B,). A dictionary with ``labels`` of its
    own, as transformers' collators make it, does as well. The items must come in the same order each time
    (``shuffle=False``), so that differences between sets can be paired item by item.
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
    kind: str = "classification"
    """How answers are scored; `classification` is the only kind so far."""
    shifted: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    """Other data of the same classes (corrupted, from elsewhere), by name: scored as ``eval_loader`` is."""
    out_of_distribution: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    """Data of no class, by name: how well an ensemble's entropy tells it from ``eval_loader`` (AUROC). Batches are
    inputs, or pairs whose targets are ignored."""
    device: str | torch.device | None = None
    """Where to run; the model is moved there and back. Unless given, where the model is."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError("kind", self.kind, f"must be one of {', '.join(KINDS)}")

    @property
    def data(self) -> Data:
        """The held-out data."""
        return Data(self.eval_loader)

    def target_device(self) -> torch.device:
        """Where inputs have to go."""
        return _device_of(self.model) if self.device is None else torch.device(self.device)


def batches(data: Data, kind: TaskKind, device: torch.device) -> Iterator[Batch]:
    """Yield positional and keyword arguments of the model on ``device``, and targets (B, ...) on the CPU.

    Without targets, zeros (B,) int64 stand for them.

    Raises:
        DataError: the loader is empty, or yields something else.
    """
    empty = True
    for batch in data.loader:
        empty = False
        args, kwargs = arguments_of(batch, device)
        if data.has_targets:
            yield args, kwargs, kind.check_targets(_targets_of(batch, data.name), data.name)
        else:
            yield args, kwargs, _no_targets(args, kwargs, data.name)
    if empty:
        raise DataError(data.name, "no batch", "must yield at least one batch")


def _targets_of(batch: Any, name: str) -> Any:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    if isinstance(batch, Mapping) and any(key in batch for key in LABELS):
        return next(batch[key] for key in LABELS if key in batch)
    raise DataError(name, type(batch).__name__, "must yield pairs (inputs, targets), or mappings with `labels`")


def _no_targets(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise DataError(name, "batches without a tensor", "must yield tensors, or tuples or dictionaries of them")
    return torch.zeros(len(tensors[0]), dtype=torch.int64)


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
