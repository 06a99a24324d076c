"""A quality gate on a user's own data: the worst generated members can lie far below the mean."""

from __future__ import annotations

import torch
from torch import nn

from pdiff_plugin.ensemble.soup import KeptMembers, keep_above
from pdiff_plugin.evaluation.task import Task, batches, evaluating
from pdiff_plugin.generator.weights import WeightSet


def keep_accurate(task: Task, weights: WeightSet, threshold: float) -> KeptMembers:
    """Drop the members whose score on ``task.eval_loader``, of classes their accuracy, is below ``threshold``.

    What is left was chosen on these data: judge it on others.

    Args:
        task: the model and held-out data.
        weights: M members.
        threshold: mean score of the task's kind; of a classification the share of right answers, in [0, 1], of a
            regression R².

    Raises:
        ConfigError: no member reaches the threshold; the best score is named.
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape.
    """
    data, kind, device = task.data, task.task_kind, task.target_device()
    alone = torch.zeros(1, dtype=torch.int64)
    with evaluating(task) as model:

        @torch.no_grad()
        def mean_score(member: nn.Module) -> float:
            parts = []
            for args, kwargs, targets in batches(data, kind, device):
                outputs = kind.check_outputs(task.pick(member(*args, **kwargs))[None], targets, data.name).cpu()
                parts.append(kind.score_batch(outputs, targets, alone))
            return float(kind.joined(parts)["member_score"].double().mean())

        return keep_above(model, weights, mean_score, threshold)
