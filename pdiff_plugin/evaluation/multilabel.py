"""Several labels for each item, each there or not: logits (B, L), zeros and ones (B, L).

An item's loss is the mean binary cross-entropy of its labels, its score the share of its labels that are told right
(the Hamming score); a label is told to be there where its mean probability is above one half.

Shapes: M members, B items in a batch, n items in all, L labels, S ensemble sizes, H divisions into halves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pdiff_plugin.errors import DataError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.kind import (
    Measured,
    Metric,
    Quantity,
    Scores,
    TaskKind,
    compared,
    found_in,
    half_means,
    hint,
    log_mean_without_each,
    log_means_of_first,
    mean_loss_without_each,
    means_of_first,
    shared_mistakes,
    usual_metrics,
)


def check_targets(targets: Any, name: str) -> Tensor:
    """Which labels are there, (B, L) bool on the CPU.

    Raises:
        DataError: targets are something else than zeros and ones.
    """
    if not isinstance(targets, Tensor) or targets.ndim != 2 or not bool(((targets == 0) | (targets == 1)).all()):
        expected = "must be zeros and ones of shape (B, L)" + hint("multilabel", targets)
        raise DataError(f"targets of {name}", found_in(targets), expected)
    return targets.to(device="cpu", dtype=torch.bool)


def check_logits(logits: Tensor, targets: Tensor, name: str) -> Tensor:
    """``logits`` again, if they are (M, B, L) as ``targets`` are (B, L).

    Raises:
        DataError: they are not.
    """
    if logits.shape[1:] != targets.shape:
        expected = f"must be logits of shape {tuple(targets.shape)}, one per label of {name}"
        expected += hint("multilabel", targets.long(), logits.shape[1:])
        raise DataError("output of the model", str(tuple(logits.shape[1:])), expected)
    return logits


def score_labels(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Per-item results (..., B) of logits (M, B, L). NaN counts as a probability of one half, and as wrong.

    Beside what every kind has: ``loss_without`` each member (M, B), ``wrong`` (M, B * L), and ``probs`` of the whole
    ensemble and the ``truth``, both (L, B).
    """
    broken = logits.isnan()
    logits = logits.double().masked_fill(broken, 0.0)
    right = ((logits > 0) == targets) & ~broken  # (M, B, L)
    log_true = torch.where(targets, logsigmoid(logits), logsigmoid(-logits))
    probs = means_of_first(logits.sigmoid(), order)  # (S, B, L)
    mine, theirs = ((half > 0.5) == targets for half in half_means(logits.sigmoid()))
    whole = probs[-1]
    entropy = torch.special.entr(whole) + torch.special.entr(1 - whole)
    return {
        "member_loss": -log_true.mean(dim=2),
        "member_score": right.double().mean(dim=2),
        "loss": -log_means_of_first(log_true, order).mean(dim=2),
        "score": ((probs > 0.5) == targets).double().mean(dim=2),
        "half_difference": mine.double().mean(dim=2) - theirs.double().mean(dim=2),
        "uncertainty": entropy.mean(dim=1),
        "loss_without": -log_mean_without_each(log_true).mean(dim=2),
        "wrong": compared(~right),
        "probs": whole.T,
        "truth": targets.T,
    }


def _told(scores: Scores) -> tuple[Tensor, Tensor]:
    """Which labels are told to be there, and which are, both (L, n) bool."""
    return scores.more["probs"] > 0.5, scores.more["truth"]


def _subset_accuracy(measured: Measured) -> float:
    told, truth = _told(measured.scores)
    return float((told == truth).all(dim=0).double().mean())


def _macro_f1(measured: Measured) -> float:
    told, truth = _told(measured.scores)
    hits, either = (told & truth).sum(dim=1), told.sum(dim=1) + truth.sum(dim=1)
    return float((2 * hits / either)[either > 0].mean())


def _mean_average_precision(measured: Measured) -> float:
    more = measured.scores.more
    found = [metrics.average_precision(p, t) for p, t in zip(more["probs"], more["truth"], strict=True)]
    return float(torch.tensor(found, dtype=torch.float64).nanmean())


def _ece(measured: Measured) -> float:
    more = measured.scores.more
    return metrics.ece(more["probs"].flatten(), more["truth"].flatten())


_LOSS = Quantity("bce", "BCE", "binary cross-entropy", ".4f")
_SCORE = Quantity("hamming", "Hamming", "share of right labels", "%")
_LIKENESS = shared_mistakes("labels")

MULTILABEL = TaskKind(
    name="multilabel",
    loss=_LOSS,
    score=_SCORE,
    likeness=_LIKENESS,
    check_targets=check_targets,
    check_outputs=check_logits,
    score_batch=score_labels,
    errors=lambda scores: scores.more["wrong"],
    left_out=mean_loss_without_each,
    metrics=usual_metrics(
        _LOSS, _SCORE, _LIKENESS, "mean probabilities",
        (
            Metric("ensemble_subset_accuracy", "all right", "%", _subset_accuracy, "higher", "items all right"),
            Metric("ensemble_f1", "ens F1", ".4f", _macro_f1, "higher", "F1, mean over labels that occur or are told"),
            Metric(
                "ensemble_map", "ens mAP", ".4f", _mean_average_precision, "higher",
                "average precision, mean over the labels that occur",
            ),
            Metric(
                "ensemble_ece", "ECE", ".4f", _ece, "lower",
                f"expected calibration error of the labels' mean probabilities, over {metrics.NUM_BINS} bins",
            ),
        ),
    ),
    curves=("ensemble_bce", "ensemble_hamming"),
    blank_targets=lambda outputs: torch.zeros(outputs.shape[1:], dtype=torch.bool),
    ensemble_options={"task": "multilabel"},
)  # fmt: skip
