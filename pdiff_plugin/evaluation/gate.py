"""A quality gate on a user's own data: the worst generated members can lie far below the mean."""

from __future__ import annotations

import torch
from torch import nn

from pdiff_plugin.ensemble.soup import KeptMembers, keep_above
from pdiff_plugin.evaluation.task import Task, batches, evaluating
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.batches import logits_of


def keep_accurate(task: Task, weights: WeightSet, threshold: float) -> KeptMembers:
    """Drop the members whose accuracy on ``task.eval_loader`` is below ``threshold``.

    What is left was chosen on these data: judge it on others.

    Args:
        task: the model and held-out data.
        weights: M members.
        threshold: share of right answers, in [0, 1].

    Raises:
        ConfigError: no member reaches the threshold; the best accuracy is named.
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape.
    """
    device = task.target_device()
    with evaluating(task) as model:

        @torch.no_grad()
        def accuracy(member: nn.Module) -> float:
            right, total = 0, 0
            for args, kwargs, targets in batches(task.eval_loader, device):
                right += int((logits_of(member(*args, **kwargs), as_matrix=True).argmax(dim=1).cpu() == targets).sum())
                total += len(targets)
            return right / total

        return keep_above(model, weights, accuracy, threshold)
