"""From a loader's batch to a model's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pdiff_plugin.errors import ConfigError

Inputs = Callable[[Any], Any]
_LABELS = {"label", "labels", "label_ids", "target", "targets"}


def arguments_of(
    batch: Any, device: torch.device, inputs: Inputs | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model for ``batch``, tensors on ``device``.

    Args:
        batch: a tensor, a pair (inputs, targets), or a dictionary with or without labels.
        device: of the model.
        inputs: batch -> a tensor, a tuple of positional or a dictionary of keyword arguments; replaces the rules above.

    Raises:
        ConfigError: the batch has another form and ``inputs`` is not given.
    """
    if inputs is not None:
        found = inputs(batch)
    elif isinstance(batch, Mapping):
        found = {name: value for name, value in batch.items() if name not in _LABELS}
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
        found = batch[0]
    elif isinstance(batch, Tensor):
        found = batch
    else:
        raise ConfigError(
            "loader", f"batches of {type(batch).__name__}", "must give (inputs, targets); else pass inputs=..."
        )
    found = tree_map_only(
        Tensor, lambda tensor: tensor.to(device), dict(found) if isinstance(found, Mapping) else found
    )
    if isinstance(found, dict):
        return (), found
    return (tuple(found), {}) if isinstance(found, tuple | list) else ((found,), {})


def find_logits(output: Any) -> Any:
    """``logits`` of a mapping or an object that has them, the first of a tuple, else ``output`` itself."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple | list) and output else output


def num_batches_in(loader: Iterable[Any]) -> int:
    """Length of ``loader``, 0 when it has none."""
    try:
        return len(cast(Sized, loader))
    except TypeError:  # also what a DataLoader over a stream raises
        return 0
