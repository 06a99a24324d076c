"""Telling whether two trajectories hold the same snapshots, whatever they are called and wherever their files are.

Rows are compared by their steps and a digest of some of their values first, which tells different ones apart without
reading them. Only what agrees in these is read as a whole, unless it lies in the same file on disk under two names.

Shapes: n rows in a chunk, c columns, D values in a row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from pdiff_plugin.snapshots.chunks import Chunk, read_chunk, read_chunks
from pdiff_plugin.snapshots.fingerprint import watched_columns
from pdiff_plugin.snapshots.layout import Layout


@dataclass(frozen=True)
class Content:
    """The readable snapshots of a trajectory, those from before its window among them.

    Attributes:
        files: that hold them.
        digests: step -> digest of some of the values of its row.
        places: step -> file, and number of the row in it.
    """

    files: tuple[Path, ...]
    digests: dict[int, bytes]
    places: dict[int, tuple[Path, int]]

    def __len__(self) -> int:
        return len(self.digests)


def read_content(folder: Path, layout: Layout, row_dtype: torch.dtype) -> tuple[Content, list[str]]:
    """What a trajectory holds, and a sentence for each file that cannot be read.

    Args:
        folder: of the trajectory.
        layout: of its store.
        row_dtype: of its store.
    """
    chunks, problems = read_chunks(folder, layout, row_dtype)
    everything, more = read_chunks(folder, layout, row_dtype, with_sparse=True)
    found = [chunk for chunk in everything if chunk.window is not None] + chunks
    digests: dict[int, bytes] = {}
    places: dict[int, tuple[Path, int]] = {}
    if any(map(len, found)):  # or else nothing tells that the layout is a possible one
        columns = watched_columns(layout)  # (c,)
        for chunk in found:
            values = chunk.gather(columns, torch.arange(len(chunk)))  # (n, c)
            for row, step in enumerate(chunk.steps):
                digests[step] = hashlib.sha256(_bytes(values[row])).digest()[:16]
                places[step] = (chunk.path, row)
    return Content(tuple(chunk.path for chunk in found if len(chunk)), digests, places), list(
        dict.fromkeys(problems + more)
    )


def is_within(one: Content, other: Content, layout: Layout, row_dtype: torch.dtype) -> bool:
    """Whether ``other`` holds every snapshot that ``one`` holds, bit for bit."""
    if not one.digests.items() <= other.digests.items():
        return False

    @lru_cache(maxsize=2)
    def opened(path: Path) -> Chunk:
        return read_chunk(path, layout, row_dtype)

    def values(place: tuple[Path, int]) -> bytes:
        path, row = place
        return _bytes(opened(path).columns(0, layout.num_values, torch.tensor([row])))

    for step, place in one.places.items():
        there = other.places[step]
        is_same_file = place[1] == there[1] and place[0].samefile(there[0])
        if not is_same_file and values(place) != values(there):
            return False
    return True


def _bytes(values: Tensor) -> bytes:
    # By way of bytes: NumPy knows no bfloat16, and NaN is not equal to itself.
    return bytes(values.contiguous().flatten().view(torch.uint8).numpy().data)
