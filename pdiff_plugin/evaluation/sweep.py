"""The accuracy-novelty curve of a generator, beside those of the cheap alternatives.

Every way of making members has a knob: ``diversity`` of the generator, the number of snapshots in an average, the scale
of a Gaussian or of SWAG, the size of noise. Turning it trades accuracy for novelty. One set proves little: a generator
is worth something where its curve lies above all the others (the plane of Zeng et al. 2025, arXiv 2506.07998), and
above the snapshots themselves where it is no more novel than they are.

Shapes: M members of a set, n items.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pdiff_plugin.evaluation.alignment import aligned_rows
from pdiff_plugin.evaluation.baselines import average, gaussian, noise, rng_for, snapshots, swag
from pdiff_plugin.evaluation.evaluate import Work
from pdiff_plugin.evaluation.result import format_figure, json_safe, text_table
from pdiff_plugin.evaluation.scores import Scores, score_sets
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.store import SnapshotStore

DIVERSITIES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

SETTINGS: dict[str, tuple[float, ...]] = {
    "average": (2, 3, 4, 8, 16, 64),
    "gaussian": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "swag": (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0),
    "noise": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
}
"""What each alternative's knob is set to: snapshots in an average, scale of a Gaussian's deviations, of SWAG's
covariance, size of the noise."""


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found; prints as a table.

    Attributes:
        points: one entry per set: ``set`` (snapshots, generated, average, gaussian, swag, noise), ``setting``, and the
            figures of :meth:`Evaluation.to_json`. A generated one also has ``margin``, its mean accuracy minus what the
            alternatives, the snapshots among them, reach with no more errors in common with the likest snapshot,
            ``margin_error``, one standard error of that (over items and members), and ``margin_over``, which
            alternative it is: None where no alternative is as novel.
        task: name of the task.
        num_members: of each set.
        seed: of every draw.
    """

    points: list[dict[str, Any]]
    task: str
    num_members: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """One JSON document; what is undefined (the overlap within a set of one) is null."""
        document = {"task": self.task, "num_members": self.num_members, "seed": self.seed, "points": self.points}
        cleaned: dict[str, Any] = json_safe(document)
        return cleaned

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and one row of text per set."""
        headers = ["set", "setting", "acc mean", "IoU to snap", "margin", "IoU", "ens acc", "ens NLL", "nearest"]
        rows = []
        for p in self.points:
            margin = "-"
            if p.get("margin") is not None:
                margin = f"{100 * p['margin']:+.2f} ± {100 * p['margin_error']:.2f} over {p['margin_over']}"
            cells = [p["set"], "" if p["setting"] is None else f"{p['setting']:g}"]
            cells += [format_figure(p["accuracy_mean"], "%"), format_figure(p["wrong_iou_max_to_snapshots"], ".3f")]
            cells += [margin, format_figure(p["wrong_iou_mean"], ".3f"), format_figure(p["ensemble_accuracy"], "%")]
            cells += [format_figure(p["ensemble_nll"], ".4f"), format_figure(p["nearest_snapshot_distance"], ".3f")]
            rows.append(cells)
        return headers, rows

    @property
    def sentence(self) -> str:
        """At which settings the generated curve lies above the alternatives, or below, by two standard errors."""
        places: dict[str, list[str]] = {"above": [], "level with": [], "below": []}
        beyond = []
        for p in self.points:
            if p["set"] != "generated":
                continue
            if p["margin"] is None:
                beyond.append(f"{p['setting']:g}")
                continue
            is_clear = abs(p["margin"]) > 2 * p["margin_error"]
            kind = ("above" if p["margin"] > 0 else "below") if is_clear else "level with"
            places[kind].append(f"{p['setting']:g} ({100 * p['margin']:+.2f} ± {100 * p['margin_error']:.2f} points)")
        parts = [f"{kind} the best alternative at {', '.join(found)}" for kind, found in places.items() if found]
        if beyond:
            parts.append(f"more novel than any alternative at {', '.join(beyond)}")
        return "At equal novelty, by diversity, generated members are " + "; ".join(parts) + "."

    def __str__(self) -> str:
        return f"{text_table(*self.table())}\n\n{self.sentence}"

    def save_picture(self, path: str | os.PathLike[str]) -> Path:
        """Draw the curves into a PNG file.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from pdiff_plugin.evaluation.page import write_figure
        from pdiff_plugin.evaluation.plots import accuracy_novelty_curves

        write_figure(accuracy_novelty_curves(self.points), Path(path))
        return Path(path)


def sweep(
    task: Task,
    store: SnapshotStore | str | os.PathLike[str],
    generator: WeightGenerator,
    *,
    diversities: Sequence[float] = DIVERSITIES,
    settings: Mapping[str, Sequence[float]] = SETTINGS,
    num_members: int = 32,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Sweep:
    """Judge a set of members for every setting of every curve.

    In a store of several runs the average, the Gaussian and SWAG are those of single runs.

    Args:
        task: the model and held-out data.
        store: the snapshots that novelty is measured against.
        generator: makes the generated members, all sets from the same noise.
        diversities: values in (0, 2].
        settings: of the alternatives; only the snapshots themselves for an empty mapping.
        num_members: M of each set.
        seed: of every draw.
        on_progress: told the number of batches done.
    """
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    store.layout.check_model(task.model, f"the store {store.path}")
    rows = aligned_rows(task, store, generator)
    work = Work(task, rows, seed, num_members, False, {}, on_progress, score_sets)
    points: list[dict[str, Any]] = []

    def add(name: str, setting: float | None, make: Callable[[torch.Generator], WeightSet]) -> None:
        points.append({"set": name, "setting": setting})
        work.add(_key(points[-1]), name, make)

    add("snapshots", None, partial(snapshots, rows, num_members))
    per_run = len(rows.runs) > 1
    draws: dict[str, Callable[[float], Callable[..., WeightSet]]] = {
        "average": lambda k: partial(average, k=int(k), per_run=per_run),
        "gaussian": lambda scale: partial(gaussian, scale=scale, per_run=per_run),
        "swag": lambda scale: partial(swag, scale=scale, per_run=per_run),
        "noise": lambda size: partial(noise, size=size),
    }
    for diversity in diversities:
        add("generated", diversity, partial(_generated, generator, num_members, diversity, seed))
    for name, values in settings.items():
        for setting in values:
            add(name, setting, partial(draws[name](setting), rows, num_members))
    work.run()
    for point in points:
        point |= work.figures[_key(point)][0]
    scores = {_key(point): work.scores[_key(point)][0] for point in points}
    alternatives = [[point for point in points if point["set"] == name] for name in ("snapshots", *settings)]
    for point in points:
        if point["set"] == "generated":
            point |= _margin(point, alternatives, scores)
    return Sweep(points, task.name, num_members, seed)


def best_at(similarity: float, curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, int, int] | None:
    """The best accuracy that curves reach at no more than a similarity.

    Args:
        similarity: share of errors in common with the likest snapshot.
        curves: each the (similarity, accuracy) of one alternative in the order of its setting; between two settings it
            is taken to be a straight line. One of a single point counts in full from there, and not at all before.

    Returns:
        Accuracy, and which curve and which of its points is the nearest to that place; None if no curve is as novel.
    """
    best: tuple[float, int, int] | None = None
    for number, curve in enumerate(curves):
        found = [(a, place) for place, (s, a) in enumerate(curve) if s <= similarity]
        for place, ((s0, a0), (s1, a1)) in enumerate(pairwise(curve)):
            if min(s0, s1) <= similarity < max(s0, s1):
                share = (similarity - s0) / (s1 - s0)
                found.append((a0 + share * (a1 - a0), place + (share > 0.5)))
        for accuracy, place in found:
            if best is None or accuracy > best[0]:
                best = accuracy, number, place
    return best


def _margin(
    point: dict[str, Any], alternatives: list[list[dict[str, Any]]], scores: Mapping[str, Scores]
) -> dict[str, Any]:
    keys = ("wrong_iou_max_to_snapshots", "accuracy_mean")
    found = best_at(point[keys[0]], [[(p[keys[0]], p[keys[1]]) for p in curve] for curve in alternatives])
    if found is None:
        return {"margin": None, "margin_error": None, "margin_over": None}
    accuracy, number, place = found
    rival = alternatives[number][place]
    return {
        "margin": point["accuracy_mean"] - accuracy,
        "margin_error": _error(scores[_key(point)], scores[_key(rival)]),
        "margin_over": rival["set"],
    }


def _error(one: Scores, other: Scores) -> float:
    """Standard error of the difference of two sets' mean accuracies: paired over items, and over the members drawn."""
    mine, theirs = one.correct.double(), other.correct.double()  # (M, n)
    over_items = (mine.mean(dim=0) - theirs.mean(dim=0)).var() / mine.shape[1]
    over_members = sum(float(set_.mean(dim=1).var()) / len(set_) for set_ in (mine, theirs) if len(set_) > 1)
    return math.sqrt(float(over_items) + over_members)


def _generated(
    generator: WeightGenerator, num_members: int, diversity: float, seed: int, rng: torch.Generator
) -> WeightSet:
    del rng  # the same noise at every setting, so that the curve is smooth
    return generator.sample(num_members, diversity=diversity, rng=rng_for(seed, "generated"))


def _key(point: Mapping[str, Any]) -> str:
    return str(point["set"]) if point["setting"] is None else f"{point['set']} {point['setting']:g}"
