"""A class for each position of an item: its pixels (`dense`) or its tokens (`tokens`, `language`).

Loss and score are those of a classification of each position, summed over an item. An item stands for so much of them
as it has positions: the means over items are exactly those over all positions, and their standard errors those of such
ratios, with items as the unit (an item's value is R + (sum - R * count) / mean count, where R is the ratio; Cochran
1977, section 6.4). Differences of two sets pair exactly. Positions whose target is ignored count nowhere.

Nothing is kept of positions but which ones members get wrong, at no more than 1024 random ones of an item.

Shapes: M members, B items in a batch, n items in all, P positions of an item, C classes, N counted positions of a
chunk, S ensemble sizes, H divisions into halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.classification import score_classes
from pdiff_plugin.evaluation.kind import (
    Measured,
    Metric,
    Quantity,
    Scores,
    TaskKind,
    compared,
    found_in,
    hint,
    log_mean_without_each,
    mean_loss_without_each,
    shared_mistakes,
    usual_metrics,
)

IGNORED = -100
"""As in torch.nn.functional.cross_entropy."""
# Probabilities computed at once, float64.
_CHUNK = 2**22
_RATIOS = ("member_loss", "member_score", "loss", "score", "half_difference", "loss_without", "brier")


def score_positions(logits: Tensor, targets: Tensor, order: Tensor, *, with_classes: bool) -> dict[str, Tensor]:
    """Per-item sums (..., B) of logits (M, B, P, C) and targets (B, P).

    Beside what every kind has: ``count`` of positions and ``brier`` (B,), ``loss_without`` each member (M, B),
    ``wrong`` (M, B * P), ``bins`` by confidence (S, 3, number of bins, B) as :class:`metrics.Reliability` has them,
    but summed, and ``with_classes`` the whole ensemble's ``classes`` (3, C, B): hits, told and true ones.
    """
    m, b, p, c = logits.shape
    flat, truth = logits.reshape(m, b * p, c), targets.flatten()
    places = (truth != IGNORED).nonzero().squeeze(1)
    wrong = torch.zeros(m, b * p, dtype=torch.bool)
    sums: dict[str, Tensor] = {}
    for chunk in torch.split(places, max(1, _CHUNK // (c * (m + 32)))):
        found = score_classes(flat[:, chunk], truth[chunk], order)
        wrong[:, chunk] = ~found["member_score"]
        found["loss_without"] = -log_mean_without_each(-found["member_loss"])
        confidence, predicted = found.pop("confidence"), found.pop("predicted")
        item, hit = chunk // p, found["score"]
        found = {key: _sum_by(item, values, b) for key, values in found.items()}
        values = torch.stack([torch.ones_like(confidence), confidence, hit.double()], dim=1)  # (S, 3, N)
        found["bins"] = torch.stack([
            _sum_by(bins * b + item, mine, metrics.NUM_BINS * b).reshape(3, -1, b)
            for bins, mine in zip(metrics.bin_of(confidence), values, strict=True)
        ])  # fmt: skip
        if with_classes:
            once, true = torch.ones(len(chunk)), truth[chunk]
            found["classes"] = torch.stack([
                _sum_by(classes * b + item, counted, c * b).reshape(c, b)
                for classes, counted in ((true, hit[-1]), (predicted[-1], once), (true, once))
            ])  # fmt: skip
        sums = {key: sums[key] + values for key, values in found.items()} if sums else found
    count = (targets != IGNORED).sum(dim=1).double()
    sums["uncertainty"] = sums["uncertainty"] / count.clamp_min(1)
    return sums | {"count": count, "wrong": compared(wrong.reshape(m, b, p))}


def _sum_by(group: Tensor, values: Tensor, num_groups: int) -> Tensor:
    """Sums of (..., N) by group (N,), (..., num_groups) float64."""
    sums = torch.zeros(*values.shape[:-1], num_groups, dtype=torch.float64)
    return sums.index_add_(-1, group, values.double())


def to_ratios(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of items (..., n) as their share in the mean over all positions; see the top of this module.

    Raises:
        ConfigError: no position counts.
    """
    count = found["count"]
    if not bool(count.any()):
        raise ConfigError("targets", "ignored everywhere", "must hold a position that counts")
    for key in _RATIOS:
        ratio = found[key].sum(dim=-1, keepdim=True) / count.sum()
        found[key] = ratio + (found[key] - ratio * count) / count.mean()
    return found


def _reliability(scores: Scores, place: int = -1) -> metrics.Reliability:
    count, confidence, right = scores.more["bins"][place].sum(dim=-1)
    return metrics.Reliability(count, confidence / count.clamp_min(1), right / count.clamp_min(1))


def _reliability_array(scores: Scores) -> Tensor:
    bins = _reliability(scores)
    return torch.stack([bins.count, bins.confidence, bins.accuracy])


def _mean_iou(measured: Measured) -> float:
    hits, told, true = measured.scores.more["classes"].sum(dim=-1)
    either = told + true - hits
    return float((hits / either)[either > 0].mean())


def _check_targets(kind: str, ignore_index: int, shape: str, targets: Any, name: str) -> Tensor:
    """Class indices (B, ...) int64 on the CPU, -100 where they are ignored."""
    if not isinstance(targets, Tensor) or targets.ndim < 2 or targets.is_floating_point() or targets.is_complex():
        expected = f"must be class indices, integers of shape {shape}" + hint(kind, targets)
        raise ConfigError(f"targets of {name}", found_in(targets), expected)
    classes: Tensor = targets.to(device="cpu", dtype=torch.int64)
    return classes.masked_fill(classes == ignore_index, IGNORED)


def _check_logits(kind: str, class_axis: int, logits: Tensor, targets: Tensor, name: str) -> Tensor:
    """``logits`` again, if they are those of ``targets`` with an axis of classes."""
    shape = list(logits.shape[1:])
    num_classes = shape.pop(class_axis) if len(shape) > 1 else 0
    if shape != list(targets.shape):
        wanted: list[Any] = list(targets.shape)
        wanted.insert(class_axis if class_axis > 0 else len(wanted), "C")
        expected = f"must be logits of shape ({', '.join(map(str, wanted))}), a class for each target"
        expected += hint(kind, targets, logits.shape[1:])
        raise ConfigError("output of the model", str(tuple(logits.shape[1:])), expected)
    counted = targets[targets != IGNORED]
    if len(counted) and (counted.min() < 0 or counted.max() >= num_classes):
        found = f"from {int(counted.min())} to {int(counted.max())}"
        expected = f"must be from 0 to {num_classes - 1}, the model's classes; other ones need Task(ignore_index=...)"
        raise ConfigError(f"targets of {name}", found, expected)
    return logits


def _score_dense(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    return score_positions(logits.movedim(2, -1).flatten(2, -2), targets.flatten(1), order, with_classes=True)


def _score_tokens(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    return score_positions(logits, targets, order, with_classes=False)


def _score_next_tokens(logits: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    return score_positions(logits[:, :, :-1], targets[:, 1:], order, with_classes=False)


_LOSS = Quantity("nll", "NLL", "NLL", ".4f")
_SCORE = Quantity("accuracy", "acc", "accuracy", "%")
_ECE = Metric(
    "ensemble_ece", "ECE", ".4f", lambda s: _reliability(s.scores, s.place).ece(), "lower",
    f"expected calibration error of the mean probabilities, over {metrics.NUM_BINS} bins of equal width",
)  # fmt: skip
_BRIER = Metric(
    "ensemble_brier", "", ".4f", lambda s: float(s.scores.more["brier"].mean()), "lower",
    "squared error of the mean probabilities, summed over classes",
)  # fmt: skip
_MEAN_IOU = Metric(
    "ensemble_miou", "ens mIoU", "%", _mean_iou, "higher",
    "overlap of told and true pixels, mean over the classes that occur or are told",
)  # fmt: skip
_PERPLEXITY = Metric(
    "ensemble_perplexity", "ens ppl", ".4g", lambda s: float(s.scores.loss[s.place].mean().exp()), "lower",
    "exp of the NLL over all tokens",
)  # fmt: skip


def _kind(
    name: str,
    unit: str,
    ignore_index: int,
    score_batch: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
    more: tuple[Metric, ...],
) -> TaskKind:
    is_dense = name == "dense"
    axis, shape = (1, "(B, H, W)") if is_dense else (-1, "(B, T)")
    likeness = shared_mistakes(unit)
    return TaskKind(
        name=name,
        loss=_LOSS,
        score=_SCORE,
        likeness=likeness,
        check_targets=lambda targets, data: _check_targets(name, ignore_index, shape, targets, data),
        check_outputs=lambda logits, targets, data: _check_logits(name, axis, logits, targets, data),
        score_batch=score_batch,
        errors=lambda scores: scores.more["wrong"],
        left_out=mean_loss_without_each,
        metrics=usual_metrics(_LOSS, _SCORE, likeness, "mean probabilities", (*more, _ECE, _BRIER)),
        curves=("ensemble_nll", "ensemble_ece", "ensemble_accuracy"),
        arrays={"reliability": _reliability_array},
        blank_targets=lambda outputs: torch.zeros_like(outputs[0].select(axis, 0), dtype=torch.int64, device="cpu"),
        finish=to_ratios,
        ensemble_options={"class_axis": axis},
    )


def dense(ignore_index: int = IGNORED) -> TaskKind:
    """A class for each pixel: logits (B, C, H, W), targets (B, H, W), or with any other number of such axes."""
    return _kind("dense", "pixels", ignore_index, _score_dense, (_MEAN_IOU,))


def tokens(ignore_index: int = IGNORED) -> TaskKind:
    """A class for each token: logits (B, T, V), targets (B, T) in their places."""
    return _kind("tokens", "tokens", ignore_index, _score_tokens, (_PERPLEXITY,))


def language(ignore_index: int = IGNORED) -> TaskKind:
    """The next token: logits (B, T, V), targets (B, T) aligned with the inputs, as transformers takes ``labels``.

    The output at position t is judged by the target at t + 1; the first target counts nowhere.
    """
    return _kind("language", "tokens", ignore_index, _score_next_tokens, (_PERPLEXITY,))
