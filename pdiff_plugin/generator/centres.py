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
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.generator.layers import Linear
from pdiff_plugin.generator.state import check_finite, check_shapes, rebuilt

# (features (B, F), recorded features (R, F)) -> weights (B, R), in float64.
Weights = Callable[[Tensor, Tensor], Tensor]

_LENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
_NOISES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
_DEGREES = (1, 2, 3)
_NUM_NEIGHBOURS = (2, 3, 5, 8)
_WIDTH = 256


def mean_weights(features: Tensor, recorded: Tensor) -> Tensor:
    """All recorded conditions alike: the average that ignores the condition."""
    return torch.full((len(features), len(recorded)), 1.0 / len(recorded), dtype=torch.float64)


def neighbour_weights(features: Tensor, recorded: Tensor, k: float = 1) -> Tensor:
    """The ``k`` nearest conditions, by inverse distance; a condition that was recorded gets its own mean."""
    return _inverse_distance(torch.cdist(features.double(), recorded.double()), int(k))


def _inverse_distance(distances: Tensor, k: int) -> Tensor:
    """Weights (B, R) of the ``k`` smallest of the distances (B, R); an infinite one never counts."""
    nearest, index = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
    longest = float(distances.masked_fill(distances.isinf(), 0.0).max())
    inverse = 1.0 / nearest.clamp_min(1e-9 * longest + 1e-12)
    weights = torch.zeros_like(distances)
    return weights.scatter_(1, index, inverse / inverse.sum(dim=1, keepdim=True))


def ridge_weights(features: Tensor, recorded: Tensor, degree: float = 1, penalty: float = 1e-2) -> Tensor:
    """Ridge regression on all monomials of the features up to ``degree``, with a free constant."""
    return _kriging(*_polynomial(features, recorded, degree), penalty)


def gp_weights(features: Tensor, recorded: Tensor, length: float = 1.0, noise: float = 1e-2) -> Tensor:
    """Mean of a Gaussian process: squared exponential kernel of one length, a free constant as its mean."""
    return _kriging(*_squared_exponential(features, recorded, length), noise)


def _polynomial(features: Tensor, recorded: Tensor, degree: float) -> tuple[Tensor, Tensor]:
    """Kernel (B, R) and (R, R), of about unit size."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # Divided by F, so that one penalty means the same for few and for many features.
        out: Tensor = ((1.0 + a @ b.T / a.shape[1]).pow(degree) - 1.0) / (2.0**degree - 1.0)
        return out

    features, recorded = features.double(), recorded.double()
    return kernel(features, recorded), kernel(recorded, recorded)


def _squared_exponential(features: Tensor, recorded: Tensor, length: float) -> tuple[Tensor, Tensor]:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * length**2 * a.shape[1]))

    features, recorded = features.double(), recorded.double()
    return kernel(features, recorded), kernel(recorded, recorded)


def _kriging(cross: Tensor, own: Tensor, noise: float) -> Tensor:
    """Weights (B, R) of kriging with an unknown constant (Cressie 1993, 3.2), from kernels (B, R) and (R, R).

    Each row sums to one.
    """
    border = torch.ones(len(cross), 1, dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(bordered(own, noise), torch.cat([cross, border], dim=1).T)[:-1].T
    return weights


def _kriging_leave_one_out(own: Tensor, noise: float) -> Tensor:
    """Weights of each recorded condition by all others, (R, R) with zeros on the diagonal.

    Leaving row i out needs no system of its own: its residual is row i of A⁻¹y over entry (i, i) of A⁻¹, with A the
    bordered kernel matrix (Dubrule 1983, Mathematical Geology 15, 687-699).
    """
    inverse = torch.linalg.inv(bordered(own, noise))[:-1, :-1]
    weights: Tensor = -inverse / inverse.diagonal()[:, None]
    return weights.fill_diagonal_(0.0)


def bordered(own: Tensor, noise: float) -> Tensor:
    """A kernel or Gram matrix (R, R) with ``noise`` added to its diagonal, in a border of ones: (R + 1, R + 1)."""
    R = len(own)
    out = torch.ones(R + 1, R + 1, dtype=torch.float64)
    out[:R, :R] = own + noise * torch.eye(R, dtype=torch.float64)
    out[R, R] = 0.0
    return out


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
    if kind == "ridge":
        return _kriging_leave_one_out(_polynomial(features, features, settings["degree"])[1], settings["penalty"])
    if kind == "gp":
        return _kriging_leave_one_out(
            _squared_exponential(features, features, settings["length"])[1], settings["noise"]
        )
    R = len(features)
    if kind == "mean":
        return (torch.ones(R, R, dtype=torch.float64) / max(1, R - 1)).fill_diagonal_(0.0)
    distances = torch.cdist(features.double(), features.double()).fill_diagonal_(float("inf"))
    return _inverse_distance(distances, min(int(settings.get("k", 1)), R - 1))


def choose_settings(kind: str, features: Tensor, means: Tensor) -> tuple[dict[str, float], float]:
    """The settings of a kind that predict each recorded condition best from the others.

    Args:
        kind: a key of :data:`CENTRES`.
        features: of the recorded conditions, (R, F).
        means: what is to be predicted, (R, K), in units in which its columns count as they should.

    Returns:
        The settings and their squared error, summed over the columns.
    """
    best: tuple[dict[str, float], float] | None = None
    for settings in CENTRES[kind].candidates():
        error = float((leave_one_out(kind, settings, features) @ means.double() - means).square().sum(dim=1).mean())
        if best is None or error < best[1]:
            best = settings, error
    assert best is not None
    return best


class CentreNetwork(nn.Module):
    """A small network from features to latents, (B, F) -> (B, K)."""

    def __init__(self, num_features: int, latent_dim: int) -> None:
        super().__init__()
        widths = (num_features, *(_WIDTH,) * 3)
        layers = [part for a, b in pairwise(widths) for part in (Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, Linear(_WIDTH, latent_dim))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.layers(features)
        return out


@dataclass(frozen=True, eq=False)
class Centre:
    """What is expected of latents at a condition, fitted.

    Attributes:
        kind: a key of :data:`CENTRES`, or ``network``.
        settings: of the kind.
        features: of the recorded conditions, (R, F).
        means: latents of the same, (R, K).
        network: of the kind ``network``.
    """

    kind: str
    settings: Mapping[str, float]
    features: Tensor
    means: Tensor
    network: CentreNetwork | None = None

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Latents (B, K) float32 at features (B, F)."""
        if self.network is not None:
            out: Tensor = self.network(features)
            return out
        weights = CENTRES[self.kind].weights(features.cpu(), self.features, **self.settings)
        return (weights @ self.means.double()).to(features)

    def state_dict(self) -> dict[str, Tensor]:
        network = {} if self.network is None else self.network.state_dict()
        return {"features": self.features, "means": self.means, **{f"network.{k}": v for k, v in network.items()}}

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "settings": dict(self.settings)}

    @classmethod
    def from_state(cls, document: Mapping[str, Any], state: Mapping[str, Tensor]) -> Centre:
        """What :meth:`to_json` and :meth:`state_dict` gave.

        Raises:
            ValueError: an unknown kind, or settings that it does not have.
            StateError: a tensor is missing, of another shape or not finite.
        """
        kind, settings = document["kind"], {name: float(value) for name, value in document["settings"].items()}
        known = set(CENTRES[kind].settings) if kind in CENTRES else set()
        if kind not in (*CENTRES, "network") or set(settings) != known:
            raise ValueError(f"a centre {kind!r} with the settings {', '.join(settings) or 'none'}")
        check_shapes(state, {"features": ("R", "F"), "means": ("R", "K")})
        check_finite(state, ("features", "means"))
        features, means = (state[name].to(torch.float32, copy=True) for name in ("features", "means"))
        network = None
        if kind == "network":
            own = {name: state[name] for name in state if name.startswith("network.")}
            network = rebuilt(partial(CentreNetwork, features.shape[1], means.shape[1]), own, "network.")
            network.requires_grad_(False)
        centre = cls(kind, settings, features, means, network)
        centre(features[:1])  # settings that lead to no weights are told here, and not to whoever samples
        return centre
