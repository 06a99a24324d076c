"""From a loader's batch to a model's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pdiff_plugin.errors import DataError

Inputs = Callable[[Any], Any]
# Keys under which dictionaries carry targets, the commonest first.
LABELS = ("labels", "label", "targets", "target", "label_ids")


def arguments_of(
    batch: Any, device: torch.device, inputs: Inputs | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model for ``batch``, tensors on ``device``.

    Args:
        batch: a tensor, a pair (inputs, targets), or a dictionary with or without labels.
        device: of the model.
        inputs: batch -> a tensor, a tuple of positional or a dictionary of keyword arguments; replaces the rules above.

    Raises:
        DataError: the batch has another form and ``inputs`` is not given.
    """
    if inputs is not None:
        found = inputs(batch)
    elif isinstance(batch, Mapping):
        found = {name: value for name, value in batch.items() if name not in LABELS}
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
        found = batch[0]
    elif isinstance(batch, Tensor):
        found = batch
    else:
        raise DataError(
            "loader", f"batches of {type(batch).__name__}", "must give (inputs, targets); else pass inputs=..."
        )
    found = tree_map_only(
        Tensor, lambda tensor: tensor.to(device), dict(found) if isinstance(found, Mapping) else found
    )
    if isinstance(found, dict):
        return (), found
    return (tuple(found), {}) if isinstance(found, tuple | list) else ((found,), {})


def logits_of(output: Any) -> Tensor:
    """Logits in what a model returned: a tensor, a mapping or an object with ``logits``, or the first of a tuple.

    Raises:
        DataError: there are none.
    """
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    else:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise DataError("output of the model", type(output).__name__, "must be logits or hold them as `logits`")
    return found


def num_batches_in(loader: Iterable[Any]) -> int:
    """Length of ``loader``, 0 when it has none."""
    try:
        return len(cast(Sized, loader))
    except TypeError:  # also what a DataLoader over a stream raises
        return 0
