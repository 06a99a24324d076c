"""Calling back once per optimizer step, whatever the optimizer is wrapped in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from pdiff_plugin.errors import NotHookableError

_STEP_FILE = Optimizer.profile_hook_step.__code__.co_filename


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The outermost optimizer with step hooks: ``optimizer`` itself, or the one inside a trainer's wrapper.

    Raises:
        NotHookableError: there is none.
    """
    inner = optimizer
    while not (isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_post_hooks")):
        # Accelerate's and Ray's wrappers are Optimizers that never ran Optimizer.__init__.
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise NotHookableError(f"{type(optimizer).__module__}.{type(optimizer).__qualname__}")
    return inner


class StepHook:
    """Calls ``on_step(optimizer)`` after each outermost ``optimizer.step()``, until ``remove``.

    An optimizer whose ``step`` calls ``super().step()`` runs torch's hooks twice for one step; the outer call counts.
    """

    def __init__(self, optimizer: Optimizer, on_step: Callable[[Optimizer], None]) -> None:
        self._on_step = on_step
        self._depth = 0
        self._outer: FrameType | None = None
        untraced: Any = torch.compiler.disable  # else a compiled `optimizer.step` would trace into the hooks
        self._handles = [
            optimizer.register_step_pre_hook(untraced(self._before)),
            optimizer.register_step_post_hook(untraced(self._after)),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        call = _step_frame(sys._getframe(1))
        if self._depth and (call is None or not _is_below(call, self._outer)):
            self._depth = 0  # the last step raised (in its closure, say), so its post-hook never ran
        if self._depth == 0:
            self._outer = call
        self._depth += 1

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._outer = None
            self._on_step(optimizer)


def _step_frame(frame: FrameType | None) -> FrameType | None:
    """The nearest running call of torch's own wrapper around ``step``, which runs the hooks."""
    while frame is not None and frame.f_code.co_filename != _STEP_FILE:
        frame = frame.f_back
    return frame


def _is_below(frame: FrameType, ancestor: FrameType | None) -> bool:
    above = frame.f_back
    while above is not None and above is not ancestor:
        above = above.f_back
    return above is not None
