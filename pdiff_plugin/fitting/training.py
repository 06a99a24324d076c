"""What the training loops of a fit share: interruptions, the learning rate, optimizer state as named tensors."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

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
