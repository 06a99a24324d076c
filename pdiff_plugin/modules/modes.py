"""Giving a model back in the modes in which it came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Whatever happens inside, each module is in its own mode again afterwards.

    Module by module: a frozen BatchNorm in eval mode inside a training model stays so.

    Args:
        model: any module.
        gradients: also give parameters back their ``requires_grad`` and ``grad``.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()] if gradients else []
    try:
        yield
    finally:
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
