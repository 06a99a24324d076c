"""The figures of a set: those that its kind of task measures, also on other data and over several draws.

evaluation.json has them flat, as in ``ensemble_nll``, ``shifted/NAME`` and ``ood_auroc/NAME``, with the spread over
several draws as ``ensemble_nll_std``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from pdiff_plugin.evaluation.kind import Measured, Scores, TaskKind


@dataclass(frozen=True)
class Figures:
    """Figures of one set; NaN where something is undefined, as the likeness within a set of one.

    Attributes:
        values: by the key of their metric.
        shifted: those of the ensemble on shifted data, by the name of the data.
        ood_auroc: how well its uncertainty tells data of no class from its own, by the name of the data.
        spread: standard deviation over draws, by the key of the metric.
        num_draws: that these figures are means over.
    """

    values: dict[str, float]
    shifted: Mapping[str, Figures] = field(default_factory=dict)
    ood_auroc: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    num_draws: int = 1

    def to_json(self) -> dict[str, Any]:
        """One flat dictionary, with None for what is undefined: NaN is not equal to itself."""
        found: dict[str, Any] = {
            **self.values,
            **{f"ood_auroc/{name}": value for name, value in self.ood_auroc.items()},
            **{f"shifted/{name}": figures.to_json() for name, figures in self.shifted.items()},
            **{f"{key}_std": value for key, value in self.spread.items()},
        }
        if self.num_draws > 1:
            found["draws"] = self.num_draws
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}


def measure(kind: TaskKind, measured: Measured) -> dict[str, float]:
    """What the metrics of a kind of task find, by their keys."""
    return {metric.key: metric.of(measured) for metric in kind.metrics}


def measure_shifted(kind: TaskKind, scores: Scores) -> Figures:
    """Figures of the ensemble on shifted data."""
    measured = Measured(scores)
    return Figures({metric.key: metric.of(measured) for metric in kind.metrics if metric.is_of_ensemble})


def over_draws(kind: TaskKind, draws: Sequence[Figures]) -> Figures:
    """Means over the draws of a set, with the spread of the ensemble's loss and score where there are several."""
    first = draws[0]
    if len(draws) == 1:
        return first
    # A count is the same in every draw, and stays an integer.
    values = {
        key: value if isinstance(value, int) else fmean(draw.values[key] for draw in draws)
        for key, value in first.values.items()
    }
    return Figures(
        values,
        {name: over_draws(kind, [draw.shifted[name] for draw in draws]) for name in first.shifted},
        {name: fmean(draw.ood_auroc[name] for draw in draws) for name in first.ood_auroc},
        {key: stdev(draw.values[key] for draw in draws) for key in (kind.ensemble_score, kind.ensemble_loss)},
        len(draws),
    )
