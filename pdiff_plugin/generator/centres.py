"""What is expected of weights at a condition: regressions from features to the mean of a trajectory.

All but the network are weighted means of what was recorded, m(c) = w(c) Y with Y the means of the R trajectories: the
nearest one, its neighbours, ridge regression on monomials of the features (as a kernel method) and a Gaussian process
with a squared exponential kernel. The same weights mix latents, snapshots or whole models.

Shapes: R recorded conditions, B conditions, F features, K values of a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

# (features (B, F), recorded features (R, F)) -> weights (B, R), in float64.
Weights = Callable[[Tensor, Tensor], Tensor]

_LENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
_NOISES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
_DEGREES = (1, 2, 3)
_NUM_NEIGHBOURS = (2, 3, 5, 8)


def mean_weights(features: Tensor, recorded: Tensor) -> Tensor:
    """All recorded conditions alike: the average that ignores the condition."""
    return torch.full((len(features), len(recorded)), 1.0 / len(recorded), dtype=torch.float64)


def neighbour_weights(features: Tensor, recorded: Tensor, k: int = 1) -> Tensor:
    """The ``k`` nearest conditions, by inverse distance; a condition that was recorded gets its own mean."""
    distances = torch.cdist(features.double(), recorded.double())  # (B, R)
    k = min(k, len(recorded))
    nearest, index = distances.topk(k, dim=1, largest=False)
    inverse = 1.0 / nearest.clamp_min(1e-9 * float(distances.max()) + 1e-12)
    weights = torch.zeros_like(distances)
    return weights.scatter_(1, index, inverse / inverse.sum(dim=1, keepdim=True))


def ridge_weights(features: Tensor, recorded: Tensor, degree: int = 1, penalty: float = 1e-2) -> Tensor:
    """Ridge regression on all monomials of the features up to ``degree``, with a free constant."""
    return _kernel_weights(partial(_polynomial, degree=degree), features, recorded, penalty)


def gp_weights(features: Tensor, recorded: Tensor, length: float = 1.0, noise: float = 1e-2) -> Tensor:
    """Mean of a Gaussian process: squared exponential kernel of one length, a free constant as its mean."""
    return _kernel_weights(partial(_squared_exponential, length=length), features, recorded, noise)


def _polynomial(a: Tensor, b: Tensor, degree: int) -> Tensor:
    # Divided by F, so that one penalty means the same for few and for many features.
    return (1.0 + a @ b.T / a.shape[1]).pow(degree) - 1.0


def _squared_exponential(a: Tensor, b: Tensor, length: float) -> Tensor:
    return torch.exp(-torch.cdist(a, b).square() / (2 * length**2 * a.shape[1]))


def _kernel_weights(
    kernel: Callable[[Tensor, Tensor], Tensor], features: Tensor, recorded: Tensor, noise: float
) -> Tensor:
    """Weights of kriging with an unknown constant (universal kriging, Cressie 1993, 3.2): each row sums to one."""
    features, recorded = features.double(), recorded.double()
    R = len(recorded)
    cross = kernel(features, recorded)  # (B, R)
    own = kernel(recorded, recorded)
    scale = float(own.diagonal().mean())
    own = own + noise * scale * torch.eye(R, dtype=torch.float64)
    ones = torch.ones(R, 1, dtype=torch.float64)
    solved = torch.linalg.solve(own, torch.cat([ones, cross.T], dim=1))  # (R, 1 + B)
    inverse_ones, plain = solved[:, :1], solved[:, 1:].T  # (R, 1), (B, R)
    missing = 1.0 - plain.sum(dim=1, keepdim=True)  # what is left to the constant
    weights: Tensor = plain + missing * (inverse_ones / inverse_ones.sum()).T
    return weights


@dataclass(frozen=True)
class CentreSpec:
    """A kind of centre: how its weights are made, and what may be tried of each setting."""

    weights: Callable[..., Tensor]
    text: str
    settings: Mapping[str, tuple[float, ...]]

    def candidates(self) -> list[dict[str, float]]:
        """Every combination of the settings."""
        names = list(self.settings)
        return [dict(zip(names, values, strict=True)) for values in product(*self.settings.values())]


CENTRES = {
    "mean": CentreSpec(mean_weights, "the average of all conditions", {}),
    "nearest": CentreSpec(neighbour_weights, "the nearest condition", {}),
    "neighbours": CentreSpec(neighbour_weights, "the nearest conditions by inverse distance", {"k": _NUM_NEIGHBOURS}),
    "ridge": CentreSpec(ridge_weights, "ridge regression", {"degree": _DEGREES, "penalty": _NOISES}),
    "gp": CentreSpec(gp_weights, "a Gaussian process", {"length": _LENGTHS, "noise": _NOISES}),
}
"""Every centre that is a weighted mean of what was recorded."""


def leave_one_out(kind: str, settings: Mapping[str, float], features: Tensor) -> Tensor:
    """Weights of each recorded condition by all others, (R, R) with zeros on the diagonal."""
    R = len(features)
    weights = torch.zeros(R, R, dtype=torch.float64)
    for row in range(R):
        others = torch.arange(R) != row
        weights[row, others] = CENTRES[kind].weights(features[row : row + 1], features[others], **settings)[0]
    return weights


def choose_settings(kind: str, features: Tensor, means: Tensor) -> tuple[dict[str, float], float]:
    """The settings of a kind that predict each recorded condition best from the others.

    Args:
        kind: a key of :data:`CENTRES`.
        features: of the recorded conditions, (R, F).
        means: what is to be predicted, (R, K), in units in which its columns count alike.

    Returns:
        The settings and their mean squared error.
    """
    best: tuple[dict[str, float], float] | None = None
    for settings in CENTRES[kind].candidates():
        error = float((leave_one_out(kind, settings, features) @ means.double() - means).square().mean())
        if best is None or error < best[1]:
            best = settings, error
    assert best is not None
    return best
