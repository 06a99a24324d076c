"""An evaluation on the workers of a cluster gives the figures of one process."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.snapshots.store import SnapshotStore

# Starting Ray and its workers leaves sockets and files of Ray's own to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def test_an_evaluation_on_two_workers_has_the_figures_of_one_process(
    local_ray: None, one_run: tuple[Task, SnapshotStore]
) -> None:
    from pdiff_plugin.cluster.scores import ClusterScorer

    task, store = one_run
    alone = evaluate(task, store, num_members=4, sets="core")
    reports = []

    together = evaluate(
        task, store, num_members=4, sets="core", score=ClusterScorer(DistributedConfig()), on_progress=reports.append
    )

    assert list(alone.sets) == list(together.sets)
    for name, figures in alone.sets.items():
        assert together.sets[name] == pytest.approx(figures, rel=1e-6, abs=1e-6), name
    assert reports[-1].step == reports[-1].total_steps > 1


def test_a_loader_that_shuffles_is_refused(local_ray: None, one_run: tuple[Task, SnapshotStore]) -> None:
    from pdiff_plugin.cluster.scores import ClusterScorer

    task, store = one_run
    shuffled = Task(task.model, DataLoader(task.eval_loader.dataset, 400, shuffle=True))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"must not shuffle \(shuffle=False\)"):
        evaluate(shuffled, store, num_members=2, sets="core", score=ClusterScorer(DistributedConfig()))
