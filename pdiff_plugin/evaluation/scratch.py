"""Memory for members that are judged and then dropped.

Shapes: M members, K latent width, ``*shape`` one tensor's own shape.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.files import TEMP_MARK
from pdiff_plugin.snapshots.layout import DTYPES, Layout

logger = logging.getLogger(__name__)

# Room for the tensors of M members, name -> (M, *shape), not yet filled.
Empty = Callable[[Layout, int], dict[str, Tensor]]

# Smaller tensors stay in memory: a file takes longer than they do.
_MAPPED_BYTES = 1 << 20


def in_memory(layout: Layout, num_members: int) -> dict[str, Tensor]:
    """As the process's own memory."""
    return {spec.name: torch.empty(num_members, *spec.shape, dtype=DTYPES[spec.dtype]) for spec in layout}


def on_disk(layout: Layout, num_members: int) -> dict[str, Tensor]:
    """As mapped files, which the system may drop from memory; they are gone with the tensors."""
    return {spec.name: _mapped((num_members, *spec.shape), DTYPES[spec.dtype]) for spec in layout}


def decoded(generator: WeightGenerator, latents: Tensor, empty: Empty) -> WeightSet:
    """The members that ``latents`` (M, K) stand for, a few columns at a time into the memory that ``empty`` gives."""
    tensors = empty(generator.layout, len(latents))
    for name, columns, values in generator.autoencoder.decode_blocks(latents):
        start = generator.layout.slices[name].start
        tensors[name].view(len(latents), -1)[:, columns.start - start : columns.stop - start] = values
    return WeightSet(tensors)


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size_bytes = torch.Size(shape).numel() * dtype.itemsize
    if size_bytes < _MAPPED_BYTES or os.name != "posix":
        return torch.empty(*shape, dtype=dtype)
    try:
        # Unlinked at once: the mapping keeps it alive, and nothing is left behind by a kill.
        with tempfile.NamedTemporaryFile(prefix=f"{TEMP_MARK}members-", dir=_folder()) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would show as a SIGBUS in the middle of the pass
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            return torch.from_file(file.name, shared=True, size=size_bytes // dtype.itemsize, dtype=dtype).view(*shape)
    except OSError as error:
        logger.warning("no room on disk for %.1f GB of members (%s): kept in memory", size_bytes / 1e9, error)
        return torch.empty(*shape, dtype=dtype)


def _folder() -> str:
    """The folder for temporary files; ``/var/tmp`` instead of ``/tmp``, which is memory on many systems."""
    folder = tempfile.gettempdir()
    return "/var/tmp" if folder == "/tmp" and os.access("/var/tmp", os.W_OK | os.X_OK) else folder
