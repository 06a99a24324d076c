"""Judge generated members beside the snapshots and the cheap alternatives made from them.

Shapes: M members of a set, R reference snapshots, N usable snapshots, n items, S ensemble sizes, P chosen coordinates.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pdiff_plugin._version import __version__
from pdiff_plugin.ensemble.batchnorm import recalibrate_batchnorm
from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.alignment import aligned_rows
from pdiff_plugin.evaluation.baselines import BASELINES, CORE, rng_for
from pdiff_plugin.evaluation.result import COLUMNS as COLUMNS
from pdiff_plugin.evaluation.result import FOOTNOTE as FOOTNOTE
from pdiff_plugin.evaluation.result import Evaluation as Evaluation
from pdiff_plugin.evaluation.rows import SnapshotRows, change_since_fit, evenly_spaced
from pdiff_plugin.evaluation.scores import Scorer, Scores, score_sets
from pdiff_plugin.evaluation.task import Task, evaluating
from pdiff_plugin.evaluation.verdict import Candidate, Strata, half_mask, judge
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

# Trains the user's model from scratch with this seed and returns it.
Retrain = Callable[[int], nn.Module]

DEEP_ENSEMBLE = "deep-ensemble"
_REFERENCE = "reference snapshots"
# Snapshots whose errors are compared with everybody's; more would cost as many forward passes of the tail.
_NUM_REFERENCES = 100
# Members held in memory in one pass over the data, at least a set; what is beyond that waits for the next pass.
_PASS_BYTES = 2 << 30
_NUM_PARAMETERS = 6
_NUM_PATH_POINTS = 20


class Samples(Protocol):
    """What is asked of a generator; :class:`~pdiff_plugin.WeightGenerator` is one."""

    layout: Layout

    def sample(self, num_members: int, *, rng: Any = None) -> WeightSet: ...


def evaluate(
    task: Task,
    store: SnapshotStore | str | os.PathLike[str],
    generator: Samples | None = None,
    *,
    weights: WeightSet | None = None,
    num_members: int = 32,
    seed: int = 0,
    sets: Sequence[str] | Literal["all", "core"] = "all",
    num_draws: int = 1,
    retrain: Retrain | None = None,
    num_retrained: int = 5,
    recalibrate: bool = False,
    score: Scorer = score_sets,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Compare generated members with the snapshots and with cheap alternatives from the same snapshots.

    With a generator that was fitted with ``align="rebasin"`` the snapshots are read in the same order of hidden units:
    distances are measured, and averages and Gaussians made, in the coordinates that it works in. ``weights`` alone do
    not tell of an alignment: their distances to snapshots of later runs mean nothing then.

    Args:
        task: the model and held-out data.
        store: the snapshots, or the folder they are in.
        generator: what makes the generated members; without it and ``weights``, only the alternatives are judged.
        weights: generated members themselves, instead of a generator.
        num_members: M of every set (``last`` and ``swa`` have one member per run).
        seed: of every draw; the same seed gives the same figures.
        sets: names of the sets wanted; ``core`` is a quick choice.
        num_draws: times that random sets are drawn; figures are means over the draws, and standard errors know their
            spread. It is estimated from the members too, and all there is with one draw.
        retrain: the user's own training function, for a real deep ensemble: seed -> trained model.
        num_retrained: members of that ensemble.
        recalibrate: score every member, snapshots included, with BatchNorm statistics recomputed on the task's training
            data. An average of weights has none of its own; one pass over the data for each member.
        score: scores sets of members, here unless given; see :class:`pdiff_plugin.cluster.scores.ClusterScorer`.
        on_progress: told the number of batches done.

    Raises:
        LayoutMismatchError: the model, the generator or the weights do not fit the store; the first tensor is named.
        UnusableSnapshotsError: fewer than two snapshots, or all equal.
        ConfigError: an unknown set, data of another kind than classification, or a generator of an alignment that
            changes what the model computes.
    """
    for name, count in (("num_members", num_members), ("num_draws", num_draws), ("num_retrained", num_retrained)):
        if count < 1:
            raise ConfigError(name, count, "must be at least 1")
    if recalibrate and task.train_loader is None:
        raise ConfigError("recalibrate", True, "needs a Task with train_loader")
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    store.layout.check_model(task.model, f"the store {store.path}")
    if generator is not None:
        store.layout.check_same(generator.layout, f"the store {store.path}")
    wanted = _wanted(sets, len(store.trajectories))

    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        rows = aligned_rows(task, store, generator if isinstance(generator, WeightGenerator) else None)
    work = Work(task, rows, seed, num_members, recalibrate, seconds, on_progress, score)
    runs_in_turn: Strata = len(generator.trajectories) if isinstance(generator, WeightGenerator) else "none"
    for name in wanted:
        if name != "generated":
            baseline = BASELINES[name]
            draws = num_draws if baseline.is_random else 1
            strata: Strata = "none"
            if baseline.per_run:
                strata = len(rows.runs)
            elif baseline.per_snapshot:
                strata = "neighbours"
            work.add(name, baseline.text, partial(baseline.draw, rows, num_members), draws, baseline.is_random, strata)
        elif weights is not None:
            rows.check(weights, f"the store {store.path}")
            work.add(name, "the generated members", partial(_given, weights))
        elif generator is not None:
            sample = partial(_sampled, generator, num_members)
            work.add(name, "the generated members", sample, num_draws, strata=runs_in_turn, stage="generate")
    if retrain is not None:
        train = retrain
        work.add(
            DEEP_ENSEMBLE,
            "a deep ensemble",
            lambda rng: _retrained(train, num_retrained, seed, on_progress),
            stage="retrain",
        )
    work.run()
    if isinstance(generator, WeightGenerator) and "generated" in wanted and weights is None:
        with _timed(seconds, "compare"):
            work.arrays["path"] = _denoising_path(generator, rows, seed)
    return work.result(generator)


class Work:
    """The sets of one evaluation, drawn and scored in as few passes over the data as memory allows."""

    def __init__(
        self,
        task: Task,
        rows: SnapshotRows,
        seed: int,
        num_members: int,
        recalibrate: bool,
        seconds: dict[str, float],
        on_progress: OnProgress | None,
        score: Scorer,
    ) -> None:
        self.score = score
        self.task, self.rows, self.seed, self.seconds, self.on_progress = task, rows, seed, seconds, on_progress
        self.num_members, self.recalibrate = num_members, recalibrate
        self.references = evenly_spaced(len(rows), max(_NUM_REFERENCES, num_members))
        self.recorded = {
            "snapshots": evenly_spaced(len(rows), num_members),
            "last": torch.stack([run[-1] for run in rows.runs]),
        }
        self.parameters = _chosen_coordinates(rows)
        self.per_pass = max(1, _PASS_BYTES // (rows.layout.num_values * 4))
        self.jobs: list[_Job] = []
        for start in range(0, len(self.references), self.per_pass):
            places = self.references[start : start + self.per_pass]
            make = partial(_recorded, rows, places)
            self.jobs.append(_Job(_REFERENCE, "", start, make, False, "none", "baselines", len(places)))
        self.scores: dict[str, list[Scores]] = {}
        self.figures: dict[str, list[dict[str, Any]]] = {}
        self.arrays: dict[str, Tensor] = {}
        self.targets: Tensor | None = None
        self.reference_wrong = torch.zeros(0, dtype=torch.bool)  # (references scored so far, n)
        self.entropies: dict[str, dict[str, Tensor]] = {}

    def add(
        self,
        name: str,
        text: str,
        make: Callable[[torch.Generator], WeightSet],
        num_draws: int = 1,
        is_random: bool = True,
        strata: Strata = "none",
        stage: str = "baselines",
    ) -> None:
        """Plan a set; ``make`` draws its members, once for each draw."""
        size = self.num_members
        self.jobs += [_Job(name, text, draw, make, is_random, strata, stage, size) for draw in range(num_draws)]

    def run(self) -> None:
        """Do everything that was planned."""
        passes: list[list[_Job]] = [[]]
        for job in self.jobs:
            if passes[-1] and sum(other.num_members for other in passes[-1]) + job.num_members > self.per_pass:
                passes.append([])
            passes[-1].append(job)
        for jobs in passes:
            self._pass(jobs)
        self._place_snapshots()

    def _pass(self, jobs: list[_Job]) -> None:
        members: dict[str, WeightSet] = {}
        for job in jobs:
            with _timed(self.seconds, job.stage):
                members[job.key] = job.make(rng_for(self.seed, job.key))
            if job.name == "generated":
                self.rows.check(members[job.key], f"the store {self.rows.store.path}")
        scored = members
        if self.recalibrate:
            with _timed(self.seconds, "recalibrate"):
                scored = {key: _recalibrated(self.task, weights) for key, weights in members.items()}
        with _timed(self.seconds, "score"):
            scores, targets = self.score(self.task, scored, seed=self.seed, on_progress=self.on_progress)
            if self.targets is not None and not torch.equal(targets, self.targets):
                raise ConfigError("eval_loader", "another order in a second pass", "must not shuffle (shuffle=False)")
            self.targets = targets
            elsewhere = self._score_elsewhere({job.key: scored[job.key] for job in jobs if job.is_judged})
        with _timed(self.seconds, "compare"):
            for job in jobs:
                if job.name == _REFERENCE:
                    self._add_references(members[job.key], scores[job.key])
                    continue
                figures = self._figures(job, members[job.key], scores[job.key])
                self.scores.setdefault(job.name, []).append(scores[job.key])
                self.figures.setdefault(job.name, []).append(figures | elsewhere[job.key])

    def _score_elsewhere(self, members: Mapping[str, WeightSet]) -> dict[str, dict[str, Any]]:
        """Figures on shifted and out-of-distribution data, by set."""
        figures: dict[str, dict[str, Any]] = {key: {} for key in members}
        for name, loader in self.task.shifted.items():
            scores, _ = self.score(self.task, members, loader=loader, name=f"shifted[{name!r}]", seed=self.seed)
            for key, score in scores.items():
                figures[key][f"shifted/{name}"] = _ensemble_figures(score)
        for name, loader in self.task.out_of_distribution.items():
            where = f"out_of_distribution[{name!r}]"
            scores, _ = self.score(self.task, members, loader=loader, name=where, has_targets=False, seed=self.seed)
            for key, score in scores.items():
                self.entropies.setdefault(key, {})[name] = score.entropy
        return figures

    def _add_references(self, members: WeightSet, scores: Scores) -> None:
        """Keep of some reference snapshots what everybody is compared with, and what the report draws."""
        self.reference_wrong = torch.cat([self.reference_wrong.reshape(-1, scores.correct.shape[1]), ~scores.correct])
        values = _coordinates(self.rows.layout, members, self.parameters)
        drawn = self.arrays.get("snapshots_values", values[:0])
        self.arrays["snapshots_values"] = torch.cat([drawn, values])

    def _place_snapshots(self) -> None:
        """What the report draws of the snapshots as a whole."""
        plane, share = self.rows.plane
        self.arrays["plane_share"] = share
        self.arrays["snapshots_plane"] = self.rows.statistics.gram @ plane
        self.arrays["snapshots_run"] = self.rows.trajectory

    def _figures(self, job: _Job, members: WeightSet, scores: Scores) -> dict[str, Any]:
        overlap = metrics.wrong_iou(~scores.correct, self.reference_wrong)  # (M, R)
        products = self.rows.products(members)
        distances = self.rows.distances(products)
        near = None
        if job.name in self.recorded:
            # A snapshot is no news to itself nor to its neighbours in time.
            near = self.rows.same_block[self.recorded[job.name]]
            overlap = overlap.masked_fill(near[:, self.references], -1.0)
        distance = metrics.nearest_distance(distances, near)
        likest = overlap.max(dim=1).values
        likest = likest.masked_fill(likest < 0, float("nan"))
        accuracy = scores.correct.double().mean(dim=1)
        figures: dict[str, Any] = {
            "members": len(accuracy),
            "accuracy_mean": float(accuracy.mean()),
            "accuracy_best": metrics.best_on_other_half(scores.correct, half_mask(scores.correct.shape[1], self.seed)),
            "accuracy_worst": float(accuracy.min()),
            "accuracy_std": float(accuracy.std()) if len(accuracy) > 1 else 0.0,
            **_ensemble_figures(scores),
            "wrong_iou_mean": metrics.pair_mean(metrics.wrong_iou(~scores.correct)),
            "wrong_iou_max_to_snapshots": float(likest.nanmean()),
            "nearest_snapshot_distance": float(distance.nanmedian()),
            "member_nll_mean": float(scores.member_nll.mean()),
        }
        for name, entropy in self.entropies.get(job.key, {}).items():
            both = torch.cat([scores.entropy, entropy])
            is_out = torch.arange(len(both)) >= len(scores.entropy)
            figures[f"ood_auroc/{name}"] = metrics.auroc(both, is_out)
        if job.draw == 0:
            plane, _ = self.rows.plane
            self.arrays |= {
                f"accuracy/{job.name}": accuracy,
                f"likest/{job.name}": likest,
                f"distance/{job.name}": distance,
                f"plane/{job.name}": products[0] @ plane,
                f"values/{job.name}": _coordinates(self.rows.layout, members, self.parameters),
                f"curve/{job.name}": _curve(scores),
                f"reliability/{job.name}": _reliability(scores),
            }
        return figures

    def _reference_overlap(self) -> float:
        """Share of errors that snapshots have in common with the likest outside their own block, mean over them."""
        near = self.rows.same_block[self.references][:, self.references]
        return float(metrics.wrong_iou(self.reference_wrong).masked_fill(near, 0.0).max(dim=1).values.mean())

    def result(self, generator: Samples | None) -> Evaluation:
        """Figures of all sets, averaged over draws, and the verdict."""
        texts = {job.name: job for job in self.jobs}
        candidates = {
            name: Candidate(texts[name].text, draws, texts[name].is_random, texts[name].strata)
            for name, draws in self.scores.items()
        }
        figures = {name: _mean_over_draws(draws) for name, draws in self.figures.items()}
        generated = figures.get("generated", {})
        own = self.recorded["snapshots"]
        reference = metrics.nearest_distance(self.rows.squared_distances[own].sqrt(), self.rows.same_block[own])
        verdict, comparisons = judge(
            candidates.get("generated"),
            {name: c for name, c in candidates.items() if name in BASELINES},
            distance=generated.get("nearest_snapshot_distance", math.nan),
            reference_distance=float(reference.nanmedian()),
            overlap=generated.get("wrong_iou_max_to_snapshots", math.nan),
            reference_overlap=self._reference_overlap(),
        )
        shown = [name for name in ("snapshots", "generated") if name in self.scores]
        if shown:
            wrong = torch.cat([~self.scores[name][0].correct for name in shown])
            self.arrays["overlap"] = metrics.wrong_iou(wrong)
        assert self.targets is not None
        details: dict[str, Any] = {
            "task": self.task.name,
            "seed": self.seed,
            "recalibrated": self.recalibrate,
            "num_draws": max(len(draws) for draws in self.scores.values()),
            "num_items": len(self.targets),
            "num_snapshots": len(self.rows),
            "num_skipped_snapshots": self.rows.num_skipped,
            "num_duplicate_snapshots": self.rows.num_duplicates,
            "num_reference_snapshots": len(self.references),
            "reference_distance": float(reference.nanmedian()),
            "trajectories": self.rows.store.trajectories,
            "parameters": [_coordinate_name(self.rows.layout, place) for place in self.parameters],
            "num_values": self.rows.layout.num_values,
            "tensors": self.rows.layout.names,
            "provenance": {
                "store": str(self.rows.store.path),
                "layout_digest": self.rows.layout.digest,
                "pdiff_plugin": __version__,
                "torch": torch.__version__,
                "device": str(self.task.target_device()),
            },
        }
        if isinstance(generator, WeightGenerator):
            details["generator"] = {
                "config": generator.config.to_json(),
                "report": generator.report,
                "provenance": generator.provenance,
            }
            details["changed_since_fit"] = change_since_fit(self.rows, generator)
        cost = {
            name: {"forward_passes": draws[0].forward_passes, "seconds": draws[0].seconds}
            for name, draws in self.scores.items()
        }
        return Evaluation(_without_nan(figures), verdict, comparisons, self.seconds, cost, details, self.arrays)


@dataclass(frozen=True)
class _Job:
    """One draw of one set."""

    name: str
    text: str
    draw: int
    make: Callable[[torch.Generator], WeightSet]
    is_random: bool
    strata: Strata
    stage: str
    num_members: int

    @property
    def key(self) -> str:
        return f"{self.name}/{self.draw}" if self.draw else self.name

    @property
    def is_judged(self) -> bool:
        return self.name != _REFERENCE


def _wanted(sets: Sequence[str], num_runs: int) -> list[str]:
    """Names of the sets to make, in the order of the table."""
    names = ["snapshots", "generated", *(name for name in BASELINES if name != "snapshots")]
    if num_runs < 2:
        names = [name for name in names if name == "generated" or not BASELINES[name].per_run]
    if sets == "all":
        return names
    if sets == "core":
        return [name for name in names if name in CORE or name in ("average-per-run", "gaussian-per-run")]
    for name in [sets] if isinstance(sets, str) else sets:
        if name not in names:
            raise ConfigError("sets", name, f"must be all, core, or among {', '.join(names)}")
    return [name for name in names if name in sets]


def _recorded(rows: SnapshotRows, places: Tensor, rng: torch.Generator) -> WeightSet:
    del rng
    return rows.members(places)


def _given(weights: WeightSet, rng: torch.Generator) -> WeightSet:
    del rng
    return weights


def _sampled(generator: Samples, num_members: int, rng: torch.Generator) -> WeightSet:
    return generator.sample(num_members, rng=rng)


def _recalibrated(task: Task, weights: WeightSet) -> WeightSet:
    """The same members with BatchNorm statistics of their own, recomputed on training data."""
    assert task.train_loader is not None
    with evaluating(task) as model:
        ensemble = DiffusionEnsemble(model, weights)
        recalibrate_batchnorm(ensemble, task.train_loader)
        return WeightSet({name: tensor.cpu() for name, tensor in ensemble.weights.items()})


def _retrained(retrain: Retrain, num_models: int, seed: int, on_progress: OnProgress | None) -> WeightSet:
    """All floating-point tensors of models trained anew."""
    members = []
    for number in range(num_models):
        tensors = named_tensors(retrain(seed + number))
        members.append({name: t.detach().cpu().clone() for name, t in tensors.items() if t.is_floating_point()})
        if on_progress is not None:
            on_progress(Progress("retrain", number + 1, num_models))
    return WeightSet.from_members(members)


def _ensemble_figures(scores: Scores) -> dict[str, float]:
    return {
        "ensemble_accuracy": float(scores.hit[-1].double().mean()),
        "ensemble_nll": float(scores.nll[-1].mean()),
        "ensemble_ece": metrics.ece(scores.confidence[-1], scores.hit[-1]),
        "ensemble_brier": float(scores.brier.mean()),
    }


def _mean_over_draws(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one set: means over its draws, with the spread of the ensemble's where there are several."""
    if len(draws) == 1:
        return draws[0]
    mean: dict[str, Any] = {}
    for key, value in draws[0].items():
        values = [draw[key] for draw in draws]
        mean[key] = (
            value if key == "members" else _mean_over_draws(values) if key.startswith("shifted/") else fmean(values)
        )
    for key in ("ensemble_accuracy", "ensemble_nll"):
        mean[f"{key}_std"] = stdev(draw[key] for draw in draws)
    return mean | {"draws": len(draws)}


def _without_nan(value: Any) -> Any:
    """The same figures with None for what is undefined: NaN is not equal to itself."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _curve(scores: Scores) -> Tensor:
    """Ensemble size, NLL, ECE and accuracy, (4, S)."""
    ece = [metrics.ece(c, h) for c, h in zip(scores.confidence, scores.hit, strict=True)]
    return torch.stack(
        [
            torch.tensor(scores.sizes, dtype=torch.float64),
            scores.nll.mean(dim=1),
            torch.tensor(ece, dtype=torch.float64),
            scores.hit.double().mean(dim=1),
        ]
    )


def _reliability(scores: Scores) -> Tensor:
    """Count, confidence and accuracy by bin, (3, number of bins)."""
    bins = metrics.reliability(scores.confidence[-1], scores.hit[-1])
    return torch.stack([bins.count, bins.confidence, bins.accuracy])


def _chosen_coordinates(rows: SnapshotRows) -> list[int]:
    """Flat places of at most six coordinates, each the one that moves most at the start of its tensor."""
    tensors = [spec for spec in rows.layout if spec.numel]
    chosen = []
    for index in evenly_spaced(len(tensors), _NUM_PARAMETERS).tolist():
        place = rows.layout.slices[tensors[index].name]
        values = rows.read(place.start, min(place.stop, place.start + 4096))
        chosen.append(place.start + int(values.double().var(dim=0).argmax()))
    return chosen


def _coordinates(layout: Layout, members: WeightSet, places: Sequence[int]) -> Tensor:
    """Values of single coordinates, (M, P) float32."""
    columns = []
    for place in places:
        spec, rest = _owner(layout, place)
        columns.append(members[spec.name].reshape(members.num_members, -1)[:, rest].float().cpu())
    return torch.stack(columns, dim=1)


def _owner(layout: Layout, place: int) -> tuple[TensorSpec, int]:
    """The tensor that holds a place of the flat vector, and the place within it."""
    return next((s, place - layout.slices[s.name].start) for s in layout if place < layout.slices[s.name].stop)


def _coordinate_name(layout: Layout, place: int) -> str:
    """``conv.weight[3, 0, 1, 1]`` of a place in the flat vector."""
    spec, rest = _owner(layout, place)
    index = [int(i) for i in torch.unravel_index(torch.tensor(rest), spec.shape)] if spec.shape else []
    return f"{spec.name}{index}" if index else spec.name


def _denoising_path(generator: WeightGenerator, rows: SnapshotRows, seed: int) -> Tensor:
    """One sample on its way, in the plane of the snapshots: the estimate of its clean weights, (steps, 2)."""
    estimates: list[Tensor] = []
    generator.sample_latents(1, rng=rng_for(seed, "path"), on_step=lambda x: estimates.append(x.cpu()))
    plane, _ = rows.plane
    points = []
    for index in evenly_spaced(len(estimates), _NUM_PATH_POINTS).tolist():
        members = WeightSet.from_flat(generator.autoencoder.decode(estimates[index]), rows.layout)
        points.append(rows.products(members)[0] @ plane)
    return torch.cat(points)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
