"""Answers of any other kind, judged by a loss of the user's own: loss(output, targets) -> (B,).

The ensemble is ``combine`` of the members' outputs, their mean unless given, and its loss that of this one output. The
score is the loss with its sign turned, and two members are as alike as the losses of their items go together.

Shapes: M members, B items in a batch, n items in all, S ensemble sizes, H divisions into halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pdiff_plugin.errors import DataError
from pdiff_plugin.evaluation.kind import (
    MIN_GAIN,
    Quantity,
    TaskKind,
    alike_errors,
    ensemble_sizes,
    found_in,
    halves,
    mean_loss_without_each,
    usual_metrics,
)

Loss = Callable[[Any, Any], Tensor]
Combine = Callable[[Tensor], Tensor]


def check_targets(targets: Any, name: str) -> Any:
    """Tensors with items in the first axis, alone or in tuples and mappings, on the CPU.

    Raises:
        DataError: they are something else.
    """
    leaves = tree_leaves(targets)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
        expected = "must be tensors with items in the first axis, alone or in a tuple or a dictionary"
        raise DataError(f"targets of {name}", found_in(targets), expected)
    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), targets)


def mean_output(outputs: Tensor) -> Tensor:
    """Mean over members, (M, B, ...) -> (B, ...)."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).mean(dim=0)


def score_outputs(outputs: Tensor, targets: Any, order: Tensor, *, loss: Loss, combine: Combine) -> dict[str, Tensor]:
    """Per-item results (..., B) of outputs (M, B, ...); without targets (None) all losses are 0.

    Costs 2 M + S + 2 H calls of the loss.
    """
    m, num_items = outputs.shape[:2]

    def of(output: Any) -> Tensor:
        if targets is None:
            return torch.zeros(num_items, dtype=torch.float64)
        found = loss(output, targets)
        if not isinstance(found, Tensor) or found.shape != (num_items,):
            raise DataError("what loss returns", found_in(found), f"must be the loss of each item, ({num_items},)")
        return found.detach().double().cpu()

    members = torch.stack([of(output) for output in outputs])
    ensembles = torch.stack([of(combine(outputs[order[:size]])) for size in ensemble_sizes(m)])
    if m == 1:
        without, difference = torch.full_like(members, torch.nan), torch.zeros(len(halves(1)), num_items)
    else:
        everyone = torch.arange(m)
        without = torch.stack([of(combine(outputs[everyone != i])) for i in range(m)])
        masks = halves(m).bool()
        difference = torch.stack([of(combine(outputs[~mine])) - of(combine(outputs[mine])) for mine in masks])
    return {
        "member_loss": members,
        "member_score": -members,
        "loss": ensembles,
        "score": -ensembles,
        "half_difference": difference.double(),
        "uncertainty": outputs.double().var(dim=0, correction=0).reshape(num_items, -1).mean(dim=1),
        "loss_without": without,
    }


_LOSS = Quantity("loss", "loss", "loss", ".5g")
_SCORE = Quantity("score", "score", "score", ".5g")
_LIKENESS = alike_errors("losses")


def custom(loss: Loss | None = None, combine: Combine | None = None) -> TaskKind:
    """The kind of a loss; without one, only its figures can be told."""

    def score_batch(outputs: Tensor, targets: Any, order: Tensor) -> dict[str, Tensor]:
        assert loss is not None
        return score_outputs(outputs, targets, order, loss=loss, combine=combine or mean_output)

    return TaskKind(
        name="custom",
        loss=_LOSS,
        score=_SCORE,
        likeness=_LIKENESS,
        check_targets=check_targets,
        check_outputs=lambda outputs, targets, name: outputs,
        score_batch=score_batch,
        errors=lambda scores: scores.member_loss,
        left_out=mean_loss_without_each,
        metrics=usual_metrics(_LOSS, _SCORE, _LIKENESS, "combined output", ()),
        curves=("ensemble_loss", "ensemble_score"),
        blank_targets=lambda outputs: None,
        ensemble_options={"task": "regression"} if combine is None else None,
        # A loss may be negative: what counts is measured by how large it is.
        gain=lambda losses: MIN_GAIN * float(losses.abs().mean()),
    )
