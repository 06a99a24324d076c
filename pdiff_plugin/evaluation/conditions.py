"""Judge a generator over conditions that it was never fitted on, beside all that is cheaper.

Shapes: C judged conditions, M members.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from pdiff_plugin._version import __version__
from pdiff_plugin.config import EvaluateConditionsConfig, configured
from pdiff_plugin.errors import ConfigError, FitExistsError
from pdiff_plugin.evaluation.condition_findings import series_of, verdicts_of
from pdiff_plugin.evaluation.condition_judging import JudgeAll, Judging, judge_here
from pdiff_plugin.evaluation.condition_places import HELD_OUT, Place, places_of, runs_to_judge
from pdiff_plugin.evaluation.condition_result import ConditionEvaluation
from pdiff_plugin.evaluation.condition_rows import RowMaker
from pdiff_plugin.evaluation.condition_task import MakeRow, MakeTask, Train, check_function, task_at
from pdiff_plugin.evaluation.condition_weights import Recorded
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.loggers import Loggers, logged
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
    judge: JudgeAll = judge_here,
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
        judge: judges all conditions, here unless given; see :class:`pdiff_plugin.cluster.scores.ClusterJudge`.
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
        seconds: dict[str, float] = {}
        generator, places, notes = _to_judge(
            store, generator, config.seed, conditions, refit_in, log.on_progress, seconds
        )
        with timed(seconds, "read"):
            recorded = Recorded.read(store, generator)
        with timed(seconds, "prepare"):
            maker = RowMaker(store, generator, recorded, places, config, train, extra or {})
        result = _evaluation(task, maker, judge, notes, seconds, log.on_progress)
        log.figures(_logged_figures(result))
        log.config({"verdict": {"sentence": result.sentence}})
    return result


def _to_judge(
    store: SnapshotStore,
    generator: WeightGenerator,
    seed: int,
    conditions: Sequence[str],
    refit_in: str | os.PathLike[str] | None,
    on_progress: OnProgress | None,
    seconds: dict[str, float],
) -> tuple[WeightGenerator, list[Place], list[str]]:
    """A generator that was not fitted on the conditions that are wanted, those, and what there is to say of them."""
    assert generator.variables is not None
    runs, is_refit = runs_to_judge(store.conditions, generator.trajectories, conditions, generator.variables, seed)
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
    return generator, places, notes + left_out


def _evaluation(
    task: MakeTask,
    maker: RowMaker,
    judge: JudgeAll,
    notes: list[str],
    seconds: dict[str, float],
    on_progress: OnProgress | None,
) -> ConditionEvaluation:
    """Score the rows at every condition and judge."""
    store, places = maker.store, maker.places
    first = task_at(task, places[0].condition)
    store.layout.check_model(first.model, f"the store {store.path}")

    def tell(num_done: int, last: str) -> None:
        if on_progress is not None:
            on_progress(Progress("conditions", num_done, len(places), text=last))

    with timed(seconds, "score"):
        joint_seconds, joint_steps = maker.train_joint(first)
        done = judge(Judging(task, maker, first.task_kind.name), first, tell)
    judged = [one.judged for one in done]
    cost = maker.config.train_seconds
    if cost is None:
        trained = joint_seconds + sum(one.train_seconds for one in done)
        cost = _training_cost(store, places, trained, joint_steps + sum(one.train_steps for one in done))
    return ConditionEvaluation(
        task=first.name,
        kind_name=first.task_kind.name,
        places=judged,
        verdicts=verdicts_of(first.task_kind, judged, cost),
        fitted=maker.recorded.conditions,
        notes=notes,
        details={
            "seconds": seconds,
            "train_seconds": cost,
            "joint_steps": maker.config.joint_steps if maker.trainer is not None else None,
            "refitted": "refit" in seconds,
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


def _training_cost(store: SnapshotStore, places: Sequence[Place], seconds: float, steps: int) -> float | None:
    """Seconds of training at one condition: the steps that were recorded there at the pace of the user's function."""
    if not steps:
        return None
    last = []
    for place in places:
        for run in place.runs:
            last.append(int(store.steps[store.trajectory_index == store.trajectories.index(run)].max()))
    return statistics.fmean(last) * seconds / steps
