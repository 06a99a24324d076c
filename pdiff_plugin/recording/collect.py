"""The paper's own way to get snapshots: train the chosen layers of a finished model a little further."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.recording.recorder import PDiffRecorder
from pdiff_plugin.recording.selection import Layers, select
from pdiff_plugin.snapshots.store import SnapshotStore


def collect(
    model: nn.Module,
    train_loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    store: str | os.PathLike[str],
    layers: Layers = "last-norms:2",
    num_snapshots: int = 300,
    lr: float = 3e-2,
    weight_decay: float = 0.0,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    trajectory: str | None = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    save_base: bool = True,
    on_progress: OnProgress | None = None,
) -> SnapshotStore:
    """Freeze all but the chosen layers of a trained model, train on, and record every step.

    The rest of the network stays exactly as it is (its BatchNorms in eval mode), the rate is constant and high. The
    model comes back as it was given: weights, statistics, gradients, ``requires_grad`` and modes. That also holds after
    an error or Ctrl-C, and the snapshots up to then stay in the store.

    Args:
        train_loader: yields ``(inputs, targets)``; it is repeated as often as needed.
        loss_fn: called with the model's outputs and the targets.
        store: folder to record into.
        layers: which tensors, see :func:`~pdiff_plugin.recording.selection.select`.
        num_snapshots: steps to take, one snapshot each.
        lr: constant learning rate of AdamW.
        weight_decay: of AdamW.
        optimizer: makes another optimizer from the chosen parameters; ``lr`` and ``weight_decay`` are then not used.
        trajectory: name of this run in the store; the next free one unless given.
        device: where to train; where the model is unless given.
        dtype: of the numbers on disk.
        save_base: also keep the whole model of the last snapshot.
        on_progress: called after every step with the loss.

    Returns:
        The store, open for reading.
    """
    recorder = PDiffRecorder(
        store, layers=layers, max_snapshots=num_snapshots, trajectory=trajectory, dtype=dtype, save_base=save_base
    )
    chosen = select(model, layers).tensors
    parameters = [tensor for tensor in chosen.values() if isinstance(tensor, nn.Parameter)]
    home = parameters[0].device
    with _restored(model):
        try:
            if device is not None:
                model.to(device)
            for parameter in model.parameters():
                parameter.grad = None
                parameter.requires_grad_(any(parameter is p for p in parameters))
            _set_modes(model, chosen)
            made = (
                optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
            )
            with recorder.attach(model, made, total_steps=num_snapshots):
                for step, (inputs, targets) in enumerate(_cycle(train_loader, num_snapshots), start=1):
                    made.zero_grad()
                    loss = loss_fn(model(_to(inputs, device or home)), _to(targets, device or home))
                    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    made.step()
                    if on_progress is not None:
                        on_progress(Progress("collect", step, num_snapshots, {"loss": loss.item()}))
        finally:
            if device is not None:
                model.to(home)
    if recorder.error is not None:
        raise recorder.error
    return SnapshotStore.open(store)


def _set_modes(model: nn.Module, chosen: dict[str, Tensor]) -> None:
    """Train mode, but for BatchNorms whose running statistics are not recorded."""
    model.train()
    recorded = {id(tensor) for tensor in chosen.values()}
    for module in model.modules():
        statistics = getattr(module, "running_mean", None)
        if isinstance(statistics, Tensor) and id(statistics) not in recorded:
            module.eval()


def _cycle(loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    while num_batches > 0:
        before = num_batches
        for batch in itertools.islice(loader, num_batches):
            num_batches -= 1
            yield batch
        if num_batches == before:
            raise ConfigError("train_loader", loader, "must yield at least one batch each time it is iterated")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give the model back as it is, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, requires_grad, grad in parameters:
                parameter.copy_(value)
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def _to(batch: Any, device: str | torch.device) -> Any:
    """Move the tensors of a nested batch."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(_to(value, device) for value in batch)
    return batch
