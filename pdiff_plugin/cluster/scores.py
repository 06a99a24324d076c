"""Evaluations on the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import torch
from torch import Tensor

from pdiff_plugin.cluster.connection import check_shared, map_in_order
from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.condition_judging import Done, Judging, OnDone
from pdiff_plugin.evaluation.kind import Scores
from pdiff_plugin.evaluation.scores import View, score_sets
from pdiff_plugin.evaluation.task import Data, Task
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.shards import layout_files


class ClusterScorer:
    """As :func:`score_sets`, with a task of the cluster for every set of members.

    A set stays whole, because its ensemble needs all of its members on the same items; the figures are those of one
    process. The task with its model is put into the object store once. To be used while connected.
    """

    def __init__(self, distributed: DistributedConfig) -> None:
        self.distributed = distributed
        self._stored: tuple[Task, Any] | None = None

    def __call__(
        self,
        task: Task,
        sets: Mapping[str, WeightSet],
        data: Data | None = None,
        *,
        views: Mapping[str, View] | None = None,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> tuple[dict[str, Scores], Tensor]:
        if self._stored is None or self._stored[0] is not task:
            self._stored = (task, ray.put(task))

        def tell(done: int) -> None:
            if on_progress is not None:
                on_progress(Progress("score", done, len(sets)))

        items = [
            ({key: weights}, None if views is None else {k: v for k, v in views.items() if v.pool == key}, data, seed)
            for key, weights in sets.items()
        ]
        answers = map_in_order(_score_one, self._stored[1], items, self.distributed, tell)
        targets = answers[0][1]
        if not all(torch.equal(targets, theirs) for _, theirs in answers):
            raise ConfigError(
                (data or task.data).name, "another order in another process", "must not shuffle (shuffle=False)"
            )
        found = {key: scores for of_set, _ in answers for key, scores in of_set.items()}
        return {key: found[key] for key in views or sets}, targets


def _score_one(
    task: Task, item: tuple[dict[str, WeightSet], dict[str, View] | None, Data | None, int]
) -> tuple[dict[str, Scores], Tensor]:
    sets, views, data, seed = item
    return score_sets(task, sets, data, views=views, seed=seed)


class ClusterJudge:
    """As :func:`judge_here`, with a task of the cluster for every condition; the figures are those of one process.

    What was fitted and read is put into the object store once; what was recorded at a condition is read by who judges
    it, from storage that every node sees. To be used while connected.
    """

    def __init__(self, distributed: DistributedConfig) -> None:
        self.distributed = distributed

    def __call__(self, judging: Judging, first: Task, on_done: OnDone) -> list[Done]:
        """Judge all conditions.

        Raises:
            StorageNotSharedError: a node does not see the store.
        """
        del first  # made anew by who judges there
        check_shared(layout_files(judging.maker.store.path))
        numbers = range(len(judging))
        return map_in_order(_judge_one, judging, numbers, self.distributed, lambda done: on_done(done, ""))


def _judge_one(judging: Judging, number: int) -> Done:
    return judging(number)
