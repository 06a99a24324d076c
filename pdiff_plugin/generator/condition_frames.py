"""Coordinates of the latent space in which snapshots of all conditions are one cloud about what is expected there.

Shapes: B rows of a batch, K latent width, F features of a condition, r directions that a task added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.generator.centres import Centre
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.refinement import Refinement, state_of
from pdiff_plugin.generator.state import check_finite, check_shapes, under


@dataclass(frozen=True)
class ConditionFrames:
    """As :class:`pdiff_plugin.generator.frames.Frames`, about a centre that follows the condition.

    Attributes:
        centre: what is expected at a condition.
        std: of the local coordinates, (1, K); their mean square is one.
        scale: what local coordinates are divided by, so that this holds.
        refinement: what is made of the latents in the end, or None.
    """

    centre: Centre
    std: Tensor
    scale: float
    refinement: Refinement | None = None

    num_trajectories = 1

    @property
    def width(self) -> int:
        """Local width, K."""
        return self.std.shape[1]

    @property
    def latent_dim(self) -> int:
        """Width of the latents that come out, K or K + r."""
        return self.width + (0 if self.refinement is None else self.refinement.num_directions)

    @property
    def num_features(self) -> int:
        return self.centre.features.shape[1]

    def to_local(self, latents: Tensor, condition: Condition) -> Tensor:
        """Local coordinates (B, K) of latents (B, K) as they are before a refinement."""
        return (latents - self._expected(condition)) / self.scale

    def to_latents(self, local: Tensor, condition: Condition) -> Tensor:
        """Latents (B, K), refined (B, K + r), of local coordinates (B, K)."""
        latents = self._expected(condition) + self.scale * local
        if self.refinement is None:
            return latents
        assert condition.features is not None
        refined: Tensor = self.refinement(latents, condition.features)
        return refined

    def _expected(self, condition: Condition) -> Tensor:
        assert condition.features is not None, "a generator of conditions is asked by features"
        return self.centre(condition.features)

    def state_dict(self) -> dict[str, Tensor]:
        centre = {f"centre.{name}": tensor for name, tensor in self.centre.state_dict().items()}
        own = {"std": self.std, "scale": torch.tensor(self.scale, dtype=torch.float64)}
        return {**centre, **own, **state_of(self.refinement)}

    @classmethod
    def from_state(cls, document: Mapping[str, Any], state: Mapping[str, Tensor]) -> ConditionFrames:
        """From the centre's own document and what :meth:`state_dict` gave; raises as :meth:`Centre.from_state`."""
        centre = Centre.from_state(document, under(state, "centre."))
        check_shapes(state, {"std": (1, centre.means.shape[1]), "scale": ()})
        check_finite(state, ("std", "scale"))
        refinement = Refinement.found_in(state, centre.features.shape[1], centre.means.shape[1])
        return cls(centre, state["std"].to(torch.float32, copy=True), float(state["scale"]), refinement)


def condition_frames(centre: Centre, latents: Tensor, features: Tensor) -> ConditionFrames:
    """Coordinates about a centre.

    Args:
        centre: of latents at a condition.
        latents: of the training snapshots, (n, K).
        features: of their conditions, (n, F).
    """
    residual = (latents - centre(features)).double()
    scale = float(residual.square().mean().sqrt()) or 1.0
    std = residual.square().mean(dim=0, keepdim=True).sqrt() / scale
    return ConditionFrames(centre, std.float(), scale)
