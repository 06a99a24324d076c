"""Recomputing BatchNorm statistics for weights that never saw data.

Shapes: M members, F features of a BatchNorm layer, ``*shape`` one tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.errors import DataError
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.batches import Inputs, arguments_of, num_batches_in
from pdiff_plugin.modules.modes import modes_kept
from pdiff_plugin.modules.names import named_modules, named_tensors, unwrap, wrapped_names
from pdiff_plugin.modules.swap import swap_
from pdiff_plugin.modules.trunk_cache import exclusive
from pdiff_plugin.progress import OnProgress, Progress


def recalibrate_batchnorm(
    target: nn.Module,
    loader: Iterable[Any],
    *,
    since: Collection[str] | None = None,
    num_batches: int | None = None,
    inputs: Inputs | None = None,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Give BatchNorm layers the statistics that their inputs have on training data, averaged over batches.

    Modes and momenta come back as they were, also after an exception; the statistics themselves then too. Statistics
    that were recorded with the weights are usually better than recomputed ones: measure both.

    Args:
        target: a model, or a :class:`DiffusionEnsemble`, whose members each get statistics of their own.
        loader: training data; one pass over it.
        since: names of swapped tensors. Only layers that run at or after the first of them are recalibrated. By
            default all layers of a model; of an ensemble, those that its members do not share.
        num_batches: stop after so many.
        inputs: batch -> model inputs, as in :meth:`DiffusionEnsemble.predict_loader`.
        on_progress: told the number of batches done.

    Returns:
        Names of the recalibrated layers.

    Raises:
        DataError: the loader gave no batch.
    """
    if isinstance(target, DiffusionEnsemble):
        model, since = target.model, target.names if since is None else since
        states: list[dict[str, Tensor]] = list(target.weights.members())
    else:
        model, states = unwrap(target), [{}]
    device = next(iter(named_tensors(model).values())).device
    total = num_batches or num_batches_in(loader)
    layers: dict[str, _BatchNorm] = {}
    statistics: list[dict[str, Tensor]] = []
    with torch.inference_mode(False), torch.no_grad(), exclusive(model), modes_kept(model):
        model.eval()
        for done, batch in enumerate(islice(loader, num_batches), start=1):
            args, kwargs = arguments_of(batch, device, inputs)
            if not statistics:
                layers = _layers_since(model, since, args, kwargs)
                statistics = [_fresh_statistics(layers) for _ in states]
            with _accumulating(layers.values()):
                for state, fresh in zip(states, statistics, strict=True):
                    _update(model, {**state, **fresh}, args, kwargs)
            if on_progress is not None:
                on_progress(Progress("recalibrate", done, total))
    if not statistics:
        raise DataError("loader", "no batches", "must give at least one batch")
    measured = [{name: t for name, t in fresh.items() if t.is_floating_point()} for fresh in statistics]
    if isinstance(target, DiffusionEnsemble):
        if layers:
            target.set_weights({**target.weights, **WeightSet.from_members(measured)})
    else:
        swap_(model, measured[0])
    return list(layers)


def _update(model: nn.Module, state: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One batch through the model with ``state``, whose statistics are updated in place."""
    raw = wrapped_names(model)
    functional_call(model, {raw[name]: tensor for name, tensor in state.items()}, args, kwargs)


def _fresh_statistics(layers: Mapping[str, _BatchNorm]) -> dict[str, Tensor]:
    fresh: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(layer, key)
            fresh[f"{name}.{key}" if name else key] = torch.zeros_like(buffer)
    return fresh


def _layers_since(
    model: nn.Module, since: Collection[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, _BatchNorm]:
    """BatchNorm layers with statistics, by name: all, or those called at or after the first owner of ``since``."""
    tracked = {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if since is None:
        return tracked
    live = named_tensors(model)
    swapped = {id(live[name]) for name in since}
    owners = [
        module
        for module in model.modules()
        if any(id(t) in swapped for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)])
    ]
    called: list[nn.Module] = []
    watched = {id(module): module for module in [*owners, *tracked.values()]}.values()
    handles = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in watched]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    owner_ids = {id(owner) for owner in owners}
    first = next((index for index, module in enumerate(called) if id(module) in owner_ids), 0)
    after = {id(module) for module in called[first:]}
    return {name: layer for name, layer in tracked.items() if id(layer) in after}


@contextmanager
def _accumulating(layers: Collection[_BatchNorm]) -> Iterator[None]:
    """``layers`` average the statistics of all batches with equal weights."""
    momenta: Sequence[tuple[_BatchNorm, float | None]] = [(layer, layer.momentum) for layer in layers]
    try:
        for layer in layers:
            # Not .train(): a normalisation fused with dropout would switch that on as well.
            layer.training, layer.momentum = True, None
        yield
    finally:
        for layer, momentum in momenta:
            layer.training, layer.momentum = False, momentum
