"""The chunk file of a trajectory: one format, one place that writes and reads it.

    chunk-000001.safetensors   "rows" (n, D) in layout order, "steps" (n,) int64; the header holds, as text, ``format``,
                               ``format_version`` and two JSON lists, ``epochs`` and ``metrics``, one entry per row;
                               also ``planned_last_step``, the step that the run's last row is planned for, if known
    sparse-000001.safetensors  the same for rows from before the window; the header also holds ``window``, a JSON object

Shapes: n rows in a chunk, m of them wanted, D values in a row, c columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pdiff_plugin.errors import FormatError
from pdiff_plugin.snapshots.files import is_number
from pdiff_plugin.snapshots.layout import FORMAT, FORMAT_VERSION, Layout
from pdiff_plugin.snapshots.tensor_files import from_json, load_header, load_tensors, save_tensors

CHUNK_NAME = re.compile(r"chunk-(\d{6,})\.safetensors")
SPARSE_NAME = re.compile(r"sparse-(\d{6,})\.safetensors")
_LEFT_OUT = "Its snapshots are left out."


@dataclass(frozen=True)
class PlannedWindow:
    """The window that sparse rows were taken before.

    Attributes:
        first_step: its first step.
        total_steps: planned length of the run.
        num_enough: once the trajectory has so many rows of its window, sparse ones do not count any more.
    """

    first_step: int
    total_steps: int
    num_enough: int


@dataclass(frozen=True)
class Chunk:
    """One open chunk file. Its rows are mapped: only what is copied out of them is read."""

    path: Path
    steps: list[int]
    epochs: list[float | None]
    metrics: list[dict[str, float]]
    _rows: Tensor
    window: PlannedWindow | None = None  # of sparse rows
    planned_last_step: int | None = None  # that of the run's last row, if it gets there

    def __len__(self) -> int:
        return len(self.steps)

    def columns(self, lo: int, hi: int, rows: Tensor | None = None) -> Tensor:
        """Columns [lo, hi) of the rows at ``rows`` (m,), or of all: (m, hi - lo), possibly a view of the file."""
        some = self._rows[:, lo:hi]
        return some if rows is None else some[rows]

    def gather(self, columns: Tensor, rows: Tensor) -> Tensor:
        """Values at any ``columns`` (c,) of the rows at ``rows`` (m,), both int64: (m, c)."""
        return self._rows.index_select(1, columns)[rows]

    def parts(self, lo: int, hi: int, rows: Tensor) -> Iterator[tuple[Chunk, Tensor, int, int]]:
        """The files that columns [lo, hi) of the rows at ``rows`` (m,) are in, side by side: file, the rows in it (m,),
        and columns [first, last) of its own."""
        yield self, rows, lo, hi

    def byte_range(self, row: int, lo: int, hi: int) -> tuple[int, int]:
        """Bytes [start, stop) behind the beginning of all rows in which columns [lo, hi) of a row are."""
        width, size = self._rows.shape[1], self._rows.element_size()
        return (row * width + lo) * size, (row * width + hi) * size

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype


def save_chunk(
    path: Path,
    rows: Tensor,
    steps: Sequence[int],
    epochs: Sequence[float | None] | None = None,
    metrics: Sequence[Mapping[str, float]] | None = None,
    window: PlannedWindow | None = None,
    planned_last_step: int | None = None,
) -> None:
    """Write one chunk file, rows (n, D); with ``window`` one of sparse rows."""
    tensors = {"rows": rows, "steps": torch.tensor(list(steps), dtype=torch.int64)}
    header = {
        "epochs": json.dumps(list(epochs) if epochs else [None] * len(steps)),
        "metrics": json.dumps([dict(m) for m in metrics] if metrics else [{}] * len(steps)),
    }
    if window is not None:
        header["window"] = json.dumps(asdict(window))
    if planned_last_step is not None:
        header["planned_last_step"] = str(planned_last_step)
    save_tensors(path, tensors, FORMAT, FORMAT_VERSION, header)


def read_chunk(path: Path, layout: Layout, row_dtype: torch.dtype) -> Chunk:
    """Open one chunk.

    Raises:
        FormatError: truncated, of another format, or not what ``layout`` and ``row_dtype`` say.
        FormatVersionError: from a newer release.
    """
    tensors, header = load_tensors(path, FORMAT, FORMAT_VERSION)
    epochs, metrics = from_json(path, header, "epochs"), from_json(path, header, "metrics")
    rows, steps = tensors.get("rows"), tensors.get("steps")
    if rows is None or steps is None:
        raise FormatError(str(path), f"the tensors {', '.join(tensors) or '(none)'}", "rows and steps")
    if steps.dtype != torch.int64 or steps.ndim != 1:
        raise FormatError(str(path), f"steps of {steps.dtype} {tuple(steps.shape)}", "torch.int64 (n,)")
    if len(steps) and not (steps[0] >= 0 and bool((steps.diff() > 0).all())):
        raise FormatError(str(path), "steps that do not rise", "whole numbers from 0, each above the one before")
    n = len(steps)
    if rows.dtype != row_dtype or tuple(rows.shape) != (n, layout.num_values):
        expected = f"{row_dtype} ({n}, {layout.num_values})"
        raise FormatError(str(path), f"rows of {rows.dtype} {tuple(rows.shape)}", expected)
    if not (_is_list(epochs, n) and all(epoch is None or is_number(epoch) for epoch in epochs)):
        raise FormatError(str(path), "other epochs", f"{n} numbers or nulls")
    if not (_is_list(metrics, n) and all(isinstance(m, dict) and all(map(is_number, m.values())) for m in metrics)):
        raise FormatError(str(path), "other metrics", f"{n} objects of name -> number")
    window = _window(path, header) if SPARSE_NAME.fullmatch(path.name) else None
    planned = header.get("planned_last_step")
    if planned is not None and not re.fullmatch(r"[1-9]\d{0,17}", planned):
        raise FormatError(str(path), f"planned_last_step {planned!r}", "a whole number from 1")
    return Chunk(path, steps.tolist(), epochs, metrics, rows, window, int(planned) if planned else None)


def _window(path: Path, header: Mapping[str, str]) -> PlannedWindow:
    found = from_json(path, header, "window")
    names = PlannedWindow.__dataclass_fields__
    if not (isinstance(found, dict) and all(type(found.get(name)) is int and found[name] > 0 for name in names)):
        raise FormatError(str(path), f"window {found!r}", f"an object of {', '.join(names)}")
    return PlannedWindow(**{name: found[name] for name in names})


def read_window(folder: Path) -> PlannedWindow | None:
    """The window that the sparse rows of a trajectory were taken before, as the newest of them say; None without any.

    Raises:
        FormatError: they cannot be read.
        FormatVersionError: from a newer release.
    """
    for path in reversed(chunk_files(folder, SPARSE_NAME)):
        try:
            return _window(path, load_header(path, FORMAT, FORMAT_VERSION))
        except FileNotFoundError:
            continue  # dropped meanwhile
    return None


def chunk_files(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Files of ``folder`` that are called ``name``, by their numbers."""
    return sorted((p for p in folder.iterdir() if name.fullmatch(p.name)), key=lambda p: (len(p.name), p.name))


def read_chunks(
    folder: Path, layout: Layout, row_dtype: torch.dtype, *, with_sparse: bool = False
) -> tuple[list[Chunk], list[str]]:
    """All readable chunks of a trajectory in order, and a sentence for each that is not, or whose steps are no later
    than those before; with those of rows from before the window, if asked for.

    Anything else in the folder (temporary files of a killed writer, strays) is ignored.
    """
    found: list[Chunk] = []
    problems: list[str] = []
    for path in chunk_files(folder, CHUNK_NAME) + (chunk_files(folder, SPARSE_NAME) if with_sparse else []):
        try:
            found.append(read_chunk(path, layout, row_dtype))
        except FileNotFoundError:
            continue  # a ring has dropped it meanwhile
        except FormatError as error:
            problems.append(f"{error} {_LEFT_OUT}")
    if any(chunk.window for chunk in found):
        # A run that was prolonged has sparse rows behind those of its first window, too.
        found.sort(key=lambda chunk: chunk.steps[:1])
    chunks: list[Chunk] = []
    last = -1
    for chunk in found:
        if chunk.steps and chunk.steps[0] <= last:
            expected = f"steps above {last}, the last of the chunk before"
            problems.append(f"{FormatError(str(chunk.path), f'step {chunk.steps[0]} first', expected)} {_LEFT_OUT}")
        else:
            chunks.append(chunk)
            last = chunk.steps[-1] if chunk.steps else last
    return chunks, problems


def _is_list(found: object, length: int) -> bool:
    return isinstance(found, list) and len(found) == length
