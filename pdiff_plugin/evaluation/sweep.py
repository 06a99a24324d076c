"""The accuracy-novelty curve of a generator, beside those of the baselines.

Every way of making members has a knob: ``diversity`` of the generator, the number of snapshots in an average, the scale
of a Gaussian or of SWAG, the size of noise. Turning it trades accuracy for novelty. One set proves little: a generator
is worth something where its curve lies above all the others (the plane of Zeng et al. 2025, arXiv 2506.07998), and
above the snapshots themselves where it is no more novel than they are.

Shapes: M members of a set, n items.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pdiff_plugin.config import EvaluateConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.alignment import aligned_rows
from pdiff_plugin.evaluation.baselines import BASELINES, GENERATED, SNAPSHOTS, Drawing, rng_for
from pdiff_plugin.evaluation.evaluate import opened
from pdiff_plugin.evaluation.kind import NEAREST, Scores, TaskKind
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.result import format_figure, text_table
from pdiff_plugin.evaluation.rows import SnapshotRows
from pdiff_plugin.evaluation.set_run import PlannedSet, SetRun, generated
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.files import json_safe
from pdiff_plugin.snapshots.store import SnapshotStore

DIVERSITIES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

SETTINGS: dict[str, tuple[float, ...]] = {name: b.knob.values for name, b in BASELINES.items() if b.knob is not None}
"""What each baseline's knob is set to: snapshots in an average, scale of a Gaussian's deviations, of SWAG's covariance,
size of the noise."""


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found; prints as a table.

    Attributes:
        points: one entry per set: ``set`` (snapshots, generated, average, gaussian, swag, noise), ``setting``, and the
            figures of :meth:`Evaluation.to_json`. A generated one also has ``margin``, its mean accuracy minus what the
            baselines, the snapshots among them, reach with no more errors in common with the closest snapshot,
            ``margin_error``, one standard error of that (over items and members), and ``margin_over``, which baseline
            it is: None where no baseline is as novel.
        task: name of the task.
        num_members: of each set.
        seed: of every draw.
        kind: of the task.
    """

    points: list[dict[str, Any]]
    task: str
    num_members: int
    seed: int
    kind: str = "classification"

    def to_json(self) -> dict[str, Any]:
        """One JSON document; what is undefined (the overlap within a set of one) is null."""
        document = {"task": self.task, "num_members": self.num_members, "seed": self.seed, "points": self.points}
        cleaned: dict[str, Any] = json_safe(document)
        return cleaned

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and one row of text per set."""
        kind = KINDS[self.kind]
        after = (kind.within, kind.ensemble_score, kind.ensemble_loss, NEAREST.key)
        before, behind = ([kind.metric(key) for key in keys] for keys in ((kind.mean_score, kind.closest), after))
        headers = ["set", "setting", *(m.title for m in before), "margin", *(m.title for m in behind)]
        rows = []
        for p in self.points:
            margin = "-"
            if p.get("margin") is not None:
                margin = f"{self._margin(p).removesuffix(' points')} over {p['margin_over']}"
            cells = [p["set"], "" if p["setting"] is None else f"{p['setting']:g}"]
            cells += [format_figure(p[metric.key], metric.format) for metric in before]
            cells += [margin, *(format_figure(p[metric.key], metric.format) for metric in behind)]
            rows.append(cells)
        return headers, rows

    def _margin(self, point: Mapping[str, Any]) -> str:
        return KINDS[self.kind].score.difference(point["margin"], point["margin_error"])

    @property
    def sentence(self) -> str:
        """At which settings the generated curve lies above the baselines, or below, by two standard errors."""
        places: dict[str, list[str]] = {"above": [], "level with": [], "below": []}
        beyond = []
        for p in self.points:
            if p["set"] != GENERATED:
                continue
            if p["margin"] is None:
                beyond.append(f"{p['setting']:g}")
                continue
            is_clear = abs(p["margin"]) > 2 * p["margin_error"]
            kind = ("above" if p["margin"] > 0 else "below") if is_clear else "level with"
            places[kind].append(f"{p['setting']:g} ({self._margin(p)})")
        parts = [f"{kind} the best baseline at {', '.join(found)}" for kind, found in places.items() if found]
        if beyond:
            parts.append(f"more novel than any baseline at {', '.join(beyond)}")
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

        write_figure(accuracy_novelty_curves(KINDS[self.kind], self.points), Path(path))
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
        settings: of the baselines' knobs; only the snapshots themselves for an empty mapping.
        num_members: M of each set.
        seed: of every draw.
        on_progress: told the number of batches done.

    Raises:
        ConfigError: settings of something that is no baseline with a knob.
    """
    for name in settings:
        if name not in BASELINES or BASELINES[name].knob is None:
            raise ConfigError("settings", name, f"must be among {', '.join(SETTINGS)}")
    config = EvaluateConfig(num_members=num_members, seed=seed)
    rows = aligned_rows(task, opened(store, task), generator, config.memory_gb)
    run = SetRun(task, rows, config, on_progress=on_progress)
    points: list[dict[str, Any]] = [{"set": SNAPSHOTS, "setting": None}]
    points += [{"set": GENERATED, "setting": diversity} for diversity in diversities]
    points += [{"set": name, "setting": setting} for name, values in settings.items() for setting in values]
    planned = [PlannedSet.of(SNAPSHOTS, BASELINES[SNAPSHOTS], rows, config)]
    for point in points[1:]:
        if point["set"] == GENERATED:
            make = partial(_generated, generator, config, point["setting"])
        else:
            make = partial(_turned, rows, config, point["set"], point["setting"])
        planned.append(PlannedSet(name=_key(point), make=make))
    found = run.run(planned)
    for point in points:
        point |= found[_key(point)].figures.to_json()
    scores = {key: one.scores[0] for key, one in found.items()}
    curves = [[point for point in points if point["set"] == name] for name in (SNAPSHOTS, *settings)]
    for point in points:
        if point["set"] == GENERATED:
            point |= _margin(run.kind, point, curves, scores)
    return Sweep(points, task.name, num_members, seed, run.kind.name)


def best_at(similarity: float, curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, int, int] | None:
    """The best accuracy that curves reach at no more than a similarity.

    Args:
        similarity: share of errors in common with the closest snapshot.
        curves: each the (similarity, accuracy) of one baseline in the order of its setting; between two settings it
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
    kind: TaskKind, point: dict[str, Any], baselines: list[list[dict[str, Any]]], scores: Mapping[str, Scores]
) -> dict[str, Any]:
    keys = (kind.closest, kind.mean_score)
    found = best_at(point[keys[0]], [[(p[keys[0]], p[keys[1]]) for p in curve] for curve in baselines])
    if found is None:
        return {"margin": None, "margin_error": None, "margin_over": None}
    score, number, place = found
    rival = baselines[number][place]
    return {
        "margin": point[kind.mean_score] - score,
        "margin_error": _error(scores[_key(point)], scores[_key(rival)]),
        "margin_over": rival["set"],
    }


def _error(one: Scores, other: Scores) -> float:
    """Standard error of the difference of two sets' mean scores: paired over items, and over the members drawn."""
    mine, theirs = one.member_score.double(), other.member_score.double()  # (M, n)
    over_items = (mine.mean(dim=0) - theirs.mean(dim=0)).var() / mine.shape[1]
    over_members = sum(float(set_.mean(dim=1).var()) / len(set_) for set_ in (mine, theirs) if len(set_) > 1)
    return math.sqrt(float(over_items) + over_members)


def _generated(generator: WeightGenerator, config: EvaluateConfig, diversity: float, rng: torch.Generator) -> Drawing:
    del rng  # the same noise at every setting, so that the curve is smooth
    return generated(generator, config.num_members, rng_for(config.seed, GENERATED), diversity=diversity)


def _turned(rows: SnapshotRows, config: EvaluateConfig, name: str, setting: float, rng: torch.Generator) -> Drawing:
    """A baseline with its knob turned; within single runs where there are several."""
    knob = BASELINES[name].knob
    assert knob is not None
    options: dict[str, Any] = {knob.argument: setting}
    if knob.by_run:
        options["per_run"] = len(rows.runs) > 1
    return BASELINES[name].draw(rows, config.num_members, rng, **options)


def _key(point: Mapping[str, Any]) -> str:
    return str(point["set"]) if point["setting"] is None else f"{point['set']} {point['setting']:g}"
