"""What `pdiff tune --task` goes by: how well an ensemble of generated members predicts held-out data."""

from __future__ import annotations

import torch

from pdiff_plugin.evaluation.scores import score_sets
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.generator.generator import WeightGenerator


class EnsembleNLL:
    """Loss, of classes the NLL, of an ensemble of generated members on the task's ``eval_loader``; lower is better.

    That data is then used up: judge the best fit on other data.

    Args:
        task: the user's model and data.
        num_members: of the ensemble.
        seed: of the draw, the same for every generator.
    """

    def __init__(self, task: Task, num_members: int = 16, seed: int = 0) -> None:
        self.task, self.num_members, self.seed = task, num_members, seed

    def __str__(self) -> str:
        return f"ensemble {self.task.task_kind.loss.text} of {self.num_members} members on {self.task.name}"

    def __call__(self, generator: WeightGenerator, temperature: float) -> float:
        rng = torch.Generator().manual_seed(self.seed)
        weights = generator.sample(self.num_members, temperature=temperature, rng=rng)
        scores, _ = score_sets(self.task, {"generated": weights})
        return float(scores["generated"].loss[-1].mean())
