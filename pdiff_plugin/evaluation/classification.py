"""One class for each item: logits (B, C) and class indices (B,).

Shapes: M members, B items in a batch, n items in all, C classes, S ensemble sizes, H divisions into halves, T
temperatures.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.errors import DataError
from pdiff_plugin.evaluation import metrics, temperature
from pdiff_plugin.evaluation.kind import (
    MEMBERS,
    NEAREST,
    Likeness,
    Measured,
    Metric,
    Quantity,
    Scores,
    TaskKind,
    best_score,
    ensemble_loss,
    ensemble_score,
    ensemble_sizes,
    found_in,
    halves,
    hint,
    spread_of_scores,
)


def check_targets(targets: Any, name: str) -> Tensor:
    """Class indices (B,) int64 on the CPU.

    Raises:
        DataError: they are something else.
    """
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        expected = "must be class indices, integers of shape (B,)" + hint("classification", targets)
        raise DataError(f"targets of {name}", found_in(targets), expected)
    return targets.to(device="cpu", dtype=torch.int64)


def check_logits(logits: Tensor, targets: Tensor, name: str) -> Tensor:
    """``logits`` again, if they are (M, B, C) and every one of ``targets`` (B,) is a class.

    Raises:
        DataError: they are not.
    """
    if logits.ndim != 3 or logits.shape[1] != len(targets):
        expected = f"must be logits of shape ({len(targets)}, C), one per target"
        expected += hint("classification", targets, logits.shape[1:])
        raise DataError("output of the model", str(tuple(logits.shape[1:])), expected)
    if targets.min() < 0 or targets.max() >= logits.shape[2]:
        found = f"from {int(targets.min())} to {int(targets.max())}"
        raise DataError(f"targets of {name}", found, f"must be from 0 to {logits.shape[2] - 1}, the model's classes")
    return logits


def score_batch(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Per-item results (..., B) of logits (M, B, C).

    Those of :func:`score_classes` but ``predicted``, and of the whole ensemble at each temperature ``loss_at`` and
    ``confidence_at``, (T, B).
    """
    log_probs = metrics.member_log_probs(logits)
    found = _score(logits, log_probs, targets, order)
    del found["predicted"]
    mean = log_probs.logsumexp(dim=0) - math.log(len(log_probs))  # (B, C)
    found["loss_at"], found["confidence_at"] = temperature.scores_at(mean, targets)
    return found


def score_classes(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Per-item results (..., B) of logits (M, B, C).

    Beside what every kind has: ``confidence``, the ensemble's largest probability, and ``predicted``, its class, both
    (S, B), and ``brier``, (B,).
    """
    return _score(logits, metrics.member_log_probs(logits), targets, order)


def _score(logits: Tensor, log_probs: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    log_true = -metrics.nll(log_probs, targets)  # (M, B)
    sizes = torch.tensor(ensemble_sizes(len(logits)))
    counts = sizes.double()[:, None]
    probs = log_probs[order].exp().cumsum(dim=0)[sizes - 1] / counts[..., None]  # (S, B, C)
    confidence, predicted = probs.max(dim=-1)
    return {
        "member_score": (log_probs.argmax(dim=-1) == targets) & ~logits.isnan().any(dim=-1),
        "member_loss": -log_true,
        "loss": counts.log() - log_true[order].logcumsumexp(dim=0)[sizes - 1],
        "score": predicted == targets,
        "half_difference": _hit_difference(log_probs.exp(), targets),
        "uncertainty": metrics.entropy(probs[-1].log()),
        "confidence": confidence,
        "predicted": predicted,
        "brier": metrics.brier(probs[-1], targets),
    }


def nll_without_each(member_nll: Tensor) -> Tensor:
    """Mean NLL of the ensemble without each of its members, (M,), from -log p(true) of each, (M, n)."""
    probs = (-member_nll).exp()
    others = (probs.sum(dim=0) - probs).clamp_min(1e-300) / (len(probs) - 1)  # (M, n)
    return -others.log().mean(dim=1)


def _hit_difference(probs: Tensor, targets: Tensor) -> Tensor:
    """Hits of one half of the members minus those of the other, (H, B) int8, from probabilities (M, B, C)."""
    is_mine = halves(len(probs)).to(probs.dtype)  # (H, M)
    mine = (is_mine @ probs.flatten(1)).reshape(len(is_mine), *probs.shape[1:])  # (H, B, C)
    theirs = probs.sum(dim=0) - mine
    return (mine.argmax(dim=-1) == targets).to(torch.int8) - (theirs.argmax(dim=-1) == targets).to(torch.int8)


def _ece(measured: Measured) -> float:
    scores = measured.scores
    return metrics.ece(scores.more["confidence"][measured.place], scores.score[measured.place])


def loss_when_scaled(scores: Scores, first_half: Tensor) -> Tensor:
    """NLL of the ensemble after temperature scaling, (n,)."""
    return temperature.scaled(scores.more["loss_at"], scores.more["loss_at"], first_half)


def _ece_when_scaled(measured: Measured) -> float:
    more = measured.scores.more
    confidence = temperature.scaled(more["confidence_at"], more["loss_at"], measured.first_half)
    return metrics.ece(confidence, measured.scores.score[-1])


def _reliability(scores: Scores) -> Tensor:
    """Count, confidence and accuracy by bin, (3, number of bins)."""
    bins = metrics.reliability(scores.more["confidence"][-1], scores.score[-1])
    return torch.stack([bins.count, bins.confidence, bins.accuracy])


METRICS = (
    MEMBERS,
    Metric("accuracy_mean", "acc mean", "%", lambda s: float(s.member_scores.mean()), "higher", "mean over members"),
    Metric("accuracy_std", "± std", "%", spread_of_scores, "", "standard deviation over members"),
    Metric(
        "accuracy_best", "best*", "%", best_score, "higher", "chosen on one half of the data, scored on the other",
        is_noted=True,
    ),
    Metric("accuracy_worst", "worst", "%", lambda s: float(s.member_scores.min()), "higher", "of the worst member"),
    Metric("ensemble_accuracy", "ens acc", "%", ensemble_score, "higher", "accuracy of the mean probabilities"),
    Metric("ensemble_nll", "ens NLL", ".4f", ensemble_loss, "lower", "mean -log p(true) of the mean probabilities"),
    Metric(
        "scaled_nll", "at T", ".4f", lambda s: float(loss_when_scaled(s.scores, s.first_half).mean()), "lower",
        "ens NLL after temperature scaling, the temperature chosen on the other half of the data", is_noted=True,
    ),
    Metric(
        "ensemble_ece", "ECE", ".4f", _ece, "lower",
        f"expected calibration error of the mean probabilities, over {metrics.NUM_BINS} bins of equal width",
    ),
    Metric("scaled_ece", "", ".4f", _ece_when_scaled, "lower", "the same after temperature scaling"),
    Metric(
        "ensemble_brier", "", ".4f", lambda s: float(s.scores.more["brier"].mean()), "lower",
        "squared error of the mean probabilities, summed over classes",
    ),
    Metric(
        "wrong_iou_mean", "IoU", ".3f", lambda s: metrics.pair_mean(s.within), "lower",
        "share of errors in common, over pairs of members", is_noted=True,
    ),
    Metric(
        "wrong_iou_max_to_snapshots", "IoU to snap", ".3f", lambda s: float(s.closest.nanmean()), "lower",
        "the same with the closest snapshot, over members", is_noted=True,
    ),
    NEAREST,
    Metric(
        "member_nll_mean", "", ".4f", lambda s: float(s.scores.member_loss.mean()), "lower",
        "mean -log p(true) over members",
    ),
)  # fmt: skip

CLASSIFICATION = TaskKind(
    name="classification",
    loss=Quantity("nll", "NLL", "NLL", ".4f"),
    score=Quantity("accuracy", "acc", "accuracy", "%"),
    likeness=Likeness(
        "wrong_iou",
        "IoU",
        "share of errors in common",
        ".3f",
        of=metrics.wrong_iou,
        copied="of the items that a generated member or its closest snapshot gets wrong, {found:.1%} are the same",
        all_alike="Members share {found:.1%} of their errors with the closest snapshot, but the snapshots themselves "
        "share {reference:.1%}: that tells nothing of copies.",
    ),
    check_targets=check_targets,
    check_outputs=check_logits,
    score_batch=score_batch,
    errors=lambda scores: ~scores.member_score,
    left_out=lambda scores: nll_without_each(scores.member_loss),
    metrics=METRICS,
    curves=("ensemble_nll", "ensemble_ece", "ensemble_accuracy"),
    arrays={"reliability": _reliability},
    groups=lambda targets: targets,
    loss_when_scaled=loss_when_scaled,
)
