"""What the loss of a task taught about latents, beside what was learned from recorded weights.

Shapes: B members, F features of their conditions (without conditions, F = K: the latents themselves), K latent width of
the fit, r directions that the task added to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_plugin.generator.layers import Linear
from pdiff_plugin.generator.state import check_shapes, load_module, under

_WIDTH = 64
_PREFIX = "refinement."


class Refinement(nn.Module):
    """Latents (B, K) and features (B, F) -> latents (B, K + r): how much of the former to keep, and what to add.

    New, it keeps all and adds nothing along the K directions. What it adds along the others depends on the features
    already, so that one can learn where they point to.

    Attributes:
        kept: share of each latent that is kept, (K,).
        within: a small network from features to what is added along the K directions.
        beyond: the same for the r, a network of its own: one for both learns more slowly.
        onto: the latents that the r directions are, (r, K + r).
    """

    onto: Tensor

    def __init__(self, num_features: int, latent_dim: int, num_directions: int) -> None:
        super().__init__()
        self.num_directions = num_directions
        self.kept = nn.Parameter(torch.ones(latent_dim, dtype=torch.float32))
        within, beyond = Linear(_WIDTH, latent_dim), Linear(_WIDTH, num_directions)
        with torch.no_grad():
            within.weight.zero_()
            within.bias.zero_()
            beyond.weight.normal_(std=1 / math.sqrt(_WIDTH))
            beyond.bias[:1] = 1.0  # about the same at all conditions
        self.within, self.beyond = _network(num_features, within), _network(num_features, beyond)
        self.register_buffer("onto", torch.eye(latent_dim + num_directions, dtype=torch.float32)[latent_dim:])

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        inside = functional.pad(self.kept * latents + self.within(features), (0, self.num_directions))
        out: Tensor = inside + self.beyond(features) @ self.onto
        return out

    @classmethod
    def found_in(cls, frames: Mapping[str, Tensor], num_features: int, latent_dim: int) -> Refinement | None:
        """The one that :func:`state_of` put among the tensors of frames, of a fit with that latent width, if any.

        Raises:
            StateError: a tensor is missing or of another shape.
        """
        state = under(frames, _PREFIX)
        if not state:
            return None
        check_shapes(state, {"onto": ("r", "K + r")})
        out = cls(num_features, latent_dim, len(state["onto"]))
        load_module(out, state)
        return out.requires_grad_(False).eval()


def state_of(refinement: Refinement | None) -> dict[str, Tensor]:
    """Its tensors as they stand among those of frames."""
    state = {} if refinement is None else refinement.state_dict()
    return {f"{_PREFIX}{name}": tensor for name, tensor in state.items()}


def _network(num_features: int, last: nn.Linear) -> nn.Sequential:
    return nn.Sequential(Linear(num_features, _WIDTH), nn.SiLU(), Linear(_WIDTH, _WIDTH), nn.SiLU(), last)
