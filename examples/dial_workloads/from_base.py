"""The rival of a refined generator that needs no recordings: a map from condition to weights, trained from the base.

It is what a refinement adds to a generator, here to the base model: base + coefficients(condition) @ directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pdiff_plugin import WeightSet

from .sweep import Condition, Sweep

WIDTH = 64
DIRECTION_RATE = 3.0  # times that of the network, as in a refinement


class Map(nn.Module):
    """Features (C, F) -> flat changes of the weights (C, D), by r directions."""

    def __init__(self, num_features: int, num_values: int, num_directions: int) -> None:
        super().__init__()
        last = nn.Linear(WIDTH, num_directions)
        nn.init.normal_(last.weight, std=1 / math.sqrt(WIDTH))
        with torch.no_grad():
            last.bias[:1] = 1.0
        self.network = nn.Sequential(
            nn.Linear(num_features, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), last
        )
        self.directions = nn.Parameter(torch.zeros(num_directions, num_values))

    def forward(self, features: Tensor) -> Tensor:
        return DIRECTION_RATE * self.network(features) @ self.directions


def map_from_base(
    sweep: Sweep,
    conditions: Sequence[Condition],
    encode: Callable[[Sequence[Condition]], Tensor],
    num_steps: int,
    *,
    conditions_per_step: int,
    num_directions: int,
    lr: float,
) -> Callable[[Condition], WeightSet]:
    """Train the map at ``conditions``; weights for any condition.

    Args:
        sweep: supplies the base and the loss of a batch.
        conditions: to train at.
        encode: conditions -> features (C, F).
        num_steps: of the optimizer.
        conditions_per_step: a batch at each.
        num_directions: r.
        lr: learning rate at the start of a cosine.
    """
    base = sweep.base()
    tensors = {name: parameter.detach() for name, parameter in base.named_parameters()}
    sizes = [tensor.numel() for tensor in tensors.values()]
    torch.manual_seed(sweep.seed)
    trained = Map(encode(conditions[:1]).shape[1], sum(sizes), num_directions)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    rng = torch.Generator().manual_seed(sweep.seed)

    def weights(flat: Tensor) -> dict[str, Tensor]:
        changes = zip(tensors.items(), flat.split(sizes), strict=True)
        return {name: tensor + change.view_as(tensor) for (name, tensor), change in changes}

    def model_with(own: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.functional_call(base, dict(own), (x,))

    for _ in range(num_steps):
        chosen = [conditions[int(i)] for i in torch.randint(len(conditions), (conditions_per_step,), generator=rng)]
        optimizer.zero_grad()
        losses = [
            sweep.loss(model_with(weights(flat)), condition, rng)  # type: ignore[arg-type]  # called as a model is
            for flat, condition in zip(trained(encode(chosen)), chosen, strict=True)
        ]
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def at(condition: Condition) -> WeightSet:
        return WeightSet({name: tensor[None] for name, tensor in weights(trained(encode([condition]))[0]).items()})

    return at
