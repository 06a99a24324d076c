"""Room for large tensors in mapped files, which the system may drop from memory and which no kill leaves behind."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pdiff_plugin.snapshots.files import TEMP_MARK

logger = logging.getLogger(__name__)


def mapped(shape: tuple[int, ...], dtype: torch.dtype, what: str, *, least_bytes: int, folder: Path | None) -> Tensor:
    """A tensor that is not filled yet, in a file that is gone with it; in memory where that is smaller or impossible.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        what: it holds, in the file's name and in the warning where there is no room for it.
        least_bytes: smaller tensors stay in memory.
        folder: for the file; that for temporary files unless given.
    """
    size_bytes = torch.Size(shape).numel() * dtype.itemsize
    if size_bytes < least_bytes or os.name != "posix":
        return torch.empty(shape, dtype=dtype)
    try:
        # Unlinked at once: the mapping keeps it alive.
        with tempfile.NamedTemporaryFile(prefix=f"{TEMP_MARK}{what}-", dir=folder or disk_folder()) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would show as a SIGBUS in the middle of the pass
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            size = size_bytes // dtype.itemsize
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        logger.warning("no room on disk for %.1f GB of %s (%s): kept in memory", size_bytes / 1e9, what, error)
        return torch.empty(shape, dtype=dtype)


def disk_folder() -> str:
    """The folder for temporary files; ``/var/tmp`` instead of ``/tmp``, which is memory on many systems."""
    folder = tempfile.gettempdir()
    return "/var/tmp" if folder == "/tmp" and os.access("/var/tmp", os.W_OK | os.X_OK) else folder
