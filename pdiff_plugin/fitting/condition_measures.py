"""What a fit on conditions says of its result, and where conditions are too few, or say nothing.

Shapes: N snapshots, R runs or different conditions, D values in a row.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pdiff_plugin.fitting.centre_stage import leading
from pdiff_plugin.fitting.condition_stage import Cloud, FittedCondition
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.centres import bordered, choose_settings
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.variables import FEW_VALUES
from pdiff_plugin.snapshots.files import json_safe
from pdiff_plugin.snapshots.split import Split

logger = logging.getLogger(__name__)

_DIGITS = 6
_JITTER = 1e-9
_NUM_SHUFFLES = 19
_MAX_SHUFFLED = 200
# The mean of R independent starts is 1/sqrt(R) as long as each of them; of one start it is about as long.
_FEW_TIMES_CHANCE = 1.5
_MIN_RUNS = 8
_MAX_COLUMNS = 65536


def measure_conditions(
    generator: WeightGenerator,
    encoded: Encoded,
    split: Split,
    gram: Tensor,
    cloud: Cloud,
    fitted: FittedCondition,
) -> dict[str, Any]:
    """The report of a fit on conditions, with a warning where they cannot be learned from.

    ``condition`` holds ``heldout_error`` (of single samples at conditions held out, in latents, as a share of the
    average's), the same of every centre alone and of each diffusion that was tried, the chosen ``centre``, the
    ``ceiling`` (share of what a condition's mean differs from the others' that lies in their span: no generator made of
    these runs comes nearer, by weights), and ``explained`` (share that regressions predict, leaving each
    condition out in turn) beside the most that conditions shuffled at random reach.
    """
    found = {name: json_safe(value, _DIGITS) for name, value in fitted.report.items()}
    found |= {"ceiling": json_safe(ceiling(gram, cloud.place), _DIGITS), **_explained(cloud, generator.config.seed)}
    report = {
        "fidelity": encoded.fidelity,
        "fidelity_is_ok": encoded.fidelity >= generator.config.autoencoder.min_fidelity,
        "latent_dim": generator.autoencoder.latent_dim,
        "diffusion_steps": found.pop("diffusion_steps"),
        "condition": found,
    }
    _warn_of_few_values(generator)
    if found["explained"] <= max(0.0, found["explained_shuffled"]):
        logger.warning(
            "conditions that were left out are predicted by the others no better than if conditions are shuffled: they "
            "explain nothing of how the runs differ, or lie too far apart. Trust members only where they were judged."
        )
    if are_independent(generator, split):
        logger.warning(
            "the runs seem to start from different weights: what differs between them is mostly the start. Record runs "
            "that all begin from one trained model."
        )
    return report


def ceiling(gram: Tensor, place: Tensor) -> float:
    """Share of the squared distance of a condition's mean to the mean of the others that lies in their affine span.

    Each condition is left out in turn, by one inverse: with A the Gram matrix of the means, bordered by ones, the
    squared distance of mean i to the affine span of the others is 1 / (A⁻¹)_ii.

    Args:
        gram: inner products of the snapshots, (N, N) float64.
        place: condition of each, (N,).
    """
    member = one_hot(place).double()
    means = member / member.sum(dim=0)
    inner = means.T @ gram @ means  # (R, R)
    R = len(inner)
    centred = inner - inner.mean(dim=0) - inner.mean(dim=1, keepdim=True) + inner.mean()
    total = centred.diagonal().sum() * (R / (R - 1)) ** 2
    # A little on the diagonal: where there are more conditions than directions, the others span everything.
    inverse = torch.linalg.inv(bordered(centred, _JITTER * float(centred.diagonal().mean())))
    lost = (1.0 / inverse.diagonal()[:R]).clamp_min(0.0).sum()
    return float(1.0 - lost / total.clamp_min(1e-300))


def _explained(cloud: Cloud, seed: int) -> dict[str, Any]:
    """Share of what conditions differ by that others predict, each left out in turn; and the same for shuffled ones."""
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(cloud.features), generator=rng)[:_MAX_SHUFFLED]
    features, means = cloud.features[chosen], cloud.means[chosen]
    means = (means - means.mean(dim=0)) * leading(means).sqrt()
    total = max(float(means.double().square().sum(dim=1).mean()), 1e-30)

    def share(features: Tensor) -> float:
        return 1.0 - min(choose_settings(kind, features, means)[1] for kind in ("neighbours", "ridge")) / total

    shuffled = [share(features[torch.randperm(len(means), generator=rng)]) for _ in range(_NUM_SHUFFLES)]
    return {"explained": round(share(features), 4), "explained_shuffled": round(max(shuffled), 4)}


def _warn_of_few_values(generator: WeightGenerator) -> None:
    assert generator.variables is not None
    for variable in generator.variables.variables:
        if variable.kind in ("category", "vector"):
            continue
        count = len({condition[variable.name] for condition in generator.conditions})
        if 1 < count < FEW_VALUES:
            logger.warning(
                "%s was recorded at %d different values only: what lies between them is a guess. Record %d or more, or "
                "name it a category (--condition %s:category).",
                variable.name,
                count,
                FEW_VALUES,
                variable.name,
            )


def are_independent(generator: WeightGenerator, split: Split) -> bool:
    """Whether the runs look as if each had begun from weights of its own, by the matrices among their tensors.

    The mean over R independent starts is 1/sqrt(R) as long as one of them.
    """
    R = len(split.store.trajectories)
    if R < _MIN_RUNS:
        return False
    ends = torch.stack([(split.trajectory == run).nonzero()[-1, 0] for run in range(R)])
    ratios = []
    for spec in split.store.layout:
        if len(spec.shape) < 2:
            continue
        place = split.store.layout.slices[spec.name]
        values = split.read(place.start, min(place.stop, place.start + _MAX_COLUMNS), ends).double()
        length = values.square().mean().sqrt()
        if length > 0:
            ratios.append(float(values.mean(dim=0).square().mean().sqrt() / length) * R**0.5)
    return bool(ratios) and sorted(ratios)[len(ratios) // 2] < _FEW_TIMES_CHANCE
