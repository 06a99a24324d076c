"""A model comes back in the modes in which it came."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pdiff_plugin.modules.modes import modes_kept


def make_model() -> nn.Module:
    """In train mode, but for a BatchNorm; one parameter is frozen, one has a gradient."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(2, 2)
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_is_in_its_own_mode_again(fails: bool) -> None:
    model = make_model()
    try:
        with modes_kept(model):
            model.eval()
            model[1].train()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_gradients_and_their_flags_come_back_where_that_is_asked() -> None:
    model = make_model()
    grad = model[0].weight.grad
    with modes_kept(model, gradients=True):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter is model[0].bias)
            parameter.grad = None
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert model[0].weight.grad is grad

    with modes_kept(model):
        model[0].weight.grad = None
    assert model[0].weight.grad is None
