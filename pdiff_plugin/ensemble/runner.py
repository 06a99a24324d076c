"""Runs the members of an ensemble over one batch: what they share once, the rest for several at a time where it can.

Shapes: M members, m members computed together, B inputs in a batch, C classes, ``...`` further axes of an output.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pdiff_plugin.errors import DataError, TrainingModeError
from pdiff_plugin.generator.weights import ApartSet
from pdiff_plugin.modules.batches import logits_of
from pdiff_plugin.modules.names import named_tensors, wrapped_names
from pdiff_plugin.modules.trunk_cache import Run, Trunk, TrunkCache, copied_inputs, exclusive

logger = logging.getLogger(__name__)

Strategy = Literal["auto", "trunk", "loop"]
Execution = Literal["vmap tail", "cached loop", "plain loop"]

# Beyond this a larger chunk of members is no faster (measured on a ResNet-18: 8 members take as long as 32, each).
_MAX_CHUNK_BYTES = 2 * 2**30
# On a CPU, glibc gives large tensors back to the system at once, and faulting their pages in again takes as long as the
# arithmetic (last two norms of a small ResNet, 32 members: 2.1 s of CPU time in one chunk, 1.5 s with this bound).
_MAX_CPU_TENSOR_BYTES = 8 * 2**20


class Stacked:
    """Members in memory.

    Args:
        stack: its buffers are the members' tensors, (M, *shape) each.
    """

    def __init__(self, stack: nn.Module) -> None:
        self._stack = stack
        self.num_members = len(next(stack.buffers()))

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._stack.buffers())

    @property
    def device(self) -> torch.device:
        return next(self._stack.buffers()).device

    def one(self, index: int) -> list[Tensor]:
        return [stacked[index] for stacked in self._stack.buffers()]

    def several(self, chunk: slice) -> list[Tensor]:
        return [stacked[chunk] for stacked in self._stack.buffers()]


class Apart:
    """Members that are read when their turn comes.

    Args:
        model: whose own tensors tell dtypes and device.
        weights: the members, mapped from files.
    """

    def __init__(self, model: nn.Module, weights: ApartSet) -> None:
        self._model, self._weights = model, weights
        self.num_members = weights.num_members

    @property
    def device(self) -> torch.device:
        return named_tensors(self._model)[next(iter(self._weights))].device

    def one(self, index: int) -> list[Tensor]:
        live = named_tensors(self._model)
        return [tensor.to(live[name]) for name, tensor in self._weights.member(index).items()]

    def several(self, chunk: slice) -> list[Tensor]:
        members = map(self.one, range(self.num_members)[chunk])
        return [torch.stack(tensors) for tensors in zip(*members, strict=True)]


class MemberRunner:
    """Computes the members in turn inside the live model, in the simplest way that was found to be needed.

    Args:
        model: the user's model, in eval mode.
        members: their tensors, in the order of ``names``.
        names: of those tensors in the model.
        strategy: as for :class:`~pdiff_plugin.DiffusionEnsemble`, and so are the others.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Stacked | Apart,
        names: list[str],
        *,
        strategy: Strategy,
        vectorize: bool | None,
        member_chunk: int | None,
        select: Callable[[Any], Tensor] | None,
    ) -> None:
        self.model, self.members = model, members
        self.member_chunk, self.select = member_chunk, select
        self.num_members = members.num_members
        raw = wrapped_names(model)
        self._raw_names = [raw[name] for name in names]
        self._cache = TrunkCache(model, names)
        self._vectorize = not _has_conv_weights(model, names) if vectorize is None else vectorize
        # Compiled parts would be compiled anew for every routed call.
        self._is_plain = strategy == "loop" or any(clean != inner for clean, inner in raw.items())
        # Where one comes after the other from a disk, there is little to gain.
        self._is_plain |= isinstance(members, Apart)
        self._is_checked = strategy == "trunk"

    @property
    def execution(self) -> Execution:
        """How members are computed, as far as is known."""
        if self._is_plain:
            return "plain loop"
        return "vmap tail" if self._vectorize else "cached loop"

    @property
    def device(self) -> torch.device:
        return self.members.device

    def each_chunk(self, args: tuple[Any, ...], kwargs: dict[str, Any], consume: Callable[[Tensor], None]) -> None:
        """Hand the logits of members 0..M-1 to ``consume`` in order, (m, B, C, ...) at a time."""
        if torch.compiler.is_compiling():
            # Traced code has one way to go; a change of gradient mode would cut an exported graph in pieces.
            consume(self._several(slice(None))(args, kwargs).detach())
            return
        check_eval(self.model)
        # Tensors made in inference mode do not count the writes into them. Leaving it turns gradients on.
        with torch.inference_mode(False), torch.no_grad(), exclusive(self.model):
            start = 0
            if isinstance(self.members, Stacked) and not self._is_plain:
                with self._cache.batch(self.members.tensors, args, kwargs) as trunk:
                    start = self._over_trunk(trunk, args, kwargs, consume)
            for index in range(start, self.num_members):
                consume(self._whole(index, args, kwargs))

    def _over_trunk(
        self, trunk: Trunk, args: tuple[Any, ...], kwargs: dict[str, Any], consume: Callable[[Tensor], None]
    ) -> int:
        """Members by recording and replaying; returns how many were done before replaying was given up."""
        index = 0
        while index < self.num_members:
            if not trunk.is_recorded:
                consume(trunk.record(self._one(index)))
                index += 1
                if not trunk.is_sound:
                    return self._give_up(index, "a part that all members share overwrites what another has read")
                continue
            size = self._chunk_size(trunk) if self._vectorize else 1
            run = self._several(slice(index, index + size)) if self._vectorize else self._one(index)
            try:
                with _quiet_vmap():
                    logits = trunk.replay(run)
            except RuntimeError as error:
                if not self._vectorize:
                    raise
                # vmap refuses in many words, some of them a kernel's own. If it was not vmap, this raises again.
                logits = trunk.replay(self._one(index))
                logger.info("members of %s run one by one: %s", type(self.model).__name__, error)
                self._vectorize = False
            if logits is None:
                continue
            if not self._is_checked:
                self._is_checked = True
                last = index + len(logits) - 1
                if not _agree(logits[-1:], self._whole(last, args, kwargs)):
                    return self._give_up(index, "its members differ when their common part is computed once")
            consume(logits)
            index += len(logits)
        return index

    def _give_up(self, done: int, reason: str) -> int:
        logger.warning("%s is run whole for every member: %s", type(self.model).__name__, reason)
        self._is_plain = True
        return done

    def _chunk_size(self, trunk: Trunk) -> int:
        if self.member_chunk is not None:
            return self.member_chunk
        # About four of the largest activations live at once: input, output, shortcut and the kernel's workspace.
        member_bytes = 4 * trunk.largest_tail_bytes + 1
        most = min(_MAX_CHUNK_BYTES, _free_bytes(self.device) // 4) // member_bytes
        if self.device.type == "cpu":
            most = min(most, _MAX_CPU_TENSOR_BYTES // (trunk.largest_tail_bytes + 1))
        return max(1, most)

    def _whole(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One member, (1, B, C, ...), that shares nothing with others."""
        return self._one(index)(*copied_inputs((args, kwargs)))

    def _one(self, index: int) -> Run:
        """Computes one member, (1, B, C, ...)."""
        # Sliced here: taking a slice is already a use of a generated tensor, which would end the recorded trunk.
        tensors = self.members.one(index)
        return lambda args, kwargs: self._call(tensors, args, kwargs)[None]

    def _several(self, chunk: slice) -> Run:
        """Computes a chunk of members at once, (m, B, C, ...)."""
        stacked = self.members.several(chunk)

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            logits: Tensor = vmap(lambda *tensors: self._call(tensors, args, kwargs))(*stacked)
            return logits

        return run

    def _call(self, tensors: Iterable[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        output = functional_call(self.model, dict(zip(self._raw_names, tensors, strict=True)), args, kwargs)
        return logits_of(output) if self.select is None else self.select(output)


def check_eval(model: nn.Module) -> None:
    """Raise :class:`TrainingModeError` at the first part of ``model`` that is in train mode."""
    for name, module in model.named_modules():
        if module.training:
            raise TrainingModeError(f"{type(module).__name__} {name!r}" if name else type(module).__name__)


def _has_conv_weights(model: nn.Module, names: Iterable[str]) -> bool:
    live = named_tensors(model)
    generated = {id(live[name]) for name in names}
    convolutions = (module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd))
    return any(id(conv.weight) in generated for conv in convolutions)


def gaussians_of(output: Any) -> Tensor:
    """Means and variances, (B, ..., 2), of what a model returned.

    A pair (mean, variance), as torch.nn.GaussianNLLLoss takes them, or a mapping or an object, such as a distribution,
    with ``mean`` and ``variance`` or ``log_variance``.

    Raises:
        DataError: it is neither.
    """
    named: Mapping[str, Any] = output if isinstance(output, Mapping) else {}
    if not isinstance(output, Mapping | Tensor):
        named = {name: getattr(output, name, None) for name in ("mean", "variance", "log_variance")}
    mean, variance, log_variance = (named.get(name) for name in ("mean", "variance", "log_variance"))
    if isinstance(log_variance, Tensor):
        variance = log_variance.exp()
    if not isinstance(mean, Tensor) and isinstance(output, tuple | list) and len(output) == 2:
        mean, variance = output
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        expected = "must be a pair (mean, variance), or name them; Task(select=...) can make one of it"
        raise DataError("output of the model", type(output).__name__, expected)
    return torch.stack([mean, variance.expand_as(mean)], dim=-1)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute one member differ by no more than rounding."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(expected.dtype, 5e-2)
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True)


@contextmanager
def _quiet_vmap() -> Iterator[None]:
    """Without the warning that an operation has a loop inside vmap: it is not slower than our own would be."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop because we have not yet implemented", UserWarning
        )
        yield


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:  # only Linux tells without a library
        return 4 * _MAX_CHUNK_BYTES
    return 1024 * next(int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
