"""Writing snapshots: the layout of a new store, and the chunks of one trajectory.

Shapes: n rows in a chunk, D values in a row.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pdiff_plugin.errors import FormatError, TrajectoryExistsError
from pdiff_plugin.snapshots.base import BASE_NAME, write_base
from pdiff_plugin.snapshots.chunks import (
    CHUNK_NAME,
    SPARSE_NAME,
    Chunk,
    PlannedWindow,
    chunk_files,
    read_chunk,
    read_chunks,
    save_chunk,
)
from pdiff_plugin.snapshots.conditions import FILE_NAME as CONDITION_NAME
from pdiff_plugin.snapshots.files import ABANDONED_S, created, remove_strays
from pdiff_plugin.snapshots.layout import DTYPE_NAMES, FORMAT, FORMAT_VERSION, LAYOUT_NAME, Layout, read_layout
from pdiff_plugin.snapshots.ownership import Ownership
from pdiff_plugin.snapshots.shards import next_free_trajectory

logger = logging.getLogger(__name__)

_Written = tuple[Path, list[int]]  # a chunk and its steps


class TrajectoryWriter:
    """Adds chunks to one trajectory of a store, which it creates where needed, and which is its own until it is closed.

    Args:
        path: the store's folder.
        layout: the tensors of a row; must be the store's own if it has one.
        row_dtype: of the rows on disk; an existing store's own dtype wins.
        trajectory: id; the next free ``run-001``, ``run-002``, ... unless given.
        resume_step: continue that trajectory after this step; rows past it are dropped.

    Rows from before the window of a run that did not get there are in nobody's way: a new run replaces them.

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
        self.row_dtype = create_layout(self.path, layout, row_dtype)
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
        chunks, problems = read_chunks(self.folder, self.layout, self.row_dtype, with_sparse=True)
        if resume_step is None and (of_window := [chunk for chunk in chunks if chunk.window is None]):
            raise TrajectoryExistsError(str(self.folder), sum(map(len, of_window)))
        for problem in problems:
            logger.warning(problem)
        if resume_step is None and chunks:
            self._replace(chunks)
            chunks = []
        self._next_numbers = {
            kind: max((int(path.stem.rpartition("-")[2]) for path in chunk_files(self.folder, name)), default=0) + 1
            for kind, name in (("chunk", CHUNK_NAME), ("sparse", SPARSE_NAME))
        }
        self._chunks = [(chunk.path, chunk.steps) for chunk in chunks if chunk.window is None]
        self._sparse = [(chunk.path, chunk.steps) for chunk in chunks if chunk.window is not None]
        if resume_step is not None:
            num_found = self.num_rows
            for kind in (self._chunks, self._sparse):
                self._keep_rows(kind, lambda step: step <= resume_step)
            if num_found > self.num_rows:
                num_dropped = num_found - self.num_rows
                logger.warning("dropped %d snapshots past step %d from %s", num_dropped, resume_step, self.folder)

    def _replace(self, chunks: Sequence[Chunk]) -> None:
        """Delete what a run left that did not get to its window."""
        newest, window = chunks[-1], chunks[-1].window
        assert window is not None
        logger.warning(
            "%d snapshots of an unfinished run in %s are replaced: it got to step %d of %d, and its window was to "
            "begin at step %d",
            *(sum(map(len, chunks)), self.folder, newest.steps[-1], window.total_steps, window.first_step),
        )
        # The base and the condition first: they must not be taken for those of what comes.
        for path in (self.folder / BASE_NAME, self.folder / CONDITION_NAME, *chunk_files(self.folder, SPARSE_NAME)):
            path.unlink(missing_ok=True)

    @property
    def num_rows(self) -> int:
        return self.num_window_rows + len(self.sparse_steps)

    @property
    def num_window_rows(self) -> int:
        """Rows that are not from before the window."""
        return sum(len(steps) for _, steps in self._chunks)

    @property
    def sparse_steps(self) -> list[int]:
        """Steps of the rows from before the window."""
        return [step for _, steps in self._sparse for step in steps]

    @property
    def last_step(self) -> int:
        """Step of the newest row, 0 when there is none."""
        return max((steps[-1] for _, steps in self._chunks[-1:] + self._sparse[-1:]), default=0)

    def write_chunk(
        self,
        rows: Tensor,
        steps: Sequence[int],
        epochs: Sequence[float | None] | None = None,
        metrics: Sequence[Mapping[str, float]] | None = None,
        window: PlannedWindow | None = None,
        planned_last_step: int | None = None,
    ) -> Path:
        """Write ``rows`` (n, D) as the next chunk and return its path. It exists whole or not at all.

        With ``window`` they are rows from before that. ``planned_last_step`` is that of the run's last row.
        """
        self._ownership.check()
        self._ownership.beat()
        kind, chunks = ("chunk", self._chunks) if window is None else ("sparse", self._sparse)
        path = self.folder / f"{kind}-{self._next_numbers[kind]:06d}.safetensors"
        save_chunk(path, rows.to(self.row_dtype), steps, epochs, metrics, window, planned_last_step)
        self._next_numbers[kind] += 1
        chunks.append((path, list(steps)))
        return path

    def drop_oldest(self, keep: int, *, exactly: bool = False) -> None:
        """Delete the oldest chunks that the newest ``keep`` rows do not need; ``exactly`` also cuts into one."""
        if self.num_window_rows > keep:
            steps = [step for _, steps in self._chunks for step in steps]
            self._drop_before(self._chunks, steps[-keep], exactly)

    def drop_sparse(self, before: int | None = None, *, exactly: bool = False) -> None:
        """Delete the rows from before the window, or the chunks of those that are older than step ``before``;
        ``exactly`` also cuts into one.
        """
        if before is None:
            self._keep_rows(self._sparse, lambda step: False)
        else:
            self._drop_before(self._sparse, before, exactly)

    def _drop_before(self, chunks: list[_Written], first: int, exactly: bool) -> None:
        while chunks and chunks[0][1][-1] < first:
            chunks.pop(0)[0].unlink(missing_ok=True)
        if exactly:
            self._keep_rows(chunks, lambda step: step >= first)

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

    def _keep_rows(self, chunks: list[_Written], is_kept: Callable[[int], bool]) -> None:
        """Delete the rows of all other steps from ``chunks``."""
        kept: list[_Written] = []
        for path, steps in chunks:
            rows = [i for i, step in enumerate(steps) if is_kept(step)]
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
                    chunk.window,
                    chunk.planned_last_step,
                )
            kept.append((path, [steps[i] for i in rows]))
        chunks[:] = kept


def create_layout(path: Path, layout: Layout, row_dtype: torch.dtype) -> torch.dtype:
    """Begin a store, unless it is there: the dtype of its rows.

    Raises:
        LayoutMismatchError: it is, and holds other tensors.
    """
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
        ranks = f"shards/*/trajectories/{glob.escape(trajectory)}"
        if sharded := [*store.glob(f"{ranks}/chunk-*.safetensors"), *store.glob(f"{ranks}/sparse-*.safetensors")]:
            raise TrajectoryExistsError(str(sharded[0].parent), len(sharded))
        (parent / trajectory).mkdir(exist_ok=True)
        return trajectory, parent / trajectory
    while True:
        name = next_free_trajectory(store)
        with suppress(FileExistsError):  # another writer was first
            (parent / name).mkdir()
            return name, parent / name
