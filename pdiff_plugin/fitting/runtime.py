"""Where a fit runs: the few things its stages need from a process, or from a group of them.

The stages in ``fit.py`` are written against :class:`Runtime`. In one process that is all there is to it, and nothing
here imports Ray.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdiff_plugin.errors import FormatError
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.files import check_format, replacing

CHECKPOINT_FORMAT = "pdiff-fit-checkpoint"
CHECKPOINT_VERSION = 1
CHECKPOINT_SUFFIX = ".checkpoint.safetensors"


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

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values on every rank, in place."""
        return tensor

    def report(self, stage: str, step: int, total_steps: int, **metrics: float) -> None:
        """Tell whoever watches; costs nothing when nobody does."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage, step, total_steps, metrics))

    def save_checkpoint(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep ``tensors`` and the JSON-able ``state`` of a stage until the fit is finished."""
        if self.folder is None or self.rank != 0:
            return
        header = {
            "format": CHECKPOINT_FORMAT,
            "format_version": str(CHECKPOINT_VERSION),
            "state": json.dumps(state),
        }
        with replacing(self.folder / f"{name}{CHECKPOINT_SUFFIX}") as temp:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temp, header)

    def load_checkpoint(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`save_checkpoint` kept under ``name``, or None."""
        path = self.folder / f"{name}{CHECKPOINT_SUFFIX}" if self.folder else None
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                opened: Any = file
                header = opened.metadata() or {}
                check_format(str(path), header, CHECKPOINT_FORMAT, CHECKPOINT_VERSION)
                # Cloned, because the file may be replaced while its memory map is in use.
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise FormatError(str(path), f"an unreadable file ({error})", "a checkpoint; use --fresh") from error
        return tensors, json.loads(header["state"])

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a finished fit."""
        if self.folder is not None:
            for path in self.folder.glob(f"*{CHECKPOINT_SUFFIX}"):
                path.unlink(missing_ok=True)


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
