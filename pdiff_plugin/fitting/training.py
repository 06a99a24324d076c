"""What the training loops of a fit share: the step itself, its checkpoints, and interrupts between steps."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from pdiff_plugin.config import FitConfig, LrSchedule
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.generator.state import check_shapes, load_module, under
from pdiff_plugin.progress import terminate

F = TypeVar("F", bound=Callable[..., Tensor | tuple[Tensor, ...]])
M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=Callable[..., Any])

Handler = Callable[[int, FrameType | None], Any]

CHECKPOINT_EVERY_S = 5.0


class Interrupt:
    """Whether Ctrl-C was pressed, or SIGTERM sent, while these were held back."""

    def __init__(self) -> None:
        self.asked: Callable[[], Any] | None = None  # raises what would have been raised

    def raise_if_asked(self) -> None:
        if self.asked is not None:
            self.asked()


@contextmanager
def interrupts_held() -> Iterator[Interrupt]:
    """Let a first Ctrl-C or SIGTERM only mark the interrupt that is yielded; a second one interrupts at once.

    It thus falls between two steps, where a checkpoint can be written. Where a signal is somebody else's business
    (another handler, another thread) nothing changes.
    """
    interrupt = Interrupt()
    ours: dict[int, Handler] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    ours = {number: handler for number, handler in ours.items() if signal.getsignal(number) is handler}

    def mark(number: int, frame: FrameType | None) -> None:
        if interrupt.asked is not None:
            ours[number](number, frame)
        interrupt.asked = partial(ours[number], number, None)

    for number in ours:
        signal.signal(number, mark)
    try:
        yield interrupt
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


class Steps:
    """The steps of a training loop; see :meth:`Training.checkpointed`."""

    def __init__(self, checkpoint: Callable[[], None], interrupt: Interrupt) -> None:
        self.is_within_one = False
        self._checkpoint, self._interrupt = checkpoint, interrupt
        self._last = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, after which a checkpoint is written if it is due, and an interrupt that was held back is raised."""
        self.is_within_one = True
        yield
        self.is_within_one = False
        if time.perf_counter() - self._last > CHECKPOINT_EVERY_S:
            self._checkpoint()
            self._last = time.perf_counter()
        self._interrupt.raise_if_asked()


@dataclass(frozen=True)
class Schedule:
    """How long a network trains, and AdamW's settings on the way; ``cosine`` ends at a learning rate of zero."""

    max_steps: int
    lr: float
    lr_schedule: LrSchedule = "cosine"
    weight_decay: float = 1e-2

    def lr_at(self, step: int) -> float:
        """The learning rate after ``step`` steps."""
        is_cosine = self.lr_schedule == "cosine"
        return self.lr * (0.5 * (1.0 + math.cos(math.pi * step / self.max_steps)) if is_cosine else 1.0)


class Training:
    """A network in training with its optimizer, random generator and counters: all that a checkpoint holds.

    Args:
        stage: name of the checkpoint and of the reports.
        modules: by the names that their tensors have in a checkpoint; the first one is trained.
        schedule: of the training.
        config: of the fit.
        runtime: keeps checkpoints and tells the progress.
        seed: of the random generator.
    """

    # Attributes that a checkpoint holds as JSON.
    counters: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(
        self,
        stage: str,
        modules: dict[str, nn.Module],
        schedule: Schedule,
        config: FitConfig,
        runtime: Runtime,
        seed: int,
    ) -> None:
        self.stage, self.modules, self.schedule, self.config, self.runtime = stage, modules, schedule, config, runtime
        network = next(iter(modules.values()))
        self.parameters: list[Tensor] = list(network.parameters())
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=schedule.lr,
            weight_decay=schedule.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),  # half the time of the loop over tensors, on a CPU too
        )
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}  # kept in a checkpoint beside those of the modules
        self.step = 0

    def advance(self, loss: Callable[[], Tensor]) -> Tensor:
        """Take one step along the gradient of what ``loss`` returns; that value, a scalar."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            value = loss()
        torch.autograd.backward(value)
        value = self.add_up(value.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(self.step)
        self.optimizer.step()
        self.step += 1
        return value

    def add_up(self, value: Tensor) -> Tensor:
        """Add up gradients and loss over ranks where these share a batch; here each trains by itself."""
        return value

    def report(self, value: Tensor, every: int, **measured: float) -> None:
        """Tell the loss and what was measured, on every so manyth step and on the last."""
        if self.step % every == 0 or self.step == self.schedule.max_steps:
            self.runtime.report(self.stage, self.step, self.schedule.max_steps, train_loss=float(value), **measured)

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {"rng": self.rng.get_state(), **self.tensors}
        for prefix, module in self.modules.items():
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            # AdamW's state as named tensors, because nothing here is pickled.
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in values.items()}
        self.runtime.save_checkpoint(self.stage, tensors, {name: getattr(self, name) for name in self.counters})

    def restore(self) -> None:
        """Go on where the checkpoint was written, if there is one.

        Raises:
            FormatError: it does not fit.
        """
        saved = self.runtime.load_checkpoint(self.stage)
        if saved is not None:
            with self.runtime.restoring(self.stage):
                self._restore(*saved)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        for prefix, module in self.modules.items():
            load_module(module, tensors, f"{prefix}.")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            # AdamW believes what it is given, and writes beyond the end of a moment that is too short.
            shape = () if key == "step" else tuple(self.parameters[int(index)].shape)
            check_shapes(tensors, {f"optimizer.{name}": shape}, (torch.float32,))
            moments.setdefault(int(index), {})[key] = tensor
        # A parameter that took no part has none of them.
        if len({frozenset(values) for values in moments.values()}) > 1:
            raise ValueError("an optimizer that lacks some of its moments")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.rng.set_state(tensors["rng"])
        for name, tensor in self.tensors.items():
            check_shapes(tensors, {name: tuple(tensor.shape)})
            tensor.copy_(tensors[name])
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.schedule.max_steps:
            raise ValueError(f"step {state['step']!r} of {self.schedule.max_steps}")
        for name in self.counters:
            setattr(self, name, state[name])

    @contextmanager
    def checkpointed(self) -> Iterator[Steps]:
        """Write a checkpoint every few seconds, when interrupted, and at the end, but never in the middle of a step.

        There the tensors do not belong together: a loop interrupted inside a step leaves the last checkpoint as the
        newest.
        """
        with interrupts_held() as interrupt:
            steps = Steps(self.save, interrupt)
            try:
                yield steps
            except KeyboardInterrupt:
                if not steps.is_within_one:
                    self.save()
                raise
        self.save()


def with_gradients(function: C) -> C:
    """``function`` as it is where gradients are on, also where the caller has switched them off."""
    on: C = torch.inference_mode(False)(torch.enable_grad()(function))
    return on


def seeded(make: Callable[[], M], seed: int) -> M:
    """The network that ``make`` returns, its weights float32 and drawn from ``seed``; the caller's state comes back."""
    with torch.random.fork_rng(devices=[]), float32_by_default():
        torch.default_generator.manual_seed(seed)
        return make()


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make tensors without a dtype float32, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compiled(call: F, config: FitConfig) -> F:
    """``call``, compiled if asked for."""
    return cast(F, torch.compile(call)) if config.compile else call
