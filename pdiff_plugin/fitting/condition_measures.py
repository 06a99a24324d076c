"""What a fit on conditions says of its result, and where conditions are too few, or say nothing.

Shapes: N snapshots, R runs, D values in a row.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from pdiff_plugin.fitting.condition_stage import Cloud, FittedCondition
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.variables import FEW_VALUES
from pdiff_plugin.snapshots.files import json_safe
from pdiff_plugin.snapshots.split import Split

logger = logging.getLogger(__name__)

_DIGITS = 6
# The mean of R independent starts is 1/sqrt(R) as long as each of them; of one start it is about as long.
_FEW_TIMES_CHANCE = 1.5
_MIN_RUNS = 8
_MAX_COLUMNS = 65536


def measure_conditions(
    generator: WeightGenerator, encoded: Encoded, split: Split, cloud: Cloud, fitted: FittedCondition
) -> dict[str, Any]:
    """The report of a fit on conditions, with a warning where they cannot be learned from.

    ``condition`` holds ``heldout_error`` (of the mean of samples at conditions held out, in latents, as a share of the
    average's), the same of every centre alone and of each diffusion that was tried, the chosen ``centre``, the
    ``ceiling`` (share of what a condition's mean differs from the average that lies in the span of the others: no
    generator made of these runs reaches further), and ``explained`` (share that regressions predict, leaving each
    condition out in turn) beside the most that conditions shuffled at random reach.
    """
    found = {name: json_safe(value, _DIGITS) for name, value in fitted.report.items()}
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
            "the conditions explain nothing of how the runs differ: shuffled at random they predict held-out runs as "
            "well. Members at a condition will be no better than the average.",
        )
    if are_independent(generator, split):
        logger.warning(
            "the runs seem to start from different weights: what differs between them is mostly the start. Record runs "
            "that all begin from one trained model."
        )
    return report


def _warn_of_few_values(generator: WeightGenerator) -> None:
    assert generator.variables is not None
    for variable in generator.variables.variables:
        if variable.kind in ("category", "vector"):
            continue
        count = len({condition[variable.name] for condition in generator.conditions})
        if 1 < count < FEW_VALUES:
            logger.warning(
                "%s was recorded at %d different values only: what lies between them is a guess. Record %d or more, or "
                "name it a category (--kinds %s:category).",
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
