"""Writing snapshots in the background: a training step pays for one copy, a thread for the files.

Rows are copied into preallocated buffers. A buffer is closed, and becomes one chunk of the store, when it is full (64
rows or 64 MiB) or 10 s after its first row. With all buffers waiting for the disk the training step waits too: no row
is ever dropped. When writing fails (a full disk), recording stops with one warning and training goes on.

Shapes: R rows in a buffer, D values in a row.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdiff_plugin.recording.window import Window
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

logger = logging.getLogger(__name__)

CHUNK_ROWS = 64
CHUNK_BYTES = 64 * 2**20
CHUNK_SECONDS = 10.0
NUM_BUFFERS = 3
# Of rows that are a chunk each: one is written while the next is taken, and memory may be short.
NUM_LARGE_BUFFERS = 2


class RowInfo(NamedTuple):  # made in every step, for which a dataclass takes twice as long
    """What is stored beside a row. Metrics may still be tensors on a device; the thread makes them numbers."""

    step: int
    epoch: float | None = None
    metrics: Mapping[str, Any] = MappingProxyType({})


class _Buffer:
    """Memory for one chunk and, per row, views in it that have the shapes of the recorded tensors."""

    def __init__(self, layout: Layout, dtype: torch.dtype, num_rows: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.rows = torch.empty(num_rows, layout.num_values, dtype=dtype, pin_memory=on_cuda)  # (R, D)
        self.found_inf = torch.zeros(num_rows, dtype=torch.float32, pin_memory=on_cuda)  # (R,)
        self.views = [_views(row, layout) for row in self.rows]
        self.infos: list[RowInfo] = []
        self.opened_at = 0.0
        self.copied: torch.cuda.Event | None = None  # after the newest row's copy from the device


class BackgroundWriter:
    """One thread that turns rows into chunks of one trajectory.

    Args:
        open_trajectory: called by the thread before the first write.
        layout: of the rows.
        dtype: of the rows.
        device: where the tensors live.
        window: what must stay on disk; everything unless given.
    """

    def __init__(
        self,
        open_trajectory: Callable[[], TrajectoryWriter],
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        window: Window | None = None,
    ) -> None:
        self.layout, self._window = layout, window
        # Rows before this step go to chunks of their own.
        self._first = window.first if window is not None else 0
        self.error: Exception | None = None
        self.trajectory: TrajectoryWriter | None = None
        self._open_trajectory = open_trajectory
        row_bytes = layout.num_values * dtype.itemsize
        self.chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(row_bytes, 1)))
        self._new_buffer = partial(_Buffer, layout, dtype, self.chunk_rows, device)
        # Buffers are made when needed: a quick writer needs two of them.
        self._num_unmade = NUM_BUFFERS if self.chunk_rows > 1 else NUM_LARGE_BUFFERS
        self._free: list[_Buffer] = []
        self._full: deque[_Buffer | Callable[[TrajectoryWriter], None]] = deque()
        self._current: _Buffer | None = None
        # One kernel gathers the tensors on the device, one copy brings them over.
        self._staging = torch.empty(layout.num_values, dtype=dtype, device=device) if device.type == "cuda" else None
        self._staging_views = _views(self._staging, layout) if self._staging is not None else []
        self._changed = threading.Condition()
        self._no_grad = torch.no_grad()  # making one, or decorating with it, costs a small model's step a tenth
        self._idle = True
        self._closing = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="pdiff-writer", daemon=True)
        self._thread.start()

    @property
    def is_active(self) -> bool:
        """Whether rows are still taken: not after a failure or ``close``, and not in a forked child."""
        return self.error is None and not self._closing and os.getpid() == self._pid

    def add(self, tensors: Sequence[Tensor], info: RowInfo, found_inf: Tensor | None = None) -> bool:
        """Copy ``tensors`` (in layout order) as the next row; whether it was taken.

        Args:
            tensors: live tensors; they may change as soon as this returns.
            info: stored beside the row.
            found_inf: on a CUDA device, the gradient scaler's verdict; the row is dropped if it is not 0.
        """
        if not self.is_active:
            return False
        with self._changed, self._no_grad:
            buffer = self._current
            if buffer is not None and buffer.infos and buffer.infos[0].step < self._first <= info.step:
                self._close_chunk()
            buffer = self._current or self._take_buffer()
            if buffer is None:
                return False
            index = len(buffer.infos)
            if self._staging is None:
                torch._foreach_copy_(buffer.views[index], list(tensors))
            else:
                torch._foreach_copy_(self._staging_views, list(tensors))
                buffer.rows[index].copy_(self._staging, non_blocking=True)
                buffer.found_inf[index] = 0.0
                if found_inf is not None:
                    buffer.found_inf[index].copy_(found_inf.reshape(()), non_blocking=True)
                buffer.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                buffer.copied.record(torch.cuda.current_stream(self._staging.device))
            if not buffer.infos:
                buffer.opened_at = time.monotonic()
            buffer.infos.append(info)
            if len(buffer.infos) == self.chunk_rows:
                self._close_chunk()
        return True

    def submit(self, job: Callable[[TrajectoryWriter], None]) -> None:
        """Run ``job`` in the thread after the rows so far."""
        if self.is_active:
            with self._changed:
                self._close_chunk()
                self._full.append(job)
                self._changed.notify_all()

    def flush(self) -> None:
        """Return when every row so far is on disk, or writing has failed. Opens the trajectory if need be."""
        if not self.is_active:
            return
        with self._changed:
            self._close_chunk()
            if self.trajectory is None:
                self._full.append(lambda _: None)
                self._changed.notify_all()
            while self.error is None and (self._full or not self._idle):
                self._changed.wait()

    def close(self) -> None:
        """Write what is left, delete what is not to be kept and end the thread. May be called again."""
        if os.getpid() != self._pid or self._closing:
            return
        if self.trajectory is not None or self._current is not None or self._full:
            self.submit(partial(self._thin_out, exactly=True))
            self.flush()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._free.clear()

    def _take_buffer(self) -> _Buffer | None:
        while not self._free and not self._num_unmade and self.error is None:
            self._changed.wait()
        if self.error is not None:
            return None
        if not self._free:
            self._num_unmade -= 1
            self._free.append(self._new_buffer())
        self._current = self._free.pop()
        return self._current

    def _close_chunk(self) -> None:
        if self._current is not None:
            self._full.append(self._current)
            self._current = None
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            if self.trajectory is not None:
                self.trajectory.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._full and not self._closing:
                    # The open chunk's age is looked at now and then, so that its first row need not wake this thread.
                    self._changed.wait(CHUNK_SECONDS / 10)
                    if self.trajectory is not None:
                        self.trajectory.beat()
                    current = self._current
                    if current is not None and time.monotonic() - current.opened_at >= CHUNK_SECONDS:
                        self._close_chunk()
                if not self._full:
                    return
                job = self._full.popleft()
                self._idle = False
            try:
                self._write(job)
            except Exception as error:
                # Training must go on: the error is kept for the recorder, and recording stops here.
                logger.warning("recording stopped, training goes on; snapshots written so far stay readable: %s", error)
                self.error = error
            with self._changed:
                self._idle = True
                if isinstance(job, _Buffer):
                    job.infos = []
                    self._free.append(job)
                if self.error is not None:
                    self._full.clear()
                    self._current = None
                    self._free.clear()
                self._changed.notify_all()
                if self.error is not None:
                    return

    def _write(self, job: _Buffer | Callable[[TrajectoryWriter], None]) -> None:
        if self.trajectory is None:
            self.trajectory = self._open_trajectory()
        if not isinstance(job, _Buffer):
            job(self.trajectory)
            return
        rows, infos = job.rows[: len(job.infos)], job.infos
        if job.copied is not None:
            job.copied.synchronize()
            taken = [i for i, bad in enumerate(job.found_inf[: len(infos)].tolist()) if bad == 0.0]
            if len(taken) < len(infos):  # which copies them
                rows, infos = rows[taken], [infos[i] for i in taken]
        if not infos:
            return
        planned = self._window.planned if self._window is not None and infos[0].step < self._first else None
        self.trajectory.write_chunk(
            rows,
            [i.step for i in infos],
            [i.epoch for i in infos],
            [_numbers(i.metrics) for i in infos],
            planned,
            self._window.last if self._window is not None else None,
        )
        self._thin_out(self.trajectory)

    def _thin_out(self, trajectory: TrajectoryWriter, *, exactly: bool = False) -> None:
        """Delete the rows that the window does not keep; ``exactly`` also cuts into chunks."""
        window = self._window
        if window is None:
            return
        if window.total_steps is None:
            trajectory.drop_oldest(window.num_rows, exactly=exactly)
        elif trajectory.num_window_rows >= window.num_enough:
            trajectory.drop_sparse()
        elif window.sparse_every is not None:
            trajectory.drop_sparse(window.kept_from(trajectory.last_step), exactly=exactly)


def _views(row: Tensor, layout: Layout) -> list[Tensor]:
    return [row[layout.slices[spec.name]].view(spec.shape) for spec in layout]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
