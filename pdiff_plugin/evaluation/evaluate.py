"""Judge generated members beside the snapshots and the baselines made from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pdiff_plugin._version import __version__
from pdiff_plugin.config import EvaluateConfig, configured
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.alignment import aligned_rows
from pdiff_plugin.evaluation.baselines import BASELINES, DEEP_ENSEMBLE, GENERATED, SNAPSHOTS, Drawing, runs_in_turn
from pdiff_plugin.evaluation.choice import Choice, Material, cost_curves, frontier, group_scores
from pdiff_plugin.evaluation.kind import NEAREST, Scores
from pdiff_plugin.evaluation.metrics import nearest_distance
from pdiff_plugin.evaluation.pictures import Pictures
from pdiff_plugin.evaluation.result import Evaluation
from pdiff_plugin.evaluation.rows import SnapshotRows, change_since_fit
from pdiff_plugin.evaluation.scores import Scorer, score_sets
from pdiff_plugin.evaluation.scratch import Empty
from pdiff_plugin.evaluation.set_run import JudgedSet, PlannedSet, SetRun, generated, of_each_run
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.evaluation.verdict import Comparison, Differences, Nearness, Verdict, judge
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.loggers import Loggers, logged
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.progress import OnProgress, Progress, timed
from pdiff_plugin.snapshots.movement import movement
from pdiff_plugin.snapshots.store import SnapshotStore

# Share of generated members with NaN or Inf that is left out. Beyond it what remains is the choice of what broke and
# not the set that was made; a fit, whose snapshots are many and neighbours, already refuses from 5 % on.
_MAX_LOST = 0.1

# Trains the user's model from scratch with this seed and returns it.
Retrain = Callable[[int], nn.Module]


def evaluate(
    task: Task,
    store: SnapshotStore | str | os.PathLike[str],
    generator: WeightGenerator | WeightSet | None = None,
    config: EvaluateConfig | None = None,
    *,
    weights: WeightSet | None = None,
    retrain: Retrain | None = None,
    score: Scorer = score_sets,
    on_progress: OnProgress | None = None,
    loggers: Loggers = (),
    **changes: Any,
) -> Evaluation:
    """Compare generated members with the snapshots and with baselines from the same snapshots.

    With a generator that was fitted with ``align="rebasin"`` the snapshots are read in the same order of hidden units:
    distances are measured, and averages and Gaussians made, in the coordinates that it works in. Members alone do not
    tell of an alignment: their distances to snapshots of later runs mean nothing then.

    Args:
        task: the model and held-out data.
        store: the snapshots, or the folder they are in.
        generator: what makes the generated members, or the members themselves; without either, only the baselines are
            judged.
        config: how many members of which sets, and the seed; the same seed gives the same figures.
        weights: generated members, instead of those that ``generator`` would draw.
        retrain: the user's own training function, for a real deep ensemble: seed -> trained model.
        score: scores sets of members, here unless given; see :class:`pdiff_plugin.cluster.scores.ClusterScorer`.
        on_progress: told the number of batches done.
        loggers: take the figures of every set and the verdict, see :class:`pdiff_plugin.Logger`; a text such as
            ``tensorboard:runs/a`` is opened and closed here.
        **changes: single fields of ``config``: ``num_members``, ``num_draws``, ``sets`` (names, ``"all"`` or
            ``"core"``), ``seed``, ``recalibrate``, ``num_retrained``, ``memory_gb``, ``quick``.

    Raises:
        LayoutMismatchError: the model, the generator or the weights do not fit the store; the first tensor is named.
        UnusableSnapshotsError: fewer than two snapshots, or all equal.
        ConfigError: more than a tenth of the generated members hold NaN or Inf or answer with it; a setting out of
            range, an unknown set, data of another kind than the task's, or a generator of an alignment that changes
            what the model computes.
    """
    config = configured(EvaluateConfig, config, changes).in_effect()
    if config.recalibrate and task.train_loader is None:
        raise ConfigError("recalibrate", True, "needs a Task with train_loader")
    if isinstance(generator, WeightSet):
        generator, weights = None, generator if weights is None else weights
    store = opened(store, task)
    if generator is not None:
        store.layout.check_same(generator.layout, f"the store {store.path}")
    with logged(loggers, {"evaluate": {**asdict(config), "task": task.name}}, on_progress) as log:
        result = _evaluation(task, store, generator, weights, config, retrain, score, log.on_progress)
        log.figures({"evaluate": result.sets, "verdict": result.verdict.numbers})
        log.config({"verdict": {"sentence": result.sentence, "outcome": result.verdict.outcome}})
    return result


def _evaluation(
    task: Task,
    store: SnapshotStore,
    generator: WeightGenerator | None,
    weights: WeightSet | None,
    config: EvaluateConfig,
    retrain: Retrain | None,
    score: Scorer,
    on_progress: OnProgress | None,
) -> Evaluation:
    """Draw the sets, score them and judge."""
    wanted = _wanted(config, len(store.trajectories))
    seconds: dict[str, float] = {}
    with timed(seconds, "read"):
        rows = aligned_rows(task, store, generator, config.memory_gb)
        pictures = Pictures(rows)
    run = SetRun(task, rows, config, score=score, pictures=pictures, on_progress=on_progress)
    planned = []
    for name in wanted:
        if name != GENERATED:
            planned.append(PlannedSet.of(name, BASELINES[name], rows, config))
        elif weights is not None or generator is not None:
            planned.append(_generated(generator, weights, config))
    if retrain is not None:
        planned.append(_deep_ensemble(retrain, config, on_progress))
    if not planned:
        raise ConfigError("sets", wanted, "must hold another one where there is neither a generator nor weights")
    within = [plan for plan in planned if plan.name == SNAPSHOTS] if len(rows.runs) == 1 else of_each_run(rows, config)
    if generator is not None and GENERATED in wanted and weights is None:
        pictures.follow(generator, config.seed)
    judged = run.run([*planned, *(plan for plan in within if not plan.is_shown)])
    sets = {plan.name: judged[plan.name] for plan in planned if judged[plan.name].scores}
    with timed(run.seconds, "compare"):
        pictures.add_likeness(
            run.kind, [run.kind.errors(sets[name].scores[0]) for name in (SNAPSHOTS, GENERATED) if name in sets]
        )
        choices = _choices(run, sets, pictures)
    reference_distance = _reference_distance(rows, config)
    differences = _differences(run, [judged[plan.name] for plan in within])
    verdict, comparisons = _judge(run, sets, reference_distance, differences)
    return Evaluation(
        {name: found.figures.to_json() for name, found in sets.items()},
        verdict,
        comparisons,
        seconds | run.seconds,
        {name: _cost(found) for name, found in sets.items()},
        _details(run, judged, pictures, reference_distance, differences) | _origin(rows, generator),
        pictures.arrays,
        choices,
    )


def opened(store: SnapshotStore | str | os.PathLike[str], task: Task) -> SnapshotStore:
    """A store whose tensors the model of ``task`` has.

    Raises:
        LayoutMismatchError: naming the first tensor that it lacks or has in another shape.
    """
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    store.layout.check_model(task.model, f"the store {store.path}")
    return store


def _wanted(config: EvaluateConfig, num_runs: int) -> list[str]:
    """Names of the sets to make, in the order of the table."""
    baselines = {name: b for name, b in BASELINES.items() if num_runs > 1 or not b.needs_runs}
    names = [SNAPSHOTS, GENERATED, *(name for name in baselines if name != SNAPSHOTS)]
    if config.sets == "all":
        return names
    if config.sets == "core":
        return [name for name in names if name == GENERATED or baselines[name].is_core]
    chosen = [config.sets] if isinstance(config.sets, str) else config.sets
    for name in chosen:
        if name not in names:
            raise ConfigError("sets", name, f"must be all, core, or among {', '.join(names)}")
    return [name for name in names if name in chosen]


def _generated(generator: WeightGenerator | None, weights: WeightSet | None, config: EvaluateConfig) -> PlannedSet:
    text = "the generated members"
    if generator is None or weights is not None:
        assert weights is not None
        return PlannedSet(name=GENERATED, text=text, make=partial(_given, weights), max_lost=_MAX_LOST)
    num_runs = len(generator.trajectories)
    return PlannedSet(
        name=GENERATED,
        text=text,
        make=partial(generated, generator, config.num_members),
        num_draws=config.num_draws,
        strata=lambda num_members: runs_in_turn(num_members, num_runs),
        stage="generate",
        max_lost=_MAX_LOST,
    )


def _given(weights: WeightSet, rng: torch.Generator) -> Drawing:
    del rng
    return Drawing(num_members=weights.num_members, whole=lambda empty: weights)


def _deep_ensemble(retrain: Retrain, config: EvaluateConfig, on_progress: OnProgress | None) -> PlannedSet:
    """All floating-point tensors of models trained anew."""

    def train(empty: Empty) -> WeightSet:
        del empty
        members = []
        for number in range(config.num_retrained):
            tensors = named_tensors(retrain(config.seed + number))
            members.append({name: t.detach().cpu().clone() for name, t in tensors.items() if t.is_floating_point()})
            if on_progress is not None:
                on_progress(Progress("retrain", number + 1, config.num_retrained))
        return WeightSet.from_members(members)

    drawing = Drawing(num_members=config.num_retrained, whole=train)
    return PlannedSet(name=DEEP_ENSEMBLE, text="a deep ensemble", make=lambda rng: drawing, stage="retrain")


def _reference_distance(rows: SnapshotRows, config: EvaluateConfig) -> float:
    """Median distance of the snapshots to the nearest one outside their own block."""
    recorded = BASELINES[SNAPSHOTS].recorded
    assert recorded is not None
    own = recorded(rows, config.num_members)
    return float(nearest_distance(rows.squared_distances[own].sqrt(), rows.same_block[own]).nanmedian())


def _judge(
    run: SetRun, sets: Mapping[str, JudgedSet], reference_distance: float, differences: Differences
) -> tuple[Verdict, list[Comparison]]:
    generated = sets.get(GENERATED)
    values = generated.figures.values if generated is not None else {}
    baselines = {name: found for name, found in sets.items() if name in BASELINES}
    cheap = [found.figures.values for name, found in baselines.items() if BASELINES[name].is_cheap_alternative]
    nearness = Nearness(
        values.get(NEAREST.key, math.nan),
        reference_distance,
        min((one[NEAREST.key] for one in cheap), default=math.inf),
        values.get(run.kind.closest, math.nan),
        run.references.likeness(),
        max((one[run.kind.closest] for one in cheap), default=-math.inf),
    )
    verdict, comparisons = judge(
        None if generated is None else generated.scored(),
        {name: found.scored() for name, found in baselines.items()},
        nearness,
        differences,
    )
    if lost := [found for found in sets.values() if found.num_lost]:
        counts = ", ".join(f"{found.num_lost} of {found.num_drawn} of {found.plan.text}" for found in lost)
        verdict = replace(verdict, sentence=f"{verdict.sentence} Members with NaN or Inf were left out: {counts}.")
    return verdict, comparisons


def _differences(run: SetRun, within: Sequence[JudgedSet]) -> Differences:
    """How much snapshots differ within their runs, from a set of snapshots of each run."""
    rows = run.rows
    found = [scores for one in within for scores in one.scores]
    gains = [float(scores.member_loss.mean() - scores.loss[-1].mean()) for scores in found]
    needed = [run.kind.needed(scores.loss[-1]) for scores in found]
    most = max(range(len(found)), key=lambda place: gains[place] / max(needed[place], 1e-12), default=None)
    return Differences(
        run.kind,
        len(rows.runs),
        math.nan if most is None else gains[most],
        math.nan if most is None else float(found[most].loss[-1].mean()),
        math.nan if most is None else needed[most],
        run.references.likeness_within_runs(),
        movement(rows.statistics.gram, rows.trajectory),
    )


def _choices(run: SetRun, sets: Mapping[str, JudgedSet], pictures: Pictures) -> list[Choice]:
    """The best choice for every budget, of what a user can have for nothing: a deep ensemble is none of that."""
    plans = {name: found.plan for name, found in sets.items() if name != DEEP_ENSEMBLE}
    scores = {name: sets[name].scores[0] for name in plans}
    # Members with NaN or Inf were drawn and not scored.
    places = {name: sets[name].sound[sets[name].first].nonzero().squeeze(1) for name in plans}

    def name_of(name: str, members: Sequence[int]) -> str:
        return _name_of(run.rows, plans, scores, name, places[name][list(members)].tolist())

    def draw(name: str, members: Sequence[int]) -> WeightSet:
        return run.drawn_again(plans[name].key(sets[name].first), places[name][list(members)].tolist())

    choices = frontier(run.kind, scores, name_of, run.config.seed, Material(run.task, run.config.seed, draw))
    pictures.arrays |= cost_curves(scores, run.config.seed)
    if run.kind.groups is not None and run.targets is not None:
        pictures.arrays |= group_scores(run.kind.groups(run.targets), scores, choices, run.config.seed)
    return choices


def _name_of(
    rows: SnapshotRows,
    plans: Mapping[str, PlannedSet],
    scores: Mapping[str, Scores],
    name: str,
    members: Sequence[int],
) -> str:
    """What members of a set are called in a sentence."""
    plan, num_members, num_runs = plans[name], len(scores[name].member_loss), len(rows.runs)
    if num_runs == 1:
        text = plan.text.removesuffix(" of each run")
    elif len(members) == 1:  # where members are of runs, they take these in turn
        text = plan.text.replace("each run", rows.store.trajectories[members[0] % num_runs])
    else:
        text = plan.text
    if len(members) > 1:
        return f"an ensemble of {len(members)} of {name} ({text})"
    if plan.recorded is not None:
        place = int(plan.recorded[members[0]])
        run = rows.store.trajectories[int(rows.trajectory[place])]
        return f"the snapshot of step {int(rows.store.steps[rows.indices[place]])} of {run}"
    return text if num_members <= num_runs else f"member {members[0]} of {name} ({text})"


def _cost(found: JudgedSet) -> dict[str, Any]:
    first = found.scores[0]
    return {"forward_passes": first.forward_passes, "seconds": first.seconds}


def _details(
    run: SetRun,
    sets: Mapping[str, JudgedSet],
    pictures: Pictures,
    reference_distance: float,
    differences: Differences,
) -> dict[str, Any]:
    """What was judged, and how carefully."""
    rows, drawn = run.rows, [found for found in sets.values() if found.scores]
    return {
        "task": run.task.name,
        "kind": run.kind.name,
        "seed": run.config.seed,
        "recalibrated": run.config.recalibrate,
        "quick": run.config.quick,
        "num_draws": max(len(found.scores) for found in drawn),
        "num_items": drawn[0].scores[0].num_items,
        "num_snapshots": len(rows),
        "num_skipped_snapshots": rows.num_skipped,
        "num_duplicate_snapshots": rows.num_duplicates,
        "num_reference_snapshots": len(run.references.places),
        "num_left_out": {name: found.num_lost for name, found in sets.items() if found.num_lost},
        "reference_distance": reference_distance,
        "snapshot_differences": differences.to_json(),
        "trajectories": rows.store.trajectories,
        "parameters": pictures.coordinate_names,
        "num_values": rows.layout.num_values,
        "tensors": rows.layout.names,
        "provenance": {
            "store": str(rows.store.path),
            "layout_digest": rows.layout.digest,
            "pdiff_plugin": __version__,
            "torch": torch.__version__,
            "device": str(run.task.target_device()),
        },
    }


def _origin(rows: SnapshotRows, generator: WeightGenerator | None) -> dict[str, Any]:
    """What the fit of a generator left on record."""
    if generator is None:
        return {}
    return {
        "generator": {
            "config": generator.config.to_json(),
            "report": generator.report,
            "provenance": generator.provenance,
        },
        "changed_since_fit": change_since_fit(rows, generator),
    }
