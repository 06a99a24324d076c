"""The rest of the network: how far it moves while snapshots are taken, and freezing it.

Shapes: V sampled values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from math import ceil

import torch
from torch import Tensor, nn

from pdiff_plugin.modules.names import named_modules, named_tensors
from pdiff_plugin.recording.selection import STATISTICS

NUM_SAMPLED = 65_536


class RestDrift:
    """Relative L2 change of tensors between two moments, estimated on at most 65,536 evenly strided values.

    Two references are kept, so that a ring, or the rows before a window, always have one that is as old as the oldest.

    Args:
        tensors: returns the live tensors, in one order.
    """

    def __init__(self, tensors: Callable[[], list[Tensor]]) -> None:
        self._tensors = tensors
        self._references: deque[tuple[int, Tensor]] = deque(maxlen=2)

    @property
    def from_step(self) -> int | None:
        """The step that the change is measured from."""
        return self._references[0][0] if self._references else None

    def mark(self, step: int) -> None:
        """Take the present values as the newest reference."""
        self._references.append((step, self._sample()))

    def forget_older(self) -> None:
        """Measure from the newest reference on."""
        while len(self._references) > 1:
            self._references.popleft()

    def measure(self) -> float | None:
        """Change since the oldest reference, or None without one. 0.0 when nothing else is trained."""
        if not self._references:
            return None
        reference = self._references[0][1]  # (V,)
        norm = float(reference.norm())
        change = float((self._sample() - reference).norm())
        return change / norm if norm else change

    @torch.no_grad()
    def _sample(self) -> Tensor:
        tensors = self._tensors()
        stride = max(1, ceil(sum(t.numel() for t in tensors) / NUM_SAMPLED))
        parts, offset = [torch.empty(0)], 0
        for tensor in tensors:
            parts.append(_in_memory_order(tensor)[-offset % stride :: stride].to("cpu", torch.float32))
            offset += tensor.numel()
        return torch.cat(parts)  # (V,)


def rest_names(model: nn.Module, chosen: Collection[str]) -> list[str]:
    """Names of the trained parameters of ``model``, and of its running statistics, that are not ``chosen``.

    Other buffers stay out: a mask of ``-inf`` would make any change nan, one of huge numbers would hide it.
    """
    return [
        name
        for name, tensor in named_tensors(model).items()
        if name not in chosen
        and tensor.is_floating_point()
        and (tensor.requires_grad if isinstance(tensor, nn.Parameter) else name.rpartition(".")[2] in STATISTICS)
    ]


class FrozenRest:
    """Keeps everything but the chosen tensors from training until ``restore`` is called.

    Other parameters get no gradient, so that no optimizer moves them (weight decay and momentum included); the running
    statistics of other BatchNorms stand still.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
        kept = {id(tensor) for tensor in chosen.values()}
        self._parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
        for parameter in self._parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._momenta = [
            (module, module.momentum)
            for name, module in named_modules(model)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean".lstrip(".") not in chosen
        ]
        for module, _ in self._momenta:
            module.momentum = 0.0

    def restore(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module, momentum in self._momenta:
            module.momentum = momentum


def _in_memory_order(tensor: Tensor) -> Tensor:
    """All values, flat, in the order they have in memory: a view for channels_last too."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)
