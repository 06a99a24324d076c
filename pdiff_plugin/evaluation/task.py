"""A user's model together with the data it is judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import ConfigError, DataError
from pdiff_plugin.evaluation.kind import TaskKind
from pdiff_plugin.evaluation.kinds import IGNORED, KINDS, kind_for
from pdiff_plugin.modules.batches import LABELS, arguments_of
from pdiff_plugin.modules.modes import modes_kept
from pdiff_plugin.modules.names import unwrap

# Positional and keyword arguments of the model, and targets.
Batch = tuple[tuple[Any, ...], dict[str, Any], Any]


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
    arguments of the model. A dictionary with ``labels`` of its own, as transformers' collators make it, does as well.
    The items must come in the same order each time (``shuffle=False``), so that differences between sets can be paired
    item by item. What outputs and targets are, by ``kind``:

    classification        logits (B, C), class indices (B,)
    multilabel            logits (B, L), zeros and ones (B, L)
    dense                 logits (B, C, H, W), class indices (B, H, W)
    tokens                logits (B, T, V), class indices (B, T)
    language              logits (B, T, V), token indices (B, T) aligned with the inputs: position t is judged by t + 1
    regression            values (B,) or (B, T), and the same
    gaussian-regression   (mean, variance), each (B,) or (B, T), and values of that shape
    custom                what ``loss`` takes
    """

    model: nn.Module
    """The trained model; modes, flags and weights are left as they were found."""
    eval_loader: Iterable[Any]
    """Held-out data that nothing was trained or chosen on."""
    train_loader: Iterable[Any] | None = None
    """Training data, read only to recompute BatchNorm statistics (``evaluate(..., recalibrate=True)``) and by
    :func:`pdiff_plugin.task_loss`."""
    _: KW_ONLY
    name: str = "task"
    """Title in tables and reports."""
    kind: str = "classification"
    """How answers are scored."""
    loss: Callable[[Any, Any], Tensor] | None = None
    """For answers of any other kind: output (B, ...) and targets, both on the CPU -> loss of each item, (B,), lower is
    better."""
    combine: Callable[[Tensor], Tensor] | None = None
    """With ``loss``: outputs of members (M, B, ...) -> that of their ensemble, (B, ...); unless given, the mean."""
    select: Callable[[Any], Any] | None = None
    """Picks the answer out of what the model returns; unless given, its ``logits``, the first of a tuple, or all."""
    ignore_index: int = IGNORED
    """Targets of this value count for nothing, where an item has several (`dense`, `tokens`, `language`)."""
    shifted: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    """Other data with targets (corrupted, from elsewhere), by name: scored as ``eval_loader`` is."""
    out_of_distribution: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    """Data of no class, or of another origin, by name: how well an ensemble's uncertainty (of classes the entropy, of
    values the variance) tells it from ``eval_loader`` (AUROC). Batches are inputs, or pairs whose targets do not
    matter."""
    device: str | torch.device | None = None
    """Where to run; the model is moved there and back. Unless given, where the model is."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("kind", self.kind, f"must be one of {', '.join(KINDS)}")
        if self.loss is not None:
            if self.kind not in ("classification", "custom"):
                raise ConfigError("kind", self.kind, "must be left out where there is a loss of your own")
            object.__setattr__(self, "kind", "custom")
        elif self.kind == "custom" or self.combine is not None:
            raise ConfigError("loss", None, "must be given for a task of kind custom, and for combine")

    @property
    def task_kind(self) -> TaskKind:
        """All that is particular to the task's kind."""
        return kind_for(self.kind, self.loss, self.combine, self.ignore_index)

    def pick(self, output: Any) -> Tensor:
        """What is judged, (B, ...), of what the model returned."""
        return self.task_kind.pick(output if self.select is None else self.select(output))

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
