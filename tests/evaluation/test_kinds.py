"""A kind of task, a metric and a baseline are values: one more is drawn, judged, told and saved like the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdiff_plugin import (
    DiffusionConfig,
    Evaluation,
    FitConfig,
    Task,
    WeightGenerator,
    evaluate,
    fit,
    sweep,
    write_report,
)
from pdiff_plugin.config import EvaluateConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.baselines import BASELINES, LOOKS, Baseline, Knob, Look, look_of, noise
from pdiff_plugin.evaluation.classification import CLASSIFICATION
from pdiff_plugin.evaluation.gate import keep_accurate
from pdiff_plugin.evaluation.kind import (
    MEMBERS,
    NEAREST,
    Likeness,
    Metric,
    Quantity,
    TaskKind,
    best_score,
    ensemble_loss,
    ensemble_score,
    ensemble_sizes,
)
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.rows import SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.search_score import EnsembleNLL
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

Run = tuple[Task, SnapshotStore]


def score_regression(outputs: Tensor, targets: Tensor, order: Tensor) -> dict[str, Tensor]:
    outputs = outputs.double()  # (M, B)
    sizes = torch.tensor(ensemble_sizes(len(outputs)))
    mean = outputs[order].cumsum(0)[sizes - 1] / sizes[:, None]  # (S, B)
    halves = outputs[0::2].mean(0), outputs[1::2].mean(0) if len(outputs) > 1 else outputs[0]
    return {
        "member_loss": (outputs - targets).square(),
        "member_score": -(outputs - targets).abs(),
        "loss": (mean - targets).square(),
        "score": -(mean - targets).abs(),
        "half_difference": ((halves[1] - targets).abs() - (halves[0] - targets).abs())[None],
        "uncertainty": outputs.var(0, correction=0),
        "outputs": outputs,
        "targets": targets.expand_as(outputs),
    }


def correlation(errors: Tensor, others: Tensor | None) -> Tensor:
    one, other = (x - x.mean(1, keepdim=True) for x in (errors, errors if others is None else others))
    return (one @ other.T) / (one.norm(dim=1)[:, None] * other.norm(dim=1)[None])


def without_each(scores: Any) -> Tensor:
    outputs, targets = scores.more["outputs"], scores.more["targets"]
    others = (outputs.sum(0) - outputs) / (len(outputs) - 1)
    return (others - targets).square().mean(1)


def check_values(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    if outputs.shape[1:] != (len(targets), 1):
        raise ConfigError("output of the model", str(tuple(outputs.shape[1:])), f"must be one value per item of {name}")
    return outputs.squeeze(2)


REGRESSION = TaskKind(
    name="regression",
    loss=Quantity("mse", "MSE", "mean squared error", ".5f"),
    score=Quantity("closeness", "close", "closeness", ".3f"),
    likeness=Likeness(
        "residuals",
        "corr",
        "correlation of residuals",
        ".3f",
        of=correlation,
        copied="residuals have a correlation of {found:.3f}",
        all_alike="Snapshots have one of {reference:.3f}.",
        are_counted=False,
    ),
    check_targets=lambda targets, name: targets.double(),
    check_outputs=check_values,
    score_batch=score_regression,
    errors=lambda scores: scores.more["outputs"] - scores.more["targets"],
    left_out=without_each,
    metrics=(
        MEMBERS,
        Metric("closeness_mean", "close", ".3f", lambda s: float(s.member_scores.mean()), "higher", "over members"),
        Metric("closeness_best", "best*", ".3f", best_score, "higher", "of the best member", is_noted=True),
        Metric("ensemble_closeness", "ens close", ".3f", ensemble_score, "higher", "of the mean output"),
        Metric("ensemble_mse", "ens MSE", ".5f", ensemble_loss, "lower", "of the mean output"),
        Metric("residuals_mean", "corr", ".3f", lambda s: metrics.pair_mean(s.within), "lower", "over pairs"),
        Metric(
            "residuals_max_to_snapshots", "corr to snap", ".3f", lambda s: float(s.closest.nanmean()), "lower",
            "with the closest snapshot",
        ),
        NEAREST,
    ),
    curves=("ensemble_mse", "ensemble_closeness"),
)  # fmt: skip


@pytest.fixture
def regression(monkeypatch: pytest.MonkeyPatch, store_of: Any) -> Run:
    monkeypatch.setitem(KINDS, "regression", REGRESSION)
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(6, generator=rng)
    x = torch.randn(400, 6, generator=rng)
    y = x @ truth + 0.1 * torch.randn(400, generator=rng)
    store = store_of({"weight": truth + 0.05 * torch.randn(60, 1, 6, generator=rng)})
    task = Task(
        nn.Linear(6, 1, bias=False),
        [(x[:250], y[:250]), (x[250:], y[250:])],
        kind="regression",
        shifted={"wide": [(2 * x, 2 * y)]},
        out_of_distribution={"far": [9 * x]},
    )
    return task, store


@pytest.fixture
def fitted(regression: Run) -> WeightGenerator:
    return fit(regression[1].path, FitConfig(diffusion=DiffusionConfig(max_steps=40, width=16)))


def test_a_regression_is_judged_told_saved_and_drawn(regression: Run, fitted: WeightGenerator, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    task, store = regression
    result = evaluate(task, store, fitted, num_members=8, num_draws=2, sets="core")

    x, y = (torch.cat(parts).double() for parts in zip(*task.eval_loader, strict=True))
    drawn = torch.stack([store.state_dict(i)["weight"][0] for i in evenly_spaced(60, 8).tolist()]).double()
    expected = ((x @ drawn.T).mean(1) - y).square().mean()
    assert result.sets["snapshots"]["ensemble_mse"] == pytest.approx(float(expected), rel=1e-5)
    assert result.sets["snapshots"]["shifted/wide"]["ensemble_mse"] == pytest.approx(4 * float(expected), rel=1e-5)
    assert result.sets["generated"]["ood_auroc/far"] > 0.9
    assert result.sets["generated"]["ensemble_mse_std"] >= 0
    assert result.verdict.sentence.startswith("Too few data to tell: ensemble mean squared error 0.0")
    assert {key.rpartition("_")[2] for key in result.verdict.numbers} == {"mse"}
    compared = result.to_json()["comparisons"][0]
    assert {"name", "mse", "mse_error", "closeness", "closeness_error", "other_mse", "draw_error"} == set(compared)

    loaded = Evaluation.load(result.save(tmp_path))
    assert (loaded.comparisons, loaded.table()) == (result.comparisons, result.table())
    headers = loaded.table()[0]
    assert headers[-3:] == ["wide: close", "wide: MSE", "far: AUROC"]
    assert "corr to snap" in headers
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "ens MSE (lower is better)" in page
    drawn_names = {path.stem for path in (tmp_path / "report-figures").iterdir()}
    assert drawn_names == {"accuracy-novelty", "paired-differences", "plane", "overlap", "densities"}
    assert 'id="cost-mse"' in page
    assert loaded.best(8).text in page


def test_a_regression_is_swept_gated_and_ranked_by_its_own_loss(
    regression: Run, fitted: WeightGenerator, tmp_path: Path
) -> None:
    task, store = regression
    curves = sweep(task, store, fitted, diversities=(0.5, 1.5), settings={"noise": (0.01,)}, num_members=6)
    assert curves.table()[0][2:4] == ["close", "corr to snap"]
    assert all(point["ensemble_mse"] > 0 for point in curves.points)

    weights = fitted.sample(6, rng=torch.Generator().manual_seed(0))
    scores = keep_accurate(task, weights, -10.0).member_scores
    assert len(set(scores)) == 6
    assert max(scores) < 0
    kept = keep_accurate(task, weights, sorted(scores)[3])
    assert kept.num_dropped == 3

    assert str(EnsembleNLL(task, 4)) == "ensemble mean squared error of 4 members on task"
    assert 0 < EnsembleNLL(task, 4)(fitted, 1.0) < 1


def test_outputs_and_targets_are_checked_by_the_kind(regression: Run) -> None:
    task, store = regression
    wide = nn.Linear(6, 2, bias=False)
    with pytest.raises(ConfigError, match="must be one value per item of eval_loader"):
        evaluate(dataclasses.replace(task, model=wide), store_of_width_two(store), num_members=2)


def store_of_width_two(store: SnapshotStore) -> SnapshotStore:
    rows = store.rows().repeat(1, 2)
    layout = Layout.from_tensors({"weight": rows[0].reshape(2, 6)})
    TrajectoryWriter(store.path.parent / "wide", layout).write_chunk(rows, range(1, len(rows) + 1))
    return SnapshotStore.open(store.path.parent / "wide")


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
def test_a_kind_measures_what_the_rest_asks_for(kind: TaskKind) -> None:
    keys = [metric.key for metric in kind.metrics]
    assert len(keys) == len(set(keys))
    asked = {kind.mean_score, kind.ensemble_score, kind.ensemble_loss, kind.within, kind.closest, NEAREST.key}
    assert asked | set(kind.curves) <= set(keys)
    assert all(metric.help for metric in kind.metrics)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind = 'ranking': it must be one of classification"):
        Task(nn.Linear(1, 1), [], kind="ranking")


def test_one_more_metric_is_measured_shown_and_explained(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sure = Metric(
        "ensemble_confidence", "ens conf", ".2f", lambda s: float(s.scores.more["confidence"][s.place].mean()), "",
        "mean confidence", is_noted=True,
    )  # fmt: skip
    changed = dataclasses.replace(CLASSIFICATION, metrics=(*CLASSIFICATION.metrics, sure))
    monkeypatch.setitem(KINDS, "classification", changed)

    result = evaluate(*one_run, sets=["snapshots"], num_members=3)

    assert 0.3 < result.sets["snapshots"]["ensemble_confidence"] < 1
    assert result.table()[0][-2] == "ens conf"
    assert "ens conf: mean confidence." in str(result)


def test_one_more_baseline_is_drawn_judged_and_swept(one_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task, store = one_run
    look = Look("#123456", "x")
    more = Baseline(noise, "snapshots with much noise", look, knob=Knob("size", (0.1, 0.3), by_run=False))
    monkeypatch.setitem(BASELINES, "loud", more)
    monkeypatch.setitem(LOOKS, "loud", look)
    rows = SnapshotRows.measure(store)
    weights = more.draw(rows, 4, torch.Generator().manual_seed(0)).made(rows)

    result = evaluate(task, store, weights, sets=["generated", "loud"], num_members=4)
    assert [c.name for c in result.comparisons] == ["loud"]
    assert look_of("loud") == look
    assert look_of("of another release") == look_of("of yet another one")

    generator = fit(store.path, FitConfig(diffusion=DiffusionConfig(max_steps=1, width=16)))
    curves = sweep(task, store, generator, diversities=(), settings={"loud": (0.1, 0.3)}, num_members=3)
    assert [(p["set"], p["setting"]) for p in curves.points] == [("snapshots", None), ("loud", 0.1), ("loud", 0.3)]
    assert curves.points[2]["nearest_snapshot_distance"] > curves.points[1]["nearest_snapshot_distance"]
    with pytest.raises(ConfigError, match="settings = 'swa': it must be among average, gaussian, swag, noise"):
        sweep(task, store, generator, settings={"swa": (1.0,)})


def test_settings_may_come_as_one_object_with_single_changes(one_run: Run) -> None:
    config = EvaluateConfig(num_members=3, sets=("snapshots", "noise"), seed=4)
    result = evaluate(*one_run, None, config, num_members=2)
    assert list(result.sets) == ["snapshots", "noise"]
    assert (result.sets["noise"]["members"], result.details["seed"]) == (2, 4)
    with pytest.raises(TypeError, match="unexpected argument 'members'; EvaluateConfig has num_members"):
        evaluate(*one_run, members=2)
    with pytest.raises(ConfigError, match="num_draws = 0: it must be at least 1"):
        evaluate(*one_run, num_draws=0)


def test_generated_alone_needs_something_that_generates(one_run: Run) -> None:
    with pytest.raises(ConfigError, match="neither a generator nor weights"):
        evaluate(*one_run, sets=["generated"])
