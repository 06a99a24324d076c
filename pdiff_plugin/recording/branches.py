"""Several short trainings of the chosen layers of one model: where each starts, and how they step side by side."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdiff_plugin.config import Reinit
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.modules.names import unwrap, wrapped_names
from pdiff_plugin.modules.trunk_cache import Trunk, TrunkCache, copied_inputs
from pdiff_plugin.recording.recorder import PDiffRecorder

logger = logging.getLogger(__name__)

LossFn = Callable[[Any, Any], Tensor]


class Values:
    """Parameters and buffers as they were at one moment."""

    def __init__(self, parameters: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
        """Set aside ``parameters``, and the buffers of ``modules``."""
        self._live, self._modules = list(parameters), list(modules)
        self.save()

    @torch.no_grad()
    def save(self) -> None:
        """Set the present values aside instead."""
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in self._live]
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def has_same_parameters(self) -> bool:
        """Whether the live parameters are as they were."""
        return all(torch.equal(parameter, value) for parameter, value in self._parameters)

    @torch.no_grad()
    def load(self) -> None:
        """Write the values back; a buffer that was replaced comes back as the object that it was, too."""
        for parameter, value in self._parameters:
            parameter.copy_(value)
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer.copy_(value)


@dataclass
class Branch:
    """One short training; between its turns in the live model its tensors wait in ``values``."""

    recorder: PDiffRecorder
    optimizer: Optimizer
    values: Values


class Lockstep:
    """Trains branches side by side, and computes what comes before the chosen tensors once per batch for all of them.

    A branch ends in what it would end in alone: replaying the trunk is exact (see ``trunk_cache``), and where it cannot
    be, every branch is computed whole. So it is from the first random draw on (dropout in the trunk, say), since each
    branch would have drawn its own. One branch alone is trained as if this class were not there.

    Args:
        model: in the modes in which it trains.
        loss_fn: called with outputs and targets.
        chosen: the tensors in which branches differ, by name.
        branches: at least one.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, chosen: Mapping[str, Tensor], branches: Sequence[Branch]
    ) -> None:
        self._model, self._loss_fn, self._chosen, self._branches = model, loss_fn, chosen, branches
        self._cache: TrunkCache | None = None
        self._is_checked = self._is_told = False
        self._is_alone = len(branches) == 1
        if not self._is_alone and _is_compiled(model):
            # Compiled parts would be compiled anew for every routed call.
            self._give_up("it is compiled or wrapped")
        elif not self._is_alone:
            self._cache = TrunkCache(model, chosen)

    def train(
        self,
        batches: Iterator[tuple[Any, Any]],
        num_steps: int,
        after_step: Callable[[Branch, int, Tensor], None],
        before_batch: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Take ``num_steps`` steps of every branch and record their end.

        Args:
            batches: ``(inputs, targets)``; no more are taken than are trained on.
            num_steps: of each branch.
            after_step: called with the branch, the step (from 1) and its loss.
            before_batch: called with the step.
        """
        with ExitStack() as stack:
            for branch in self._branches:
                stack.enter_context(branch.recorder.attach(self._model, branch.optimizer, total_steps=num_steps))
                if not self._is_alone:
                    stack.callback(branch.values.load)  # a recorder that is closed early keeps the base
            for step, batch in zip(range(1, num_steps + 1), batches, strict=False):
                before_batch(step)
                with self._cache.batch(self._chosen.values(), batch, {}) if self._cache else nullcontext() as trunk:
                    for branch in self._branches:
                        after_step(branch, step, self._step(branch, batch, trunk))

    def _step(self, branch: Branch, batch: tuple[Any, Any], trunk: Trunk | None) -> Tensor:
        branch.optimizer.zero_grad()
        loss = self._run(batch, {}) if self._is_alone else self._loss(branch, batch, trunk)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        branch.optimizer.step()
        if not self._is_alone:
            branch.values.save()
        return loss.detach()

    def _loss(self, branch: Branch, batch: tuple[Any, Any], trunk: Trunk | None) -> Tensor:
        if trunk is None or self._cache is None:
            return self._whole(branch, batch)
        if trunk.is_recorded:
            expected = None if self._is_checked else self._rehearse(branch, batch)
            branch.values.load()
            loss = trunk.replay(self._run)
            if loss is not None and expected is not None:
                self._is_checked = True
                if not torch.allclose(loss, expected, rtol=1e-3, equal_nan=True):
                    self._give_up("their losses differ when their common part is computed once")
                    return self._whole(branch, batch)
            if loss is not None:
                return loss
        loss = trunk.record(self._run, branch.values.load)
        draws = "random numbers are drawn (dropout in train mode?) before the chosen layers"
        if not trunk.is_sound:
            self._give_up("a part that all branches share overwrites what another has read")
        elif trunk.is_empty:
            self._give_up(draws if trunk.draws else "no module runs before the chosen layers")
        elif trunk.draws and not self._is_told:
            self._is_told = True
            logger.info("branches of %s share only what comes before: %s", type(self._model).__name__, draws)
        return loss

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        inputs, targets = args
        return self._loss_fn(self._model(inputs), targets)

    def _whole(self, branch: Branch, batch: tuple[Any, Any]) -> Tensor:
        branch.values.load()
        return self._run(*copied_inputs((batch, {})))

    def _rehearse(self, branch: Branch, batch: tuple[Any, Any]) -> Tensor:
        """The loss of the coming step, computed whole, with the random numbers that it will draw."""
        device = next(iter(self._chosen.values())).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._whole(branch, batch).detach()

    def _give_up(self, reason: str) -> None:
        logger.info("every branch of %s is computed whole: %s", type(self._model).__name__, reason)
        self._cache = None


@torch.no_grad()
def perturb(parameters: Iterable[nn.Parameter], noise: float, rng: torch.Generator) -> None:
    """Add normal noise of ``noise`` standard deviations of each parameter's own values."""
    for parameter in parameters:
        size = noise * parameter.std(correction=0)
        parameter.add_(size * torch.randn(parameter.shape, generator=rng).to(parameter))


class Reset:
    """Initialises the chosen parameters anew, by ``reset_parameters()`` of the modules that own them.

    Args:
        model: owns them.
        parameters: the chosen ones.
        restart: the setting that asks for it.

    Raises:
        ConfigError: a module that owns some has no such method.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], restart: Reinit) -> None:
        missing = {id(parameter) for parameter in parameters}
        lacking: dict[int, str] = {}
        self._owners: list[tuple[nn.Module, list[str]]] = []
        for prefix, module in model.named_modules():
            own = {name: id(parameter) for name, parameter in module._parameters.items() if id(parameter) in missing}
            if own and callable(getattr(module, "reset_parameters", None)):
                self._owners.append((module, list(own)))
                missing -= set(own.values())
            else:
                lacking |= {key: f"{type(module).__name__} {prefix!r} (it owns {name!r})" for name, key in own.items()}
        if missing:
            owner = next(text for key, text in lacking.items() if key in missing)
            raise ConfigError(
                "restart", restart, f"calls reset_parameters(), which {owner} lacks; choose other layers, or Perturb()"
            )

    @torch.no_grad()
    def __call__(self, rng: torch.Generator) -> None:
        """Draw new values from ``rng``; the global generators are left alone."""
        with torch.random.fork_rng([]):
            torch.default_generator.set_state(rng.get_state())
            for module, names in self._owners:
                # A copy: some of the module's parameters may not be chosen. On the CPU every device gets the same.
                fresh: Any = copy.deepcopy(module).cpu()
                fresh.reset_parameters()
                for name in names:
                    getattr(module, name).copy_(getattr(fresh, name))
                for name, buffer in module.named_buffers(recurse=False):
                    buffer.copy_(getattr(fresh, name))
            rng.set_state(torch.default_generator.get_state())


def _is_compiled(model: nn.Module) -> bool:
    return (
        unwrap(model) is not model
        or any(clean != inner for clean, inner in wrapped_names(model).items())
        or any(module._compiled_call_impl is not None for module in model.modules())
    )
