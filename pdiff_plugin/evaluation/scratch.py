"""Memory for members that are judged and then dropped.

Shapes: M members, K latent width, ``*shape`` one tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import DTYPES, Layout
from pdiff_plugin.snapshots.mapped import mapped

# Room for the tensors of M members, name -> (M, *shape), not yet filled.
Empty = Callable[[Layout, int], dict[str, Tensor]]

# Smaller tensors stay in memory: a file takes longer than they do.
_MAPPED_BYTES = 1 << 20


def in_memory(layout: Layout, num_members: int) -> dict[str, Tensor]:
    """As the process's own memory."""
    return {spec.name: torch.empty(num_members, *spec.shape, dtype=DTYPES[spec.dtype]) for spec in layout}


def on_disk(layout: Layout, num_members: int) -> dict[str, Tensor]:
    """As mapped files, which the system may drop from memory; they are gone with the tensors."""
    return {
        spec.name: mapped(
            (num_members, *spec.shape), DTYPES[spec.dtype], "members", least_bytes=_MAPPED_BYTES, folder=None
        )
        for spec in layout
    }


def decoded(generator: WeightGenerator, latents: Tensor, empty: Empty) -> WeightSet:
    """The members that ``latents`` (M, K) stand for, a few columns at a time into the memory that ``empty`` gives."""
    tensors = empty(generator.layout, len(latents))
    for name, columns, values in generator.autoencoder.decode_blocks(latents):
        start = generator.layout.slices[name].start
        tensors[name].view(len(latents), -1)[:, columns.start - start : columns.stop - start] = values
    return WeightSet(tensors)
