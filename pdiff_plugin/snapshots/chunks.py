"""The chunk file and the base file of a trajectory: one format, one place that writes and reads it.

    chunk-000001.safetensors   "rows" (n, D) in layout order, "steps" (n,) int64; the header holds, as text, ``format``,
                               ``format_version`` and two JSON lists, ``epochs`` and ``metrics``, one entry per row
    base.safetensors           the whole model at the end of the recording window

Shapes: n rows in a chunk, D values in a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdiff_plugin.errors import FormatError
from pdiff_plugin.snapshots.files import check_format, replacing
from pdiff_plugin.snapshots.layout import Layout

FORMAT = "pdiff-snapshots"
FORMAT_VERSION = 1
CHUNK_NAME = re.compile(r"chunk-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Chunk:
    """One open chunk file; ``handle`` is its memory map."""

    path: Path
    handle: Any
    steps: list[int]
    epochs: list[float | None]
    metrics: list[dict[str, float]]

    @cached_property
    def rows(self) -> Tensor:
        """(n, D), mapped: only what is copied out of it is read."""
        rows: Tensor = self.handle.get_tensor("rows")
        return rows


def save_chunk(
    path: Path,
    rows: Tensor,
    steps: Sequence[int],
    epochs: Sequence[float | None] | None = None,
    metrics: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Write one chunk file, rows (n, D)."""
    tensors = {"rows": rows.contiguous(), "steps": torch.tensor(list(steps), dtype=torch.int64)}
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "epochs": json.dumps(list(epochs) if epochs else [None] * len(steps)),
        "metrics": json.dumps([dict(m) for m in metrics] if metrics else [{}] * len(steps)),
    }
    with replacing(path) as temp:
        save_file(tensors, temp, header)


def read_chunk(path: Path, layout: Layout) -> Chunk:
    """Open one chunk.

    Raises:
        FormatError: truncated, of another format, or of another width than ``layout``.
        FormatVersionError: from a newer release.
    """
    try:
        handle: Any = safe_open(path, framework="pt")
        header = handle.metadata() or {}
        check_format(str(path), header, FORMAT, FORMAT_VERSION)
        steps = handle.get_tensor("steps").tolist()
        shape = handle.get_slice("rows").get_shape()
        epochs, metrics = json.loads(header["epochs"]), json.loads(header["metrics"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise FormatError(str(path), f"an unreadable chunk ({error})", "a complete safetensors file") from error
    if list(shape) != [len(steps), layout.num_values]:
        raise FormatError(str(path), f"rows of shape {shape}", f"({len(steps)}, {layout.num_values})")
    return Chunk(path, handle, steps, epochs, metrics)


def read_chunks(folder: Path, layout: Layout) -> tuple[list[Chunk], list[str]]:
    """All readable chunks of a trajectory in order, and a sentence for each that is not.

    Anything else in the folder (temporary files of a killed writer, strays) is ignored.
    """
    chunks, problems = [], []
    for path in sorted(
        (p for p in folder.iterdir() if CHUNK_NAME.fullmatch(p.name)), key=lambda p: (len(p.name), p.name)
    ):
        try:
            chunks.append(read_chunk(path, layout))
        except FormatError as error:
            problems.append(f"{error} Its snapshots are left out.")
    return chunks, problems


def write_base(folder: Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write the whole model; tensors that share memory are stored once and their other names in the header."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    text = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "aliases": json.dumps(aliases),
        **header,
    }
    with replacing(folder / "base.safetensors") as temp:
        save_file(unique, temp, text)


def read_base_header(folder: Path) -> dict[str, str]:
    """What the base file of a trajectory says of itself, empty without one."""
    path = folder / "base.safetensors"
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
