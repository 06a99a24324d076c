"""What the training loops of a fit share: checkpoints and interrupts between steps, precision, the learning rate."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar, cast

import torch
from torch import Tensor

from pdiff_plugin.config import FitConfig

F = TypeVar("F", bound=Callable[..., Tensor | tuple[Tensor, ...]])

CHECKPOINT_EVERY_S = 5.0


class Interrupt:
    """Whether Ctrl-C was pressed while it was held back."""

    is_asked = False

    def raise_if_asked(self) -> None:
        if self.is_asked:
            raise KeyboardInterrupt


@contextmanager
def interrupts_held() -> Iterator[Interrupt]:
    """Let a first Ctrl-C only mark the interrupt that is yielded; a second one interrupts at once.

    It thus falls between two steps, where a checkpoint can be written. Where Ctrl-C is somebody else's business
    (another handler, another thread) nothing changes.
    """
    interrupt = Interrupt()
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_ours or threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def mark(number: int, frame: FrameType | None) -> None:
        if interrupt.is_asked:
            signal.default_int_handler(number, frame)
        interrupt.is_asked = True

    signal.signal(signal.SIGINT, mark)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Steps:
    """The steps of a training loop; see :func:`checkpointed`."""

    def __init__(self, checkpoint: Callable[[], None], interrupt: Interrupt) -> None:
        self.is_within_one = False
        self._checkpoint, self._interrupt = checkpoint, interrupt
        self._last = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, after which a checkpoint is written if it is due, and a Ctrl-C that was held back is raised."""
        self.is_within_one = True
        yield
        self.is_within_one = False
        if time.perf_counter() - self._last > CHECKPOINT_EVERY_S:
            self._checkpoint()
            self._last = time.perf_counter()
        self._interrupt.raise_if_asked()


@contextmanager
def checkpointed(checkpoint: Callable[[], None]) -> Iterator[Steps]:
    """Call ``checkpoint`` every few seconds, when interrupted, and at the end, but never in the middle of a step.

    There the tensors do not belong together: a loop interrupted inside a step leaves the last checkpoint as the newest.
    """
    with interrupts_held() as interrupt:
        steps = Steps(checkpoint, interrupt)
        try:
            yield steps
        except KeyboardInterrupt:
            if not steps.is_within_one:
                checkpoint()
            raise
    checkpoint()


def autocast(config: FitConfig, device: torch.device) -> torch.autocast:
    """Context in which a network computes in the precision asked for; its weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def compiled(call: F, config: FitConfig) -> F:
    """``call``, compiled if asked for."""
    return cast(F, torch.compile(call)) if config.compile else call


def lr_factor(step: int, num_steps: int, schedule: str) -> float:
    """Factor on the learning rate at a step: one, or a half cosine that reaches zero at the last."""
    return 0.5 * (1.0 + math.cos(math.pi * step / num_steps)) if schedule == "cosine" else 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of AdamW as named tensors, because nothing here is pickled."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
