"""Real values: one (B,) or several (B, T) for each item; `gaussian-regression` has a variance of each as well.

An item's loss is the mean over its T values. The score is R²: an item has 1 - its squared error / the variance of the
targets, whose mean over items is 1 - (sum of squared errors) / (sum of squared deviations); several values are weighted
by their variance, as in scikit-learn's ``r2_score(multioutput="variance_weighted")``.

An output that is not a finite number counts as 0, of variance 1.

Shapes: M members, B items in a batch, n items in all, T values of an item, S ensemble sizes, H divisions into halves.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.ensemble.runner import gaussians_of
from pdiff_plugin.errors import DataError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.kind import (
    MIN_GAIN,
    Metric,
    Quantity,
    TaskKind,
    alike_errors,
    compared,
    found_in,
    half_means,
    log_mean_without_each,
    log_means_of_first,
    mean_loss_without_each,
    means_of_first,
    usual_metrics,
)

COVERAGE = 0.9
"""Share of the targets that the interval of the ensemble ought to hold."""


def check_targets(targets: Any, name: str) -> Tensor:
    """Values (B, ...) float64 on the CPU.

    Raises:
        DataError: they are something else.
    """
    if not isinstance(targets, Tensor) or targets.ndim < 1 or targets.is_complex() or targets.dtype == torch.bool:
        raise DataError(f"targets of {name}", found_in(targets), "must be numbers of shape (B,) or (B, T)")
    return targets.to(device="cpu", dtype=torch.float64)


def check_values(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    """Outputs (M, B, ...) again, if there is one for each of ``targets`` (B, ...); an axis of one does not matter.

    Raises:
        DataError: there is not.
    """
    if outputs.ndim < 2 or _without_ones(outputs.shape[1:]) != _without_ones(targets.shape):
        expected = f"must be of the shape {tuple(targets.shape)} that the targets of {name} have"
        if outputs.ndim == 3 and targets.ndim == 1:
            classes = bool((targets == targets.round()).all())
            expected += f'; is this kind="{"classification" if classes else "gaussian-regression"}"?'
        raise DataError("output of the model", str(tuple(outputs.shape[1:])), expected)
    return outputs


def check_gaussians(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    """Means and variances (M, B, ..., 2) again, if they fit ``targets`` (B, ...).

    Raises:
        DataError: they do not, or a variance is negative.
    """
    check_values(outputs[..., 0], targets, name)
    if bool((outputs[..., 1] < 0).any()):
        expected = "must not be negative; an output named log_variance may be"
        raise DataError("variance in the output of the model", float(outputs[..., 1].nan_to_num(0).min()), expected)
    return outputs


def score_values(outputs: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Per-item results (..., B) of outputs (M, B, ...).

    Beside what every kind has: ``loss_without`` each member (M, B), ``residuals`` (M, B * T), and of the whole ensemble
    the squared error ``mse``, the absolute error ``mae``, ``crps`` and ``covered``, each (B,).
    """
    y = targets.reshape(len(targets), -1)  # (B, T)
    values = outputs.double().reshape(*outputs.shape[:2], -1).nan_to_num(0.0, 0.0, 0.0)  # (M, B, T)
    means = means_of_first(values, order)  # (S, B, T)
    others = (values.sum(dim=0) - values) / max(len(values) - 1, 1)
    mine, theirs = half_means(values)
    tail = torch.tensor([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], dtype=torch.float64)
    low, high = values.quantile(tail, dim=0)
    return {
        "member_loss": _squared(values, y),
        "member_score": -_squared(values, y),
        "loss": _squared(means, y),
        "score": -_squared(means, y),
        "half_difference": _squared(theirs, y) - _squared(mine, y),
        "uncertainty": values.var(dim=0, correction=0).mean(dim=1),
        "loss_without": _squared(others, y),
        "residuals": compared(values - y),
        "mse": _squared(means[-1], y),
        "mae": (means[-1] - y).abs().mean(dim=1),
        "crps": metrics.crps_of_members(values, y).mean(dim=1),
        "covered": ((low <= y) & (y <= high)).double().mean(dim=1),
        "targets": y.T,
    }


def score_gaussians(outputs: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    """The same of means and variances (M, B, ..., 2): the ensemble is the even mixture of its members' Gaussians.

    Each of several values has a mixture of its own.
    """
    y = targets.reshape(len(targets), -1)
    mean = outputs[..., 0].double().reshape(*outputs.shape[:2], -1).nan_to_num(0.0, 0.0, 0.0)
    variance = outputs[..., 1].double().reshape(mean.shape).nan_to_num(1.0, 1.0, 1.0).clamp_min(1e-12)
    log_p = -(variance.log() + (y - mean).square() / variance + math.log(2 * math.pi)) / 2  # (M, B, T)
    below = torch.special.ndtr((y - mean) / variance.sqrt()).mean(dim=0)  # the mixture's mass below the target
    return score_values(outputs[..., 0], targets, order) | {
        "member_loss": -log_p.mean(dim=2),
        "loss": -log_means_of_first(log_p, order).mean(dim=2),
        "loss_without": -log_mean_without_each(log_p).mean(dim=2),
        "uncertainty": (variance.mean(dim=0) + mean.var(dim=0, correction=0)).mean(dim=1),
        "crps": metrics.crps_of_gaussians(mean, variance, y).mean(dim=1),
        "covered": ((below - 0.5).abs() <= COVERAGE / 2).double().mean(dim=1),
    }


def to_r2(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores as R², once the variance of all targets is known; as it is where they do not vary."""
    variance = float(found.pop("targets").var(dim=1, correction=0).mean()) or 1.0
    for key in ("member_score", "score"):
        found[key] = 1 + found[key] / variance
    found["half_difference"] = found["half_difference"] / variance
    return found


def _squared(values: Tensor, targets: Tensor) -> Tensor:
    return (values - targets).square().mean(dim=-1)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *(size for size in shape[1:] if size != 1))


_R2 = Quantity("r2", "R²", "R²", ".4f")
_MSE = Quantity("mse", "MSE", "mean squared error", ".5g")
_NLL = Quantity("nll", "NLL", "NLL", ".4f")
_RESIDUALS = alike_errors("residuals")


def _extras(crps: str, interval: str) -> tuple[Metric, ...]:
    """Figures of the ensemble by the name of what was kept of each item."""
    return (
        Metric(
            "ensemble_mae", "ens MAE", ".5g", lambda s: float(s.scores.more["mae"].mean()), "lower",
            "mean absolute error of the mean output",
        ),
        Metric(
            "ensemble_crps", "ens CRPS", ".5g", lambda s: float(s.scores.more["crps"].mean()), "lower",
            f"continuous ranked probability score of {crps}",
        ),
        Metric(
            "ensemble_coverage", f"in {COVERAGE:.0%}", "%", lambda s: float(s.scores.more["covered"].mean()), "",
            f"share of targets within {interval}, ideally {COVERAGE:.0%}", is_noted=True,
        ),
    )  # fmt: skip


REGRESSION = TaskKind(
    name="regression",
    loss=_MSE,
    score=_R2,
    likeness=_RESIDUALS,
    check_targets=check_targets,
    check_outputs=check_values,
    score_batch=score_values,
    errors=lambda scores: scores.more["residuals"],
    left_out=mean_loss_without_each,
    metrics=usual_metrics(
        _MSE, _R2, _RESIDUALS, "mean output",
        _extras("the members' empirical distribution", "the middle 90% of the members' outputs"),
    ),
    curves=("ensemble_mse", "ensemble_r2"),
    blank_targets=lambda outputs: torch.zeros(outputs.shape[1:], dtype=torch.float64),
    finish=to_r2,
    ensemble_options={"task": "regression"},
)  # fmt: skip

GAUSSIAN_REGRESSION = replace(
    REGRESSION,
    name="gaussian-regression",
    loss=_NLL,
    check_outputs=check_gaussians,
    score_batch=score_gaussians,
    metrics=usual_metrics(
        _NLL, _R2, _RESIDUALS, "even mixture of the members' Gaussians",
        (
            Metric(
                "ensemble_mse", "ens MSE", ".5g", lambda s: float(s.scores.more["mse"].mean()), "lower",
                "mean squared error of the mean output",
            ),
            *_extras("the mixture, in closed form", "the middle 90% of the mixture"),
        ),
    ),
    curves=("ensemble_nll", "ensemble_r2"),
    pick=gaussians_of,
    blank_targets=lambda outputs: torch.zeros(outputs.shape[1:-1], dtype=torch.float64),
    ensemble_options={"task": "gaussian-regression"},
    # In nats: a density has a unit, and its NLL any sign.
    gain=lambda loss: MIN_GAIN,
)  # fmt: skip
