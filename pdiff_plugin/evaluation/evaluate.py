"""Judge generated members beside the snapshots and the cheap alternatives made from them.

Shapes: M members of a set, R reference snapshots, N usable snapshots, n items.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.baselines import CORE, rng_for
from pdiff_plugin.evaluation.rows import SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.scores import Scores, score_sets
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.evaluation.verdict import Comparison, Verdict, half_mask, judge
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore

REFERENCE = "reference snapshots"
# Snapshots whose errors are compared with everybody's; more would cost as many forward passes of the tail.
_NUM_REFERENCES = 100

ALTERNATIVES = {
    "snapshots": "the snapshots themselves",
    "average": "averages of 16 snapshots",
    "gaussian": "a Gaussian around the snapshots",
    "noise": "snapshots with noise",
}

COLUMNS = (
    ("members", "members", "d"),
    ("accuracy_mean", "acc mean", "%"),
    ("accuracy_std", "± std", "%"),
    ("accuracy_best", "best*", "%"),
    ("accuracy_worst", "worst", "%"),
    ("ensemble_accuracy", "ens acc", "%"),
    ("ensemble_nll", "ens NLL", ".4f"),
    ("ensemble_ece", "ens ECE", ".4f"),
    ("wrong_iou_mean", "IoU", ".3f"),
    ("wrong_iou_max_to_snapshots", "IoU to snap", ".3f"),
    ("nearest_snapshot_distance", "nearest", ".3f"),
)
FOOTNOTE = (
    "best*: chosen on one half of the data, scored on the other. IoU: share of errors in common, within the set and "
    "with the likest snapshot. nearest: distance to the nearest snapshot in typical deviations (of snapshots: outside "
    "their own block of time)."
)


class Samples(Protocol):
    """What is asked of a generator; :class:`~pdiff_plugin.WeightGenerator` is one."""

    layout: Layout

    def sample(self, num_members: int, *, rng: Any = None) -> WeightSet: ...


@dataclass(frozen=True)
class Evaluation:
    """Figures of every set, the verdict, and the time it took.

    Attributes:
        sets: set name -> figures, as in :meth:`to_json`.
        verdict: outcome, sentence and deciding numbers.
        comparisons: generated against each alternative.
        seconds: stage -> seconds.
        details: what else a report needs: task, seed, counts.
    """

    sets: dict[str, dict[str, Any]]
    verdict: Verdict
    comparisons: list[Comparison]
    seconds: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON document; what is undefined (the overlap within a set of one) is null."""
        document = {
            "sets": self.sets,
            "verdict": self.verdict.sentence,
            "seconds": self.seconds,
            "verdict_outcome": self.verdict.outcome,
            "verdict_numbers": self.verdict.numbers,
            "comparisons": [vars(c) for c in self.comparisons],
            **self.details,
        }
        cleaned: dict[str, Any] = _json_safe(document)
        return cleaned

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and one row of text per set."""
        headers = ["set", *(title for _, title, _ in COLUMNS)]
        rows = [
            [name, *(_format(figures[key], kind) for key, _, kind in COLUMNS)] for name, figures in self.sets.items()
        ]
        return headers, rows

    def table_text(self) -> str:
        """The table and the verdict as plain text."""
        headers, rows = self.table()
        widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

        def line(cells: Sequence[str]) -> str:
            padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            return "  ".join(padded).rstrip()

        lines = [line(headers), "  ".join("-" * w for w in widths), *(line(row) for row in rows)]
        return "\n".join([*lines, "", FOOTNOTE, "", self.verdict.sentence])

    def __str__(self) -> str:
        return self.table_text()


def evaluate(
    task: Task,
    store: SnapshotStore | str | os.PathLike[str],
    generator: Samples | None = None,
    *,
    weights: WeightSet | None = None,
    num_members: int = 32,
    seed: int = 0,
    sets: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Compare generated members with the snapshots and with cheap alternatives from the same snapshots.

    Args:
        task: the model and held-out data.
        store: the snapshots, or the folder they are in.
        generator: what makes the generated members; without it and ``weights``, only the alternatives are judged.
        weights: generated members themselves, instead of a generator.
        num_members: M of every set.
        seed: of every draw; the same seed gives the same figures.
        sets: names of the sets wanted; all of them unless given.
        on_progress: told the number of batches done.

    Raises:
        LayoutMismatchError: the model, the generator or the weights do not fit the store; the first tensor is named.
        UnusableSnapshotsError: fewer than two snapshots, or all equal.
        ConfigError: an unknown set, or data of another kind than classification.
    """
    if num_members < 1:
        raise ConfigError("num_members", num_members, "must be at least 1")
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    store.layout.check_model(task.model, f"the store {store.path}")
    if generator is not None:
        store.layout.check_same(generator.layout, f"the store {store.path}")
    names = ["snapshots", "generated", *(name for name in CORE if name != "snapshots")]
    for name in sets or ():
        if name not in names:
            raise ConfigError("sets", name, f"must be among {', '.join(names)}")
    wanted = [name for name in names if sets is None or name in sets]

    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        rows = SnapshotRows(store)
    members: dict[str, WeightSet] = {}
    for name in wanted:
        if name != "generated":
            with _timed(seconds, "baselines"):
                members[name] = CORE[name](rows, num_members, rng_for(seed, name))
        elif weights is not None or generator is not None:
            with _timed(seconds, "generate"):
                members[name] = weights or _sample(generator, num_members, seed)
                rows.check(members[name], f"the store {store.path}")
    references = evenly_spaced(len(rows), max(_NUM_REFERENCES, num_members))
    with _timed(seconds, "score"):
        scores = score_sets(task, {**members, REFERENCE: rows.members(references)}, seed=seed, on_progress=on_progress)
    reference = scores.pop(REFERENCE)
    with _timed(seconds, "compare"):
        first_half = half_mask(reference.correct.shape[1], seed)
        own = evenly_spaced(len(rows), num_members)
        own_distance = metrics.nearest_distance(rows.squared_distances[own].sqrt(), rows.same_block[own])
        figures = {}
        for name, weight_set in members.items():
            overlap = metrics.wrong_iou(~scores[name].correct, ~reference.correct)
            if name == "snapshots":
                overlap = overlap.masked_fill(rows.same_block[own][:, references], float("nan"))
                distance = own_distance
            else:
                distance = metrics.nearest_distance(rows.distances(weight_set))
            figures[name] = _figures(scores[name], overlap, distance, first_half)
        generated = figures.get("generated", {})
        verdict, comparisons = judge(
            scores,
            ALTERNATIVES,
            distance=generated.get("nearest_snapshot_distance", math.nan),
            reference_distance=float(own_distance.nanmedian()),
            overlap=generated.get("wrong_iou_max_to_snapshots", math.nan),
        )
    details = {
        "task": task.name,
        "seed": seed,
        "num_items": reference.correct.shape[1],
        "num_snapshots": len(rows),
        "num_skipped_snapshots": rows.num_skipped,
        "num_duplicate_snapshots": rows.num_duplicates,
        "num_reference_snapshots": len(references),
        "trajectories": store.trajectories,
    }
    return Evaluation(figures, verdict, comparisons, seconds, details)


def _figures(scores: Scores, overlap: Tensor, distance: Tensor, first_half: Tensor) -> dict[str, Any]:
    """The figures of one set.

    Args:
        scores: of its members.
        overlap: errors in common with each reference, (M, R); NaN where not to be compared.
        distance: to the nearest snapshot, (M,).
        first_half: items on which the best is chosen, (n,) bool.
    """
    accuracy = scores.correct.double().mean(dim=1)
    nearest = overlap.nan_to_num(-1.0).max(dim=1).values
    return {
        "members": len(accuracy),
        "accuracy_mean": float(accuracy.mean()),
        "accuracy_best": metrics.best_on_other_half(scores.correct, first_half),
        "accuracy_worst": float(accuracy.min()),
        "accuracy_std": float(accuracy.std()) if len(accuracy) > 1 else 0.0,
        "ensemble_accuracy": float(scores.hit[-1].double().mean()),
        "ensemble_nll": float(scores.nll[-1].mean()),
        "ensemble_ece": metrics.ece(scores.confidence[-1], scores.hit[-1]),
        "ensemble_brier": float(scores.brier.mean()),
        "wrong_iou_mean": metrics.pair_mean(metrics.wrong_iou(~scores.correct)),
        "wrong_iou_max_to_snapshots": float(nearest[nearest >= 0].mean()),
        "nearest_snapshot_distance": float(distance.nanmedian()),
        "member_nll_mean": float(scores.member_nll.mean()),
    }


def _sample(generator: Samples | None, num_members: int, seed: int) -> WeightSet:
    assert generator is not None
    return generator.sample(num_members, rng=rng_for(seed, "generated"))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def _format(value: Any, kind: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{100 * value:.2f}" if kind == "%" else format(value, kind)


def _json_safe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
