"""An evaluation on the workers of a cluster gives the figures of one process."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pdiff_plugin.config import DistributedConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import condition_rows
from pdiff_plugin.evaluation.condition_result import ConditionEvaluation
from pdiff_plugin.evaluation.conditions import evaluate_conditions
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.centre_stage import fit_centre
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


def test_conditions_judged_on_two_workers_have_the_figures_of_one_process(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle

    from pdiff_plugin.cluster.scores import ClusterJudge

    from . import test_conditions as lines

    cloudpickle.register_pickle_by_value(lines)  # workers cannot import a module of tests
    monkeypatch.setattr(
        condition_rows, "fit_centre", lambda kind, *args: fit_centre(kind.replace("network", "ridge"), *args)
    )
    store = lines.write_store(tmp_path / "store", lines.linear)
    fitted = [run for run in store.trajectories if run not in lines.HELD_OUT]
    generator: Any = lines.Oracle(store, fitted, lines.linear)
    reports = []

    def train(model: nn.Module, conditions: list[dict[str, float]], num_steps: int) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(num_steps * torch.randn(()) * conditions[0]["c"] / 1000)

    def judged(**options: Any) -> ConditionEvaluation:
        task = lines.task_of(lines.linear)
        settings = {"num_members": 3, "joint_steps": 4, "fine_tune_steps": (2,)}
        return evaluate_conditions(task, store, generator, train=train, **settings, **options)

    alone = judged()
    together = judged(judge=ClusterJudge(DistributedConfig()), on_progress=reports.append)

    assert [place.condition for place in together.places] == [place.condition for place in alone.places]
    assert list(alone.places[0].rows) == list(together.places[0].rows)
    assert "joint" in alone.places[0].rows
    for mine, theirs in zip(alone.places, together.places, strict=True):
        for name, row in mine.rows.items():
            found = replace(theirs.rows[name], seconds=row.seconds)
            assert asdict(found) == pytest.approx(asdict(row), rel=1e-6, abs=1e-6), name
    assert [verdict.outcome for verdict in together.verdicts.values()] == [
        verdict.outcome for verdict in alone.verdicts.values()
    ]
    assert reports[-1].step == reports[-1].total_steps == len(lines.HELD_OUT)
    assert together.details["train_seconds"] > 0
