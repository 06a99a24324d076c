"""Where a fit runs: the few things its stages need from a process, or from a group of them.

The stages in ``fit.py`` are written against :class:`Runtime`. In one process that is all there is to it;
:class:`GroupRuntime` is the same for a process group of ``torch.distributed``, whoever started it. Nothing here imports
Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pdiff_plugin.errors import FormatError
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.files import reading
from pdiff_plugin.snapshots.tensor_files import from_json, load_tensors, save_tensors

T = TypeVar("T")

CHECKPOINT_FORMAT = "pdiff-fit-checkpoint"
CHECKPOINT_VERSION = 1
CHECKPOINT_SUFFIX = ".checkpoint.safetensors"
# Columns travel to rank 0 in pieces of this size, so that they are never in memory a second time.
_PIECE_BYTES = 1 << 24


class Runtime:
    """One process: rank 0 of 1, with checkpoints as files in ``folder`` (none if it is None).

    Args:
        folder: where checkpoints go.
        on_progress: told how the stages get on.
    """

    rank = 0
    world_size = 1

    def __init__(self, folder: Path | None = None, on_progress: OnProgress | None = None) -> None:
        self.folder, self.on_progress = folder, on_progress

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return tensor

    def on_rank_0(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, or raises, on rank 0: the same on every rank."""
        return call()

    def share(self, total: int) -> slice:
        """This rank's part of ``total`` items: contiguous, in the order of ranks, nearly equal."""
        return slice(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size)

    def sum_gradients(self, parameters: Iterable[Tensor], value: Tensor) -> Tensor:
        """Add up the parameters' gradients over ranks, in place, and return the sum of ``value``, a scalar."""
        del parameters
        return value

    def join_columns(self, part: Tensor, empty: Callable[[int], Tensor]) -> Tensor:
        """Put the columns that the ranks hold side by side on rank 0.

        Args:
            part: this rank's ``share`` of the columns, (K, own columns).
            empty: makes the result from its number of columns.

        Returns:
            (K, all columns) on rank 0, ``part`` elsewhere.
        """
        del empty
        return part

    def report(self, stage: str, step: int, total_steps: int, **metrics: float) -> None:
        """Tell whoever watches; costs nothing when nobody does."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage, step, total_steps, metrics))

    def save_checkpoint(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep ``tensors`` and the JSON-able ``state`` of a stage until the fit is finished."""
        if self.folder is None or self.rank != 0:
            return
        path = self.folder / f"{name}{CHECKPOINT_SUFFIX}"
        save_tensors(path, tensors, CHECKPOINT_FORMAT, CHECKPOINT_VERSION, {"state": json.dumps(state)})

    def load_checkpoint(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`save_checkpoint` kept under ``name``, or None."""
        path = self.folder / f"{name}{CHECKPOINT_SUFFIX}" if self.folder else None
        if path is None or not path.is_file():
            return None
        with self.restoring(name):
            tensors, header = load_tensors(path, CHECKPOINT_FORMAT, CHECKPOINT_VERSION)
            state = from_json(path, header, "state")
            if not isinstance(state, dict):
                raise TypeError(f"a state that is a {type(state).__name__}")
        # Cloned, because the file may be replaced while its memory map is in use.
        return {key: tensor.clone() for key, tensor in tensors.items()}, state

    @contextmanager
    def restoring(self, name: str) -> Iterator[None]:
        """Rebuild a stage from its checkpoint: where that does not fit, the error says how to begin anew.

        Raises:
            FormatError: in place of whatever the checkpoint led to.
        """
        path = f"{self.folder}/{name}{CHECKPOINT_SUFFIX}"
        try:
            with reading(path, "a checkpoint"):
                yield
        except FormatError as error:
            raise FormatError(path, error.found, "a checkpoint; use --fresh", "") from error

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a finished fit."""
        if self.folder is not None:
            for path in self.folder.glob(f"*{CHECKPOINT_SUFFIX}"):
                path.unlink(missing_ok=True)


class GroupRuntime(Runtime):
    """One rank of a process group that has been set up; rank 0 keeps the checkpoints and tells the progress."""

    def __init__(self, folder: Path | None = None, on_progress: OnProgress | None = None) -> None:
        from torch import distributed

        self._group: Any = distributed
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._is_alone = False  # while the other ranks wait for rank 0
        super().__init__(folder, on_progress)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._group.all_reduce(tensor)
        return tensor

    def on_rank_0(self, call: Callable[[], T]) -> T:
        if self._is_alone:
            return call()
        message: list[Any] = [None, None]
        if self.rank == 0:
            self._is_alone = True
            try:
                message[0] = call()
            except Exception as error:  # raised again below, on every rank
                message[1] = error
            finally:
                self._is_alone = False
        self._group.broadcast_object_list(message)
        if message[1] is not None:
            raise message[1]
        result: T = message[0]
        return result

    def sum_gradients(self, parameters: Iterable[Tensor], value: Tensor) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        # One message instead of one per tensor: latency is what a small network pays for.
        flat = torch.cat([value.detach().reshape(1), *(g.reshape(-1) for g in gradients)])
        self.all_reduce(flat)
        torch._foreach_copy_(
            [g.view(-1) for g in gradients], list(torch.split(flat[1:], [g.numel() for g in gradients]))
        )
        return flat[0]

    def join_columns(self, part: Tensor, empty: Callable[[int], Tensor]) -> Tensor:
        widths = torch.zeros(self.world_size, dtype=torch.int64)
        widths[self.rank] = part.shape[1]
        self.all_reduce(widths)
        if self.rank != 0:
            for piece in torch.split(part, self._piece_columns(part), dim=1):
                self._group.send(piece.contiguous(), dst=0)
            return part
        joined = empty(int(widths.sum()))
        joined[:, : part.shape[1]] = part
        start = part.shape[1]
        for source in range(1, self.world_size):
            for piece in torch.split(joined[:, start : start + int(widths[source])], self._piece_columns(part), dim=1):
                received = torch.empty(piece.shape, dtype=piece.dtype)
                self._group.recv(received, src=source)
                piece.copy_(received)
            start += int(widths[source])
        return joined

    def report(self, stage: str, step: int, total_steps: int, **metrics: float) -> None:
        if self.rank == 0:
            super().report(stage, step, total_steps, **metrics)

    def load_checkpoint(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.on_rank_0(lambda: super(GroupRuntime, self).load_checkpoint(name))

    @staticmethod
    def _piece_columns(part: Tensor) -> int:
        return max(1, _PIECE_BYTES // (part.element_size() * max(1, len(part))))


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
