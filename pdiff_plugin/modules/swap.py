"""Putting other weights into a live model, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pdiff_plugin.modules.names import check_fits, named_tensors, shapes_of


def swap_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into ``model`` for good; everything it does not name stays as it is.

    Args:
        model: any module, wrapped by DistributedDataParallel or ``torch.compile`` or not.
        state: name -> tensor of the model's own shape. Names as in :func:`named_tensors`: without the steps of
            wrappers, tied tensors under their first name. Values are cast to the model's dtype and moved to its device.

    Raises:
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape; nothing is copied.
    """
    live = _matching(model, state)
    # In place, so that optimizers, tied names and views keep seeing the same tensors.
    with torch.no_grad():
        for name, tensor in state.items():
            live[name].copy_(tensor)


@contextmanager
def swapped(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Give ``model`` the tensors of ``state`` inside a ``with`` block; afterwards it is bit-identical to before.

    The originals are kept aside and come back after an exception too. Blocks may be nested. Arguments and errors are
    those of :func:`swap_`.
    """
    saved = {name: tensor.detach().clone() for name, tensor in _matching(model, state).items()}
    try:
        swap_(model, state)
        yield model
    finally:
        swap_(model, saved)


def _matching(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = named_tensors(model)
    check_fits(shapes_of(state), shapes_of(tensors), "the new state")
    return {name: tensors[name] for name in state}
