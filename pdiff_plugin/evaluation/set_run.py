"""Planned sets are drawn, scored and measured in as few passes over snapshots and data as memory allows.

Members that are the same, as recorded snapshots are whichever set they are in, are made and run once.

Shapes: M members of a set, U of a pool that sets share, R reference snapshots, N usable snapshots, n items.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pdiff_plugin.config import EvaluateConfig
from pdiff_plugin.ensemble.batchnorm import recalibrate_batchnorm
from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.errors import ConfigError, DataError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.baselines import Baseline, Drawing, Key, recorded, rng_for
from pdiff_plugin.evaluation.figures import Figures, measure, measure_shifted, over_draws
from pdiff_plugin.evaluation.kind import Measured, Scores, TaskKind
from pdiff_plugin.evaluation.pictures import Pictures
from pdiff_plugin.evaluation.rows import Products, SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.scores import Scorer, View, score_sets
from pdiff_plugin.evaluation.scratch import Empty, decoded, in_memory, on_disk
from pdiff_plugin.evaluation.task import Data, Task, evaluating
from pdiff_plugin.evaluation.verdict import ScoredSet, half_mask
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import OnProgress, Progress, timed
from pdiff_plugin.snapshots.layout import Layout

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Fewer snapshots of a run do not tell what its ensemble would gain.
_MIN_OF_RUN = 4
# Members on disk in one pass over the data, at least a set (or the snapshots of all sets); what is beyond that waits
# for the next pass.
_PASS_BYTES = 2 << 30
# Share of the bound on memory up to which the members of a pass are kept in it rather than on disk.
_MEMBERS_SHARE = 1 / 4
# Snapshots run together: the outputs of a pool are in memory at once, a batch at a time.
_POOL_MEMBERS = 64


@dataclass(frozen=True, kw_only=True)
class PlannedSet:
    """A set to be drawn.

    Attributes:
        name: in the table.
        text: its name in a sentence.
        make: decides on its members.
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
    make: Callable[[torch.Generator], Drawing]
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

    def key(self, number: int) -> str:
        """Name of one of its draws, which also decides what is drawn."""
        return f"{self.name}/{number}" if number else self.name

    def check_lost(self, sound: Tensor) -> None:
        """Tell of members (M,) of a draw that are not sound.

        Raises:
            ConfigError: they are more than the set may lose.
        """
        lost = int((~sound).sum())
        if lost > self.max_lost * len(sound):
            raise ConfigError(
                self.text,
                f"{lost} of {len(sound)} with NaN or Inf",
                f"must hold such values, or answer with them, in at most {self.max_lost:.0%} of the members",
            )
        if lost:
            logger.warning("%d of %d members of %s hold NaN or Inf: left out", lost, len(sound), self.text)


def of_each_run(rows: SnapshotRows, config: EvaluateConfig) -> list[PlannedSet]:
    """Snapshots of each run by itself, to be scored only: they tell how much those of a run differ."""
    size = config.num_members // len(rows.runs)
    places = [run[evenly_spaced(len(run), size)] for run in rows.runs if min(size, len(run)) >= _MIN_OF_RUN]
    return [
        PlannedSet(
            name=f"snapshots of run {number}",
            make=partial(_at, own),
            is_random=False,
            recorded=own,
            is_shown=False,
        )
        for number, own in enumerate(places)
    ]


def _at(places: Tensor, rng: torch.Generator) -> Drawing:
    del rng
    return recorded(places)


@dataclass(frozen=True)
class JudgedSet:
    """A set that was drawn: scores and figures of each draw, and which of its members are sound, (M,).

    The seed is that of the items' halves. Members with NaN or Inf, in their weights or their answers, are left out; a
    draw of nothing else is.
    """

    plan: PlannedSet
    kind: TaskKind
    seed: int
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

    @property
    def first(self) -> int:
        """Number of the first draw that has scores."""
        return next(number for number, sound in enumerate(self.sound) if sound.any())

    def scored(self) -> ScoredSet:
        """As the verdict sees it."""
        first_half = half_mask(self.scores[0].num_items, self.seed)
        return ScoredSet(self.kind, self.plan.text, self.scores, self.plan.is_random, self._stratum(), first_half)

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


def generated(generator: WeightGenerator, num_members: int, rng: torch.Generator, **options: Any) -> Drawing:
    """Members that ``generator`` samples, with the options of :meth:`WeightGenerator.sample`."""

    def whole(empty: Empty) -> WeightSet:
        return decoded(generator, generator.sample_latents(num_members, rng=rng, **options), empty)

    return Drawing(num_members=num_members, whole=whole)


class References:
    """Snapshots, evenly spaced, whose errors are compared with those of every member.

    Attributes:
        places: of the snapshots among the N, (R,).
        errors: of those scored, (R, n).
    """

    def __init__(self, rows: SnapshotRows, kind: TaskKind, num_references: int) -> None:
        self._rows, self._kind = rows, kind
        self.places = evenly_spaced(len(rows), num_references)
        self.errors = torch.zeros(0)

    def add(self, numbers: Tensor, scores: Scores) -> None:
        """The scores of those of some ``numbers`` among the R."""
        errors = self._kind.errors(scores)
        if not len(self.errors):
            self.errors = errors.new_zeros(len(self.places), *errors.shape[1:])
        self.errors[numbers] = errors

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
class _Pool:
    """Different members that one or more sets are made of.

    Attributes:
        drawing: makes them, and perhaps others like them.
        kept: which of the drawing's members they are, (U,); None for all.
        places: of each by its key.
        plan: of the set that they were drawn for; None for recorded snapshots.
    """

    drawing: Drawing
    kept: Tensor | None
    places: Mapping[Key, int]
    plan: PlannedSet | None = None

    @property
    def stage(self) -> str:
        """Under which the seconds of making them are counted."""
        return "baselines" if self.plan is None else self.plan.stage

    @classmethod
    def of(cls, drawing: Drawing, keys: Sequence[Key], plan: PlannedSet | None = None) -> _Pool:
        first: dict[Key, int] = {}
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        kept = None if len(first) == len(keys) else torch.tensor(list(first.values()))
        return cls(drawing, kept, {key: place for place, key in enumerate(first)}, plan)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class _Draw:
    """One draw of a set."""

    plan: PlannedSet
    view: View


@dataclass
class _Pass:
    """What is made, run and dropped together.

    Attributes:
        pools: by name.
        draws: of sets, by name.
        references: numbers (r,) among the R of those in the pools of these names.
    """

    pools: dict[str, _Pool] = field(default_factory=dict)
    draws: dict[str, _Draw] = field(default_factory=dict)
    references: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_members(self) -> int:
        return sum(len(pool) for pool in self.pools.values())

    @property
    def shown(self) -> dict[str, _Draw]:
        """The draws of sets in the table."""
        return {name: draw for name, draw in self.draws.items() if draw.plan.is_shown}


@dataclass(frozen=True)
class _Found:
    """What is kept of one draw.

    Attributes:
        sound: which of its members (M,) hold and answer neither NaN nor Inf; all else is of those alone.
        scores: None where no member is sound.
        products: with the snapshots; None of a set that is not shown.
        values: at the few coordinates of the pictures.
        shifted: figures on shifted data.
        strange: uncertainty on data of no class, (n,).
    """

    sound: Tensor
    scores: Scores | None
    products: tuple[Tensor, Tensor] | None
    values: Tensor | None
    shifted: dict[str, Figures]
    strange: dict[str, Tensor]


class SetRun:
    """Judges sets on the data of one task beside the snapshots of one store.

    Attributes:
        references: what every set's errors are compared with.
        seconds: by stage.
        targets: marks of the items' targets, once they were met.
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
        self.task, self.rows, self.config, self.kind = task, rows, config, task.task_kind
        self.pictures = pictures
        self.references = References(rows, self.kind, config.num_references)
        self.seconds: dict[str, float] = {}
        self._score, self._on_progress = score, on_progress
        self.targets: Tensor | None = None
        self._drawn: dict[str, tuple[_Pool, View]] = {}

    def run(self, planned: Sequence[PlannedSet]) -> dict[str, JudgedSet]:
        """Draw and judge sets, by name."""
        found: dict[str, _Found] = {}
        passes = self._passes(planned)
        clock = time.monotonic()
        for number in range(len(passes)):
            found |= self._pass(passes[number], self._tell(passes, number, clock))
        with timed(self.seconds, "compare"):
            return {plan.name: self._judged(plan, found) for plan in planned}

    def drawn_again(self, key: str, members: Sequence[int]) -> WeightSet:
        """Some members of a draw of a set in the table, as they were scored."""
        pool, view = self._drawn[key]
        chosen = view.places[list(members)]
        chosen = chosen if pool.kept is None else pool.kept[chosen]
        # What was drawn once has used up its source of chance.
        drawing = pool.drawing if pool.plan is None else pool.plan.make(rng_for(self.config.seed, view.pool))
        weights = drawing.made(self.rows, self._empty(drawing.num_members), chosen)
        return _recalibrated(self.task, weights) if self.config.recalibrate else weights

    def _passes(self, planned: Sequence[PlannedSet]) -> list[_Pass]:
        """All draws and the references, in groups that there is room for."""
        room = max(1, _PASS_BYTES // (self.rows.layout.num_values * 4))
        passes = [_Pass()]

        def add(name: str, pool: _Pool) -> _Pass:
            if passes[-1].pools and passes[-1].num_members + len(pool) > room:
                passes.append(_Pass())
            passes[-1].pools[name] = pool
            return passes[-1]

        number_of = {place: number for number, place in enumerate(self.references.places.tolist())}
        for count, places in enumerate(self._recorded(planned, room), start=1):
            name = f"recorded snapshots {count}"
            drawing = recorded(places)
            numbers = [number_of[place] for place in places.tolist() if place in number_of]
            home = add(name, _Pool.of(drawing, drawing.keys or ()))
            home.references[name] = torch.tensor(numbers, dtype=torch.int64)
        for plan in planned:
            for number in range(plan.num_draws):
                name = plan.key(number)
                drawing = plan.make(rng_for(self.config.seed, name))
                keys = drawing.keys or [(name, member) for member in range(drawing.num_members)]
                having = (
                    (each, key) for each in passes for key, pool in each.pools.items() if pool.places.keys() >= {*keys}
                )
                home, pool_name = next(having, None) or (add(name, _Pool.of(drawing, keys, plan)), name)
                places = torch.tensor([home.pools[pool_name].places[key] for key in keys])
                home.draws[name] = _Draw(plan, View(pool_name, places))
                if plan.is_shown:
                    self._drawn[name] = home.pools[pool_name], home.draws[name].view
        return passes

    def _recorded(self, planned: Sequence[PlannedSet], room: int) -> list[Tensor]:
        """Places of the recorded snapshots that are run together; sets of them are whole in the last, and lead it.

        What holds references only is read without all other snapshots.
        """
        # Those of sets in the table before those that are scored only.
        of_sets = [plan.recorded for plan in sorted(planned, key=lambda plan: not plan.is_shown)]
        places = dict.fromkeys(place for own in of_sets if own is not None for place in own.tolist())
        first = torch.tensor(list(places), dtype=torch.int64)
        rest = self.references.places[~torch.isin(self.references.places, first)]
        size = max(1, min(room, _POOL_MEMBERS))
        num_full = max(0, -(-(len(first) + len(rest) - size) // size))
        start = max(0, len(rest) - num_full * size)
        return [*torch.split(rest[start:], size)[:num_full], torch.cat([first, rest[:start]])]

    def _pass(self, work: _Pass, on_progress: OnProgress | None) -> dict[str, _Found]:
        members, products = self._made(work)
        values = {name: self.pictures.values(weights) for name, weights in members.items()} if self.pictures else {}
        members, views, sound = self._without_lost(work, members)
        if self.config.recalibrate:
            with timed(self.seconds, "recalibrate"):
                members = {name: _recalibrated(self.task, weights) for name, weights in members.items()}
        own = {f"reference {name}": self._reference_view(work, name) for name in work.references}
        with timed(self.seconds, "score"):
            scores = self._score_held_out(members, views | own, on_progress)
            self._drop_silent(members, views, scores, sound)
            for name, draw in work.draws.items():
                draw.plan.check_lost(sound[name])
            shown = {name: view for name, view in views.items() if name in work.shown}
            shifted = self._score_elsewhere("shifted", members, shown, partial(measure_shifted, self.kind))
            strange = self._score_elsewhere("out_of_distribution", members, shown, lambda found: found.uncertainty)
        for name, numbers in work.references.items():
            self.references.add(numbers, scores[f"reference {name}"])
            if self.pictures is not None:
                self.pictures.add_references(numbers, values[name][own[f"reference {name}"].places])
        return {
            name: _Found(
                sound[name],
                scores.get(name),
                (products[name].cross[sound[name]], products[name].squares[sound[name]]) if name in products else None,
                values[draw.view.pool][draw.view.places[sound[name]]] if values else None,
                {data: found[name] for data, found in shifted.items() if name in found},
                {data: found[name] for data, found in strange.items() if name in found},
            )
            for name, draw in work.draws.items()
        }

    def _without_lost(
        self, work: _Pass, members: Mapping[str, WeightSet]
    ) -> tuple[dict[str, WeightSet], dict[str, View], dict[str, Tensor]]:
        """Members without NaN or Inf by pool, the views of them that are left, and which they were of each draw."""
        left, views, sound = dict(members), {}, {}
        # Snapshots are finite: others were left out when they were measured.
        finite = {name: _finite(members[name]) for name, pool in work.pools.items() if pool.plan is not None}
        for name, mask in finite.items():
            if not mask.any():
                del left[name]
            elif not mask.all():
                left[name] = self._select(members[name], mask.nonzero().squeeze(1))
        for name, draw in work.draws.items():
            pool, places = draw.view.pool, draw.view.places
            sound[name] = finite[pool][places] if pool in finite else torch.ones(len(places), dtype=torch.bool)
            if sound[name].any():
                moved = finite[pool].cumsum(dim=0)[places[sound[name]]] - 1 if pool in finite else places
                views[name] = View(pool, moved)
        return left, views, sound

    def _drop_silent(
        self,
        members: Mapping[str, WeightSet],
        views: dict[str, View],
        scores: dict[str, Scores],
        sound: Mapping[str, Tensor],
    ) -> None:
        """Take members that answered NaN out of the draws, and score those that are left anew."""
        anew: dict[str, WeightSet] = {}
        for name, view in list(views.items()):
            is_silent = scores[name].is_silent
            if not is_silent.any():
                continue
            sound[name][sound[name].nonzero().squeeze(1)] = ~is_silent
            del views[name], scores[name]
            if not is_silent.all():
                views[name] = View(view.pool, view.places[~is_silent])
                anew[name] = self._select(members[view.pool], views[name].places)
        if anew:
            scores |= self._score_held_out(anew)

    def _select(self, members: WeightSet, places: Tensor) -> WeightSet:
        """A copy of some members, one by one: there may be no room for all of them in memory."""
        floats = {name: tensor for name, tensor in members.member(0).items() if tensor.is_floating_point()}
        made = self._empty(len(places))(Layout.from_tensors(floats), len(places))
        for name, tensor in made.items():
            for number, place in enumerate(places.tolist()):
                tensor[number] = members[name][place]
        return WeightSet({name: made[name] if name in made else members[name][places] for name in members})

    def _empty(self, num_members: int) -> Empty:
        """Where so many members are kept."""
        size_bytes = num_members * self.rows.layout.num_values * 4
        return in_memory if size_bytes <= _MEMBERS_SHARE * self.config.memory_gb * 1e9 else on_disk

    def _reference_view(self, work: _Pass, name: str) -> View:
        places = self.references.places[work.references[name]].tolist()
        return View(name, torch.tensor([work.pools[name].places["recorded", place] for place in places]))

    def _made(self, work: _Pass) -> tuple[dict[str, WeightSet], dict[str, Products]]:
        """The pools' members, and what the sets among them have in common with the snapshots."""
        empty, shown = self._empty(work.num_members), work.shown
        if not shown and all(pool.plan is None for pool in work.pools.values()):
            return {name: pool.drawing.made(self.rows, empty) for name, pool in work.pools.items()}, {}
        members, by_block = {}, {}
        for name, pool in work.pools.items():
            with timed(self.seconds, pool.stage):
                if pool.drawing.of_block is None:
                    members[name] = pool.drawing.made(self.rows, empty, pool.kept)
                    self.rows.check(members[name], f"the store {self.rows.store.path}")
                else:
                    by_block[name] = pool.drawing.of_block
                    members[name] = WeightSet(empty(self.rows.layout, len(pool)))
        products = {name: Products(len(draw.view.places), len(self.rows)) for name, draw in shown.items()}
        for block in self.rows.blocks():
            for name, of_block in by_block.items():
                pool = work.pools[name]
                with timed(self.seconds, pool.stage):
                    made = of_block(block)
                    block.of(members[name])[:] = made if pool.kept is None else made[pool.kept]
            with timed(self.seconds, "compare"):
                columns = {name: block.of(members[name]) for name in {d.view.pool for d in shown.values()}}
                if self.pictures is not None:
                    self.pictures.see(block)
                for name, draw in shown.items():
                    products[name].add(block, columns[draw.view.pool][draw.view.places])
        if self.pictures is not None:
            self.pictures.end()
        return members, products

    def _score_held_out(
        self,
        members: Mapping[str, WeightSet],
        views: Mapping[str, View] | None = None,
        on_progress: OnProgress | None = None,
    ) -> dict[str, Scores]:
        if not members:
            return {}
        scores, targets = self._score(self.task, members, views=views, seed=self.config.seed, on_progress=on_progress)
        if self.targets is not None and not torch.equal(targets, self.targets):
            raise DataError("eval_loader", "another order in a second pass", "must not shuffle (shuffle=False)")
        self.targets = targets
        return scores

    def _score_elsewhere(
        self, which: str, members: Mapping[str, WeightSet], views: Mapping[str, View], keep: Callable[[Scores], T]
    ) -> dict[str, dict[str, T]]:
        """What is kept of the scores on the task's further data, by the name of the data and by set."""
        # Snapshots that are references only, or of sets that are not shown, come last in their pool.
        used: dict[str, int] = {}
        for view in views.values():
            used[view.pool] = max(used.get(view.pool, 0), int(view.places.max()) + 1)
        pools = {key: WeightSet({name: t[:num] for name, t in members[key].items()}) for key, num in used.items()}
        found: dict[str, dict[str, T]] = {}
        for name, loader in getattr(self.task, which).items() if pools else ():
            data = Data(loader, f"{which}[{name!r}]", has_targets=which == "shifted")
            scores, _ = self._score(self.task, pools, data, views=views, seed=self.config.seed)
            found[name] = {key: keep(of_set) for key, of_set in scores.items()}
        return found

    def _judged(self, plan: PlannedSet, found: Mapping[str, _Found]) -> JudgedSet:
        judged = JudgedSet(plan, self.kind, self.config.seed)
        for number in range(plan.num_draws):
            of_draw = found[plan.key(number)]
            judged.sound.append(of_draw.sound)
            if of_draw.scores is None:
                continue
            if plan.is_shown:
                judged.draws.append(self._figures(plan, of_draw, of_draw.scores, is_first=not judged.scores))
            judged.scores.append(of_draw.scores)
        return judged

    def _figures(self, plan: PlannedSet, found: _Found, scores: Scores, *, is_first: bool) -> Figures:
        assert found.products is not None
        errors = self.kind.errors(scores)
        recorded = None if plan.recorded is None else plan.recorded[found.sound]
        near = None if recorded is None else self.rows.same_block[recorded]
        measured = Measured(
            scores,
            within=self.kind.likeness.of(errors, None),
            closest=self.references.closest(errors, recorded),
            distance=metrics.nearest_distance(self.rows.distances(found.products), near),
            first_half=half_mask(scores.num_items, self.config.seed),
        )
        if self.pictures is not None and is_first:
            assert found.values is not None
            self.pictures.add_set(self.kind, plan.name, found.values, found.products[0], measured)
        strange = {data: _auroc(scores.uncertainty, uncertainty) for data, uncertainty in found.strange.items()}
        return Figures(measure(self.kind, measured), found.shifted, strange)

    def _tell(self, passes: Sequence[_Pass], number: int, started: float) -> OnProgress | None:
        """Progress of one pass as that of all, saying which members are run and how long the rest will take."""
        tell = self._on_progress
        if tell is None:
            return None
        names = [name for each in passes for name in each.pools]
        pools_before = sum(len(each.pools) for each in passes[:number])
        before, own, everyone = (
            sum(each.num_members for each in some) for some in (passes[:number], passes[number : number + 1], passes)
        )

        def show(report: Progress) -> None:
            rounds = report.total_steps / len(passes[number].pools)
            done = (before + own * report.step / report.total_steps) / everyone
            left = (time.monotonic() - started) * (1 / done - 1)
            text = f"{report.text} {names.index(report.text) + 1}/{len(names)}, " if report.text else ""
            text += f"about {left:.0f} s left" if left < 90 else f"about {left / 60:.0f} min left"
            steps = round(rounds * pools_before) + report.step, round(rounds * len(names))
            tell(Progress(report.stage, *steps, text=text))

        return show


def _finite(weights: WeightSet) -> Tensor:
    """Which members hold neither NaN nor Inf, (M,) bool."""
    checks = [torch.stack([member.isfinite().all() for member in tensor]).cpu() for tensor in weights.values()]
    return torch.stack(checks).all(dim=0) if checks else torch.ones(weights.num_members, dtype=torch.bool)


def _recalibrated(task: Task, weights: WeightSet) -> WeightSet:
    """The same members with BatchNorm statistics of their own, recomputed on training data."""
    assert task.train_loader is not None
    with evaluating(task) as model:
        ensemble = DiffusionEnsemble(model, weights, copy=False)
        recalibrate_batchnorm(ensemble, task.train_loader)
        return WeightSet({name: tensor.cpu() for name, tensor in ensemble.weights.items()})


def _auroc(own: Tensor, strange: Tensor) -> float:
    """How well uncertainty tells strange data from the ensemble's own."""
    both = torch.cat([own, strange])
    return metrics.auroc(both, torch.arange(len(both)) >= len(own))
