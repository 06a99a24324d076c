"""Planned sets are drawn, scored and measured in as few passes over the data as memory allows.

Shapes: M members of a set, R reference snapshots, N usable snapshots, n items.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pdiff_plugin.config import EvaluateConfig
from pdiff_plugin.ensemble.batchnorm import recalibrate_batchnorm
from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.baselines import Baseline, rng_for
from pdiff_plugin.evaluation.figures import Figures, measure, measure_shifted, over_draws
from pdiff_plugin.evaluation.kind import Measured, Scores, TaskKind
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.pictures import Pictures
from pdiff_plugin.evaluation.rows import SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.scores import Scorer, score_sets
from pdiff_plugin.evaluation.task import Data, Task, evaluating
from pdiff_plugin.evaluation.verdict import ScoredSet, half_mask
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import OnProgress, timed

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Snapshots whose errors are compared with everybody's; more would cost as many forward passes of the tail.
_NUM_REFERENCES = 100
# Fewer snapshots of a run do not tell what its ensemble would gain.
_MIN_OF_RUN = 4
# Members held in memory in one pass over the data, at least a set; what is beyond that waits for the next pass.
_PASS_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class PlannedSet:
    """A set to be drawn.

    Attributes:
        name: in the table.
        text: its name in a sentence.
        make: draws its members.
        num_draws: times that it is drawn.
        is_random: whether another draw gives other members.
        recorded: places (M,) of the snapshots that its members are, where they are such.
        strata: number of members M -> which of them were drawn alike, (M,); all of them where there is none.
        stage: under which the seconds of drawing are counted.
        is_shown: whether it has a row in the table; others are scored and no more.
        max_lost: share of members with NaN or Inf, in their weights or answers, beyond which the set is refused.
    """

    name: str
    text: str = ""
    make: Callable[[torch.Generator], WeightSet]
    num_draws: int = 1
    is_random: bool = True
    recorded: Tensor | None = None
    strata: Callable[[int], Tensor] | None = None
    stage: str = "baselines"
    is_shown: bool = True
    max_lost: float = 1.0

    @classmethod
    def of(cls, name: str, baseline: Baseline, rows: SnapshotRows, config: EvaluateConfig) -> PlannedSet:
        """The set that a baseline draws."""
        return cls(
            name=name,
            text=baseline.text,
            make=partial(baseline.draw, rows, config.num_members),
            num_draws=config.num_draws if baseline.is_random else 1,
            is_random=baseline.is_random,
            recorded=baseline.recorded and baseline.recorded(rows, config.num_members),
            strata=baseline.strata and partial(baseline.strata, rows),
        )


def of_each_run(rows: SnapshotRows, config: EvaluateConfig) -> list[PlannedSet]:
    """Snapshots of each run by itself, to be scored only: they tell how much those of a run differ."""
    size = config.num_members // len(rows.runs)
    return [
        PlannedSet(
            name=f"snapshots of run {number}",
            make=partial(_recorded, rows, run[evenly_spaced(len(run), size)]),
            is_random=False,
            is_shown=False,
        )
        for number, run in enumerate(rows.runs)
        if min(size, len(run)) >= _MIN_OF_RUN
    ]


@dataclass(frozen=True)
class JudgedSet:
    """A set that was drawn: scores and figures of each draw, and which of its members are sound, (M,).

    Members with NaN or Inf, in their weights or their answers, are left out; a draw of nothing else is.
    """

    plan: PlannedSet
    kind: TaskKind
    scores: list[Scores] = field(default_factory=list)
    draws: list[Figures] = field(default_factory=list)
    sound: list[Tensor] = field(default_factory=list)

    @property
    def num_lost(self) -> int:
        """Members left out, over all draws."""
        return sum(int((~sound).sum()) for sound in self.sound)

    @property
    def figures(self) -> Figures:
        """Means over the draws."""
        return over_draws(self.kind, self.draws)

    @property
    def num_drawn(self) -> int:
        """Members over all draws, those left out among them."""
        return sum(len(sound) for sound in self.sound)

    def add_sound(self, sound: Tensor) -> None:
        """Note which members of a draw are sound.

        Raises:
            ConfigError: fewer than the set may lose.
        """
        lost = int((~sound).sum())
        if lost > self.plan.max_lost * len(sound):
            raise ConfigError(
                self.plan.text,
                f"{lost} of {len(sound)} with NaN or Inf",
                f"must hold such values, or answer with them, in at most {self.plan.max_lost:.0%} of the members",
            )
        if lost:
            logger.warning("%d of %d members of %s hold NaN or Inf: left out", lost, len(sound), self.plan.text)
        self.sound.append(sound)

    def scored(self) -> ScoredSet:
        """As the verdict sees it."""
        return ScoredSet(self.kind, self.plan.text, self.scores, self.plan.is_random, self._stratum())

    def _stratum(self) -> Tensor | None:
        """Which members were drawn alike; None for all of them."""
        if self.plan.strata is None:
            return None
        kept = [sound for sound in self.sound if sound.any()]
        stratum = self.plan.strata(len(kept[0]))[kept[0]]
        # With members missing, the draws may have no strata in common, or a stratum a single member. To take all as
        # drawn alike errs on the side of too large an error.
        are_same = all(torch.equal(sound, kept[0]) for sound in kept)
        has_pairs = int((stratum[:, None] == stratum[None, :]).sum(dim=1).min()) > 1
        return stratum if self.num_lost == 0 or (are_same and has_pairs) else None


class References:
    """Snapshots, evenly spaced, whose errors are compared with those of every member.

    Attributes:
        places: of the snapshots among the N, (R,).
        errors: of those scored so far, (R, n).
    """

    def __init__(self, rows: SnapshotRows, kind: TaskKind, num_members: int) -> None:
        self._rows, self._kind = rows, kind
        self.places = evenly_spaced(len(rows), max(_NUM_REFERENCES, num_members))
        self.errors = torch.zeros(0)

    def add(self, scores: Scores) -> None:
        errors = self._kind.errors(scores)
        self.errors = torch.cat([self.errors, errors]) if len(self.errors) else errors

    def closest(self, errors: Tensor, recorded: Tensor | None) -> Tensor:
        """Likeness of members to the closest reference, (M,), from their errors (M, n).

        A snapshot is no news to itself nor to its neighbours in time: where members are ``recorded`` ones, those do
        not count, and NaN stands for what has no others.
        """
        found = self._kind.likeness.of(errors, self.errors)  # (M, R)
        if recorded is not None:
            found = found.masked_fill(self._rows.same_block[recorded][:, self.places], -torch.inf)
        closest = found.max(dim=1).values
        return closest.masked_fill(closest == -torch.inf, torch.nan)

    def likeness(self) -> float:
        """Of the references to the closest outside their own block, mean over them."""
        near = self._rows.same_block[self.places][:, self.places]
        return float(self._kind.likeness.of(self.errors, None).masked_fill(near, 0.0).max(dim=1).values.mean())

    def likeness_within_runs(self) -> float:
        """Of two references of one run outside their own block, mean over pairs; NaN where there are none."""
        run = self._rows.trajectory[self.places]
        pairs = (run[:, None] == run[None, :]) & ~self._rows.same_block[self.places][:, self.places]
        return float(self._kind.likeness.of(self.errors, None)[pairs].mean())


@dataclass(frozen=True)
class _Draw:
    """One draw of a set, or some of the reference snapshots, which belong to no set."""

    key: str
    make: Callable[[torch.Generator], WeightSet]
    num_members: int
    stage: str = "baselines"
    plan: PlannedSet | None = None
    is_first: bool = False


class SetRun:
    """Judges sets on the data of one task beside the snapshots of one store.

    Attributes:
        references: what every set's errors are compared with.
        seconds: by stage.
        pictures: where the arrays of the report are collected, if anywhere.
    """

    def __init__(
        self,
        task: Task,
        rows: SnapshotRows,
        config: EvaluateConfig,
        *,
        score: Scorer = score_sets,
        pictures: Pictures | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.task, self.rows, self.config, self.kind = task, rows, config, KINDS[task.kind]
        self.pictures = pictures
        self.references = References(rows, self.kind, config.num_members)
        self.seconds: dict[str, float] = {}
        self._score, self._on_progress = score, on_progress
        self._targets: Tensor | None = None
        self._sets: dict[str, JudgedSet] = {}

    def run(self, planned: Sequence[PlannedSet]) -> dict[str, JudgedSet]:
        """Draw and judge sets, by name."""
        self._sets = {plan.name: JudgedSet(plan, self.kind) for plan in planned}
        for draws in self._passes(planned):
            self._pass(draws)
        return self._sets

    def _passes(self, planned: Sequence[PlannedSet]) -> Iterator[list[_Draw]]:
        """All draws, the references first, in groups that memory has room for."""
        per_pass = max(1, _PASS_BYTES // (self.rows.layout.num_values * 4))
        draws = [
            _Draw(f"reference snapshots {number}", partial(_recorded, self.rows, places), len(places))
            for number, places in enumerate(torch.split(self.references.places, per_pass))
        ]
        for plan in planned:
            for number in range(plan.num_draws):
                key = f"{plan.name}/{number}" if number else plan.name
                draws.append(_Draw(key, plan.make, self.config.num_members, plan.stage, plan, number == 0))
        waiting: list[_Draw] = []
        for draw in draws:
            if waiting and sum(other.num_members for other in waiting) + draw.num_members > per_pass:
                yield waiting
                waiting = []
            waiting.append(draw)
        yield waiting

    def _pass(self, draws: list[_Draw]) -> None:
        members: dict[str, WeightSet] = {}
        for draw in draws:
            with timed(self.seconds, draw.stage):
                members[draw.key] = draw.make(rng_for(self.config.seed, draw.key))
            self.rows.check(members[draw.key], f"the store {self.rows.store.path}")
        sound = {draw.key: _finite(members[draw.key]) for draw in draws if draw.plan is not None}
        members |= {
            key: members[key].select(mask.nonzero().squeeze(1)) for key, mask in sound.items() if not mask.all()
        }
        scored = {key: weights for key, weights in members.items() if weights.num_members}
        if self.config.recalibrate:
            with timed(self.seconds, "recalibrate"):
                scored = {key: _recalibrated(self.task, weights) for key, weights in scored.items()}
        with timed(self.seconds, "score"):
            scores = self._score_held_out(scored)
            for key, mask in sound.items():
                self._drop_silent(key, mask, members, scored, scores)
            judged = {d.key: scored[d.key] for d in draws if d.plan and d.plan.is_shown and d.key in scored}
            shifted = self._score_elsewhere("shifted", judged, partial(measure_shifted, self.kind))
            strange = self._score_elsewhere("out_of_distribution", judged, lambda found: found.uncertainty)
        with timed(self.seconds, "compare"):
            for draw in draws:
                if draw.plan is None:
                    self.references.add(scores[draw.key])
                    if self.pictures is not None:
                        self.pictures.add_references(members[draw.key])
                    continue
                found, mask = self._sets[draw.plan.name], sound[draw.key]
                found.add_sound(mask)
                if draw.key not in scored:
                    continue
                found.scores.append(scores[draw.key])
                if not draw.plan.is_shown:
                    continue
                measured = self._measured(draw, members[draw.key], scores[draw.key], mask)
                figures = Figures(
                    measure(self.kind, measured),
                    {name: found[draw.key] for name, found in shifted.items()},
                    {name: _auroc(scores[draw.key].uncertainty, found[draw.key]) for name, found in strange.items()},
                )
                found.draws.append(figures)

    def _drop_silent(
        self,
        key: str,
        sound: Tensor,
        members: dict[str, WeightSet],
        scored: dict[str, WeightSet],
        scores: dict[str, Scores],
    ) -> None:
        """Take members that answered NaN out of a draw, and score those that are left anew."""
        if key not in scored or not scores[key].is_silent.any():
            return
        left = (~scores[key].is_silent).nonzero().squeeze(1)
        sound[sound.nonzero().squeeze(1)] = ~scores[key].is_silent
        members[key], scored[key] = members[key].select(left), scored[key].select(left)
        if len(left):
            scores[key] = self._score_held_out({key: scored[key]})[key]
        else:
            del scored[key]

    def _score_held_out(self, members: Mapping[str, WeightSet]) -> dict[str, Scores]:
        scores, targets = self._score(self.task, members, seed=self.config.seed, on_progress=self._on_progress)
        if self._targets is not None and not torch.equal(targets, self._targets):
            raise ConfigError("eval_loader", "another order in a second pass", "must not shuffle (shuffle=False)")
        self._targets = targets
        return scores

    def _score_elsewhere(
        self, which: str, members: Mapping[str, WeightSet], keep: Callable[[Scores], T]
    ) -> dict[str, dict[str, T]]:
        """What is kept of the scores on the task's further data, by the name of the data and by set."""
        found = {}
        for name, loader in getattr(self.task, which).items():
            data = Data(loader, f"{which}[{name!r}]", has_targets=which == "shifted")
            scores, _ = self._score(self.task, members, data, seed=self.config.seed)
            found[name] = {key: keep(of_set) for key, of_set in scores.items()}
        return found

    def _measured(self, draw: _Draw, members: WeightSet, scores: Scores, sound: Tensor) -> Measured:
        assert draw.plan is not None
        errors, recorded = self.kind.errors(scores), draw.plan.recorded
        recorded = None if recorded is None else recorded[sound]
        products = self.rows.products(members)
        near = None if recorded is None else self.rows.same_block[recorded]
        measured = Measured(
            scores,
            within=self.kind.likeness.of(errors, None),
            closest=self.references.closest(errors, recorded),
            distance=metrics.nearest_distance(self.rows.distances(products), near),
            first_half=half_mask(scores.num_items, self.config.seed),
        )
        if self.pictures is not None and draw.is_first:
            self.pictures.add_set(self.kind, draw.plan.name, members, products[0], measured)
        return measured


def _finite(weights: WeightSet) -> Tensor:
    """Which members hold neither NaN nor Inf, (M,) bool."""
    checks = [tensor.isfinite().flatten(1).all(dim=1).cpu() for tensor in weights.values()]
    return torch.stack(checks).all(dim=0) if checks else torch.ones(weights.num_members, dtype=torch.bool)


def _recorded(rows: SnapshotRows, places: Tensor, rng: torch.Generator) -> WeightSet:
    del rng
    return rows.members(places)


def _recalibrated(task: Task, weights: WeightSet) -> WeightSet:
    """The same members with BatchNorm statistics of their own, recomputed on training data."""
    assert task.train_loader is not None
    with evaluating(task) as model:
        ensemble = DiffusionEnsemble(model, weights)
        recalibrate_batchnorm(ensemble, task.train_loader)
        return WeightSet({name: tensor.cpu() for name, tensor in ensemble.weights.items()})


def _auroc(own: Tensor, strange: Tensor) -> float:
    """How well uncertainty tells strange data from the ensemble's own."""
    both = torch.cat([own, strange])
    return metrics.auroc(both, torch.arange(len(both)) >= len(own))
