"""Writing snapshots: the layout of a new store, and the chunks of one trajectory.

Shapes: n rows in a chunk, D values in a row.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.errors import FormatError, TrajectoryExistsError
from pdiff_plugin.snapshots.base import write_base
from pdiff_plugin.snapshots.chunks import CHUNK_NAME, read_chunk, read_chunks, save_chunk
from pdiff_plugin.snapshots.files import ABANDONED_S, created, remove_strays
from pdiff_plugin.snapshots.layout import DTYPE_NAMES, FORMAT, FORMAT_VERSION, LAYOUT_NAME, Layout, read_layout
from pdiff_plugin.snapshots.ownership import Ownership
from pdiff_plugin.snapshots.shards import next_free_trajectory

logger = logging.getLogger(__name__)


class TrajectoryWriter:
    """Adds chunks to one trajectory of a store, which it creates where needed, and which is its own until it is closed.

    Args:
        path: the store's folder.
        layout: the tensors of a row; must be the store's own if it has one.
        row_dtype: of the rows on disk; an existing store's own dtype wins.
        trajectory: id; the next free ``run-001``, ``run-002``, ... unless given.
        resume_step: continue that trajectory after this step; rows past it are dropped.

    Raises:
        LayoutMismatchError: the store holds snapshots of other tensors.
        TrajectoryExistsError: the trajectory holds snapshots and ``resume_step`` was not given.
        TrajectoryInUseError: another writer has it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Layout,
        row_dtype: torch.dtype = torch.float32,
        trajectory: str | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.row_dtype = _create_layout(self.path, layout, row_dtype)
        self.trajectory, self.folder = _claim_trajectory(self.path, trajectory)
        self._ownership = Ownership(self.folder)
        try:
            self._read(resume_step)
        except BaseException:
            self.close()
            raise

    def _read(self, resume_step: int | None) -> None:
        """Find what the trajectory holds, and drop what comes after ``resume_step``."""
        remove_strays(self.path, min_age_s=ABANDONED_S)
        remove_strays(self.folder, min_age_s=0.0)
        chunks, problems = read_chunks(self.folder, self.layout, self.row_dtype)
        if chunks and resume_step is None:
            raise TrajectoryExistsError(str(self.folder), sum(len(chunk.steps) for chunk in chunks))
        for problem in problems:
            logger.warning(problem)
        numbers = [int(m[1]) for m in map(CHUNK_NAME.fullmatch, os.listdir(self.folder)) if m]
        self._next_chunk = max(numbers, default=0) + 1
        self._chunks = [(chunk.path, list(chunk.steps)) for chunk in chunks]
        if resume_step is not None:
            num_found = self.num_rows
            self._keep_rows(lambda steps: [i for i, step in enumerate(steps) if step <= resume_step])
            if num_found > self.num_rows:
                num_dropped = num_found - self.num_rows
                logger.warning("dropped %d snapshots past step %d from %s", num_dropped, resume_step, self.folder)

    @property
    def num_rows(self) -> int:
        return sum(len(steps) for _, steps in self._chunks)

    @property
    def last_step(self) -> int:
        """Step of the newest row, 0 when there is none."""
        return self._chunks[-1][1][-1] if self._chunks else 0

    def write_chunk(
        self,
        rows: Tensor,
        steps: Sequence[int],
        epochs: Sequence[float | None] | None = None,
        metrics: Sequence[Mapping[str, float]] | None = None,
    ) -> Path:
        """Write ``rows`` (n, D) as the next chunk and return its path. It exists whole or not at all."""
        self._ownership.check()
        self._ownership.beat()
        path = self.folder / f"chunk-{self._next_chunk:06d}.safetensors"
        save_chunk(path, rows.to(self.row_dtype), steps, epochs, metrics)
        self._next_chunk += 1
        self._chunks.append((path, list(steps)))
        return path

    def drop_oldest(self, keep: int, *, exactly: bool = False) -> None:
        """Delete the oldest chunks that the newest ``keep`` rows do not need; ``exactly`` also cuts into one."""
        while self._chunks and self.num_rows - len(self._chunks[0][1]) >= keep:
            self._chunks.pop(0)[0].unlink(missing_ok=True)
        surplus = self.num_rows - keep
        if exactly and surplus > 0:
            first = self._chunks[0][1][surplus]
            self._keep_rows(lambda steps: [i for i, step in enumerate(steps) if step >= first])

    def write_base(self, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
        """Write the whole model, as :func:`write_base` does."""
        self._ownership.check()
        write_base(self.folder, state, header)

    def beat(self) -> None:
        """Say that this writer lives; to be called every few seconds."""
        self._ownership.beat()

    def close(self) -> None:
        """Leave the trajectory to other writers. May be called again."""
        self._ownership.release()

    def _keep_rows(self, keep: Any) -> None:
        kept = []
        for path, steps in self._chunks:
            rows = keep(steps)
            if not rows:
                path.unlink(missing_ok=True)
                continue
            if len(rows) < len(steps):
                chunk = read_chunk(path, self.layout, self.row_dtype)
                save_chunk(
                    path,
                    chunk.columns(0, self.layout.num_values, torch.tensor(rows)),
                    [steps[i] for i in rows],
                    [chunk.epochs[i] for i in rows],
                    [chunk.metrics[i] for i in rows],
                )
            kept.append((path, [steps[i] for i in rows]))
        self._chunks = kept


def _create_layout(path: Path, layout: Layout, row_dtype: torch.dtype) -> torch.dtype:
    path.mkdir(parents=True, exist_ok=True)
    target = path / LAYOUT_NAME
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "row_dtype": DTYPE_NAMES[row_dtype],
        "num_values": layout.num_values,
        "tensors": layout.to_json(),
    }
    if not target.exists():
        created(target, json.dumps(document, indent=2) + "\n")
    found, row_dtype = read_layout(path)
    found.check_same(layout, f"the store {path}")
    return row_dtype


def _claim_trajectory(store: Path, trajectory: str | None) -> tuple[str, Path]:
    parent = store / "trajectories"
    parent.mkdir(exist_ok=True)
    if trajectory is not None:
        if not re.fullmatch(r"[\w.+=-]+", trajectory) or trajectory.startswith("."):
            raise FormatError(
                str(parent), f"trajectory id {trajectory!r}", "letters, digits and . _ + = - only", "Choose another."
            )
        # A reader takes the ranks' rows for the whole trajectory from their first step on.
        if sharded := list(store.glob(f"shards/*/trajectories/{glob.escape(trajectory)}/chunk-*.safetensors")):
            raise TrajectoryExistsError(str(sharded[0].parent), len(sharded))
        (parent / trajectory).mkdir(exist_ok=True)
        return trajectory, parent / trajectory
    while True:
        name = next_free_trajectory(store)
        with suppress(FileExistsError):  # another writer was first
            (parent / name).mkdir()
            return name, parent / name
