"""Judge a generator over conditions that it was never fitted on, beside all that is cheaper.

Shapes: C judged conditions, M members.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from pdiff_plugin._version import __version__
from pdiff_plugin.config import EvaluateConditionsConfig, configured
from pdiff_plugin.errors import ConfigError, FitExistsError
from pdiff_plugin.evaluation.condition_findings import JudgedCondition, RowFigures, series_of, verdicts_of
from pdiff_plugin.evaluation.condition_places import HELD_OUT, Place, places_of, runs_to_judge
from pdiff_plugin.evaluation.condition_result import ConditionEvaluation
from pdiff_plugin.evaluation.condition_rows import GENERATED, TRAINED, Made, RowMaker
from pdiff_plugin.evaluation.condition_task import MakeRow, MakeTask, Train, check_function, task_at
from pdiff_plugin.evaluation.condition_weights import Recorded
from pdiff_plugin.evaluation.kind import Measured, Scores, ensemble_loss, ensemble_score
from pdiff_plugin.evaluation.scores import score_sets
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.loggers import Loggers, logged
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.progress import OnProgress, Progress, timed
from pdiff_plugin.snapshots.store import SnapshotStore


def evaluate_conditions(
    task: MakeTask,
    store: SnapshotStore | str | os.PathLike[str],
    generator: WeightGenerator,
    config: EvaluateConditionsConfig | None = None,
    *,
    conditions: Sequence[str] = (HELD_OUT,),
    train: Train | None = None,
    extra: Mapping[str, MakeRow] | None = None,
    refit_in: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    loggers: Loggers = (),
    **changes: Any,
) -> ConditionEvaluation:
    """Compare weights generated for conditions that were never fitted with training there and with all that is cheaper.

    The rows, and the rule behind the sentence: ``docs/reference/evaluation.md``.

    Args:
        task: takes names of the condition, any of them or ``**condition``, and returns the task there:
            ``def task(angle): return Task(model, loader(angle))``. Its model is the one to start from.
        store: what was recorded, at held-out conditions too.
        generator: fitted with conditions. Where it was fitted on some of those wanted, another one is fitted in its
            place, with the same settings and without them.
        config: number of members, seed, steps of training.
        conditions: ``("held-out",)`` for all that the generator was not fitted on (a quarter of the conditions where
            there are none), or trajectories by name or as ``NAME=VALUE,VALUE``.
        train: trains the recorded layers of a model in place: (model, conditions, number of steps). With it a joint
            model and a few steps of training from several starts are among the rows.
        extra: further rows by name: condition -> weights, or a :class:`Task` whose own model is judged as it is.
        refit_in: folder for the generator that is fitted without the judged conditions, kept in memory unless given;
            what was fitted there before is replaced.
        on_progress: told the number of conditions done.
        loggers: take the means of every row and the verdict, see :class:`pdiff_plugin.Logger`; a text such as
            ``tensorboard:runs/a`` is opened and closed here.
        **changes: single fields of ``config``.

    Raises:
        ConfigError: a generator without conditions or with aligned units; a function that asks for something that no
            condition has; no condition that can be judged.
        ConditionError: no such run or value; too few conditions.
        LayoutMismatchError: the model does not fit the store; the first tensor is named.
    """
    config = configured(EvaluateConditionsConfig, config, changes)
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    _check(store, generator)
    names = list(next(iter(store.conditions.values())))
    check_function(task, names)
    with logged(loggers, {"evaluate": asdict(config)}, on_progress) as log:
        result = _evaluation(task, store, generator, config, conditions, train, extra or {}, refit_in, log.on_progress)
        log.figures(_logged_figures(result))
        log.config({"verdict": {"sentence": result.sentence}})
    return result


def _evaluation(
    task: MakeTask,
    store: SnapshotStore,
    generator: WeightGenerator,
    config: EvaluateConditionsConfig,
    conditions: Sequence[str],
    train: Train | None,
    extra: Mapping[str, MakeRow],
    refit_in: str | os.PathLike[str] | None,
    on_progress: OnProgress | None,
) -> ConditionEvaluation:
    """Make the rows at every condition, score them and judge."""
    seconds: dict[str, float] = {}
    assert generator.variables is not None
    runs, is_refit = runs_to_judge(
        store.conditions, generator.trajectories, conditions, generator.variables, config.seed
    )
    notes = []
    refined = generator.report.get("refinement", {})
    if refined.get("best_step"):  # else it is as the fit made it
        notes.append(_note_of(refined, is_refit))
    if is_refit:
        with timed(seconds, "refit"):
            generator = _refitted(store, generator, runs, refit_in, on_progress)
        notes.append(
            f"The generator was fitted again without {len(runs)} runs, in {seconds['refit']:.0f} s; that one is judged."
        )
    assert generator.variables is not None
    places, left_out = places_of(store.conditions, runs, generator.trajectories, generator.variables)
    notes += left_out
    with timed(seconds, "read"):
        recorded = Recorded.read(store, generator)
    with timed(seconds, "prepare"):
        maker = RowMaker(store, generator, recorded, places, config, train, extra)
    judged, kind, name = [], None, ""
    for number, place in enumerate(places):
        own = task_at(task, place.condition)
        if kind is None:
            store.layout.check_model(own.model, f"the store {store.path}")
            kind, name = own.task_kind, own.name
        elif own.task_kind.name != kind.name:
            raise ConfigError("task", own.kind, f"must be of one kind at all conditions, and was {kind.name}")
        with timed(seconds, "score"):
            judged.append(_judged(place, own, maker.rows(number, own), config.seed))
        if on_progress is not None:
            on_progress(Progress("conditions", number + 1, len(places), text=_text(place)))
    assert kind is not None
    cost = config.train_seconds if config.train_seconds is not None else _training_cost(store, places, maker)
    return ConditionEvaluation(
        task=name,
        kind_name=kind.name,
        places=judged,
        verdicts=verdicts_of(kind, judged, cost),
        fitted=recorded.conditions,
        notes=notes,
        details={
            "seconds": seconds,
            "train_seconds": cost,
            "joint_steps": config.joint_steps if train is not None else None,
            "refitted": is_refit,
            **_details(maker),
        },
    )


def _logged_figures(result: ConditionEvaluation) -> dict[str, Any]:
    """Means of every row, inside and outside the fitted range, and the numbers of the verdicts there."""
    means: dict[str, Any] = {}
    for group in result.verdicts:
        mine = [place for place in result.places if place.group == group]
        rows = {name: series_of(mine, name) for name in result.row_names}
        means[group] = {
            name: {"loss": float(row.loss.nanmean()), "score": float(row.score.nanmean())} for name, row in rows.items()
        }
    return {"evaluate": means, "verdict": {group: verdict.to_json() for group, verdict in result.verdicts.items()}}


def _details(maker: RowMaker) -> dict[str, Any]:
    store, generator = maker.store, maker.generator
    return {
        "num_members": maker.config.num_members,
        "seed": maker.config.seed,
        "num_values": store.layout.num_values,
        "num_fitted_runs": len(generator.trajectories),
        "settings": {row: dict(settings) for row, settings in maker.settings.items() if settings},
        "seconds_once": maker.seconds_once,
        "provenance": {
            "store": str(store.path),
            "layout_digest": store.layout.digest,
            "pdiff_plugin": __version__,
            "torch": torch.__version__,
        },
        "generator": {"report": generator.report, "provenance": generator.provenance},
    }


def _check(store: SnapshotStore, generator: WeightGenerator) -> None:
    if generator.variables is None:
        raise ConfigError(
            "generator",
            "fitted without conditions",
            "must be fitted on runs with conditions; `pdiff condition STORE` shows them",
        )
    if generator.alignment is not None:
        raise ConfigError(
            "generator",
            "fitted with align='rebasin'",
            "must be fitted with align='none': held-out runs are not aligned",
        )
    store.layout.check_same(generator.layout, f"the store {store.path}")
    for run in generator.trajectories:
        if run not in store.conditions:
            found = "without a condition" if run in store.trajectories else "missing"
            raise ConfigError("store", str(store.path), f"must be the one of the fit; run {run} is {found}")


def _note_of(refined: Mapping[str, Any], is_refit: bool) -> str:
    """That the generator knows more than the recorded weights, which the rows beside it are made of."""
    if is_refit:
        raise ConfigError(
            "generator",
            "refined, and fitted on conditions to be judged",
            "must be judged at others: the one fitted again without them would not be refined",
        )
    return (
        f"The generator was refined by the loss of the task at {refined['num_conditions']} conditions; the judged ones "
        "may have been among them, or close to some."
    )


def _refitted(
    store: SnapshotStore,
    generator: WeightGenerator,
    runs: Sequence[str],
    folder: str | os.PathLike[str] | None,
    on_progress: OnProgress | None,
) -> WeightGenerator:
    """Another generator, fitted with the same settings to all but ``runs``."""
    left_out = [run for run in store.trajectories if run not in generator.trajectories or run in set(runs)]
    condition = replace(generator.config.condition, hold_out=tuple(left_out))
    config = replace(generator.config, condition=condition)
    try:
        return fit(store, config, out=folder, on_progress=on_progress)
    except FitExistsError:  # of other held-out runs, in a folder that is ours
        return fit(store, config, out=folder, fresh=True, on_progress=on_progress)


def _judged(place: Place, task: Task, rows: Iterable[tuple[str, Made]], seed: int) -> JudgedCondition:
    """Make and score all rows at one condition."""
    made: dict[tuple[str, int], float] = {}
    sets: dict[str, WeightSet] = {}
    scored: dict[str, Scores] = {}
    for name, one in rows:
        made[name, one.run] = one.seconds
        if one.weights is not None:
            sets[f"{name}/{one.run}"] = one.weights
        else:  # at once: a model for each row of a condition would not fit in memory together
            assert one.task is not None
            scored[f"{name}/{one.run}"] = _as_it_is(one.task, seed)
    scored |= score_sets(task, sets, seed=seed)[0]
    silent = scored[f"{GENERATED}/0"].is_silent
    if bool(silent.any()):
        found_at = f"{int(silent.sum())} of {len(silent)} members at {_text(place)}"
        raise ConfigError(
            "generator", found_at, "answers with NaN or Inf there: fit again, or judge at other conditions"
        )
    found: dict[str, list[RowFigures]] = {}
    for (name, run), seconds in made.items():
        found.setdefault(name, []).append(_figures(scored[f"{name}/{run}"], seconds))
    several = found[TRAINED]
    spread = None
    if len(several) > 1:
        spread = (statistics.stdev(one.loss for one in several), statistics.stdev(one.score for one in several))
    return JudgedCondition(
        place.condition, place.runs, place.outside, {name: _mean(own) for name, own in found.items()}, spread
    )


def _as_it_is(task: Task, seed: int) -> Scores:
    """Scores of a task's own model: an ensemble of one member that changes nothing."""
    tensors = {name: tensor for name, tensor in named_tensors(task.model).items() if tensor.is_floating_point()}
    if not tensors:
        raise ConfigError("extra", type(task.model).__name__, "must be a model with a parameter or a buffer")
    name, tensor = next(iter(tensors.items()))
    scored, _ = score_sets(task, {"own": WeightSet({name: tensor.detach().cpu()[None]})}, seed=seed)
    return scored["own"]


def _figures(scores: Scores, seconds: float) -> RowFigures:
    measured = Measured(scores)
    return RowFigures(
        loss=ensemble_loss(measured),
        score=ensemble_score(measured),
        member_loss=float(scores.member_loss.mean()),
        member_score=float(measured.member_scores.mean()),
        members=len(scores.member_loss),
        seconds=seconds,
    )


def _mean(rows: Sequence[RowFigures]) -> RowFigures:
    if len(rows) == 1:
        return rows[0]
    means = {
        key: statistics.fmean(getattr(row, key) for row in rows)
        for key in ("loss", "score", "member_loss", "member_score", "seconds")
    }
    return RowFigures(**means, members=rows[0].members)


def _training_cost(store: SnapshotStore, places: Sequence[Place], maker: RowMaker) -> float | None:
    """Seconds of training at one condition: the steps that were recorded there at the pace of the user's function."""
    if maker.trainer is None or not maker.trainer.steps:
        return None
    last = []
    for place in places:
        for run in place.runs:
            last.append(int(store.steps[store.trajectory_index == store.trajectories.index(run)].max()))
    return statistics.fmean(last) * maker.trainer.seconds / maker.trainer.steps


def _text(place: Place) -> str:
    return ", ".join(f"{name}={value}" for name, value in place.condition.items())
