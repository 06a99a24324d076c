"""Planned sets are drawn, scored and measured in as few passes over snapshots and data as memory allows.

Members that are the same, as recorded snapshots are whichever set they are in, are made and run once.

Shapes: M members of a set, U of a pool that sets share, R reference snapshots, N usable snapshots, n items.
"""

from __future__ import annotations

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
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation import metrics
from pdiff_plugin.evaluation.baselines import Baseline, Drawing, Key, recorded, rng_for
from pdiff_plugin.evaluation.figures import Figures, measure, measure_shifted, over_draws
from pdiff_plugin.evaluation.kind import Measured, Scores, TaskKind
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.pictures import Pictures
from pdiff_plugin.evaluation.rows import Products, SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.scores import Scorer, View, score_sets
from pdiff_plugin.evaluation.scratch import Empty, decoded, in_memory, on_disk
from pdiff_plugin.evaluation.task import Data, Task, evaluating
from pdiff_plugin.evaluation.verdict import ScoredSet, half_mask
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.progress import OnProgress, Progress, timed

T = TypeVar("T")

# Members on disk in one pass over the data, at least a set; what is beyond that waits for the next pass.
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
    """

    name: str
    text: str = ""
    make: Callable[[torch.Generator], Drawing]
    num_draws: int = 1
    is_random: bool = True
    recorded: Tensor | None = None
    strata: Callable[[int], Tensor] | None = None
    stage: str = "baselines"

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


@dataclass(frozen=True)
class JudgedSet:
    """A set that was drawn: scores and figures of each draw."""

    plan: PlannedSet
    kind: TaskKind
    scores: list[Scores] = field(default_factory=list)
    draws: list[Figures] = field(default_factory=list)

    @property
    def figures(self) -> Figures:
        """Means over the draws."""
        return over_draws(self.kind, self.draws)

    def scored(self) -> ScoredSet:
        """As the verdict sees it."""
        stratum = self.plan.strata and self.plan.strata(len(self.scores[0].member_loss))
        return ScoredSet(self.kind, self.plan.text, self.scores, self.plan.is_random, stratum)


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


@dataclass(frozen=True)
class _Pool:
    """Different members that one or more sets are made of.

    Attributes:
        drawing: makes them, and perhaps others like them.
        kept: which of the drawing's members they are, (U,); None for all.
        places: of each by its key.
        stage: under which the seconds of making them are counted.
    """

    drawing: Drawing
    kept: Tensor | None
    places: Mapping[Key, int]
    stage: str = "baselines"

    @property
    def recorded(self) -> Tensor:
        """Places among the N of the snapshots of a pool of snapshots."""
        return torch.tensor([key[1] for key in self.places])

    @classmethod
    def of(cls, drawing: Drawing, keys: Sequence[Key], stage: str = "baselines") -> _Pool:
        first: dict[Key, int] = {}
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        kept = None if len(first) == len(keys) else torch.tensor(list(first.values()))
        return cls(drawing, kept, {key: place for place, key in enumerate(first)}, stage)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class _Draw:
    """One draw of a set."""

    plan: PlannedSet
    view: View
    is_first: bool


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


@dataclass(frozen=True)
class _Found:
    """What is kept of one draw."""

    scores: Scores
    products: Products
    values: Tensor | None
    shifted: dict[str, Figures]
    strange: dict[str, Tensor]


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
        self.references = References(rows, self.kind, config.num_references)
        self.seconds: dict[str, float] = {}
        self._score, self._on_progress = score, on_progress
        self._targets: Tensor | None = None

    def run(self, planned: Sequence[PlannedSet]) -> dict[str, JudgedSet]:
        """Draw and judge sets, by name."""
        found: dict[str, _Found] = {}
        passes = self._passes(planned)
        clock = time.monotonic()
        for number in range(len(passes)):
            found |= self._pass(passes[number], self._tell(passes, number, clock))
        with timed(self.seconds, "compare"):
            return {plan.name: self._judged(plan, passes, found) for plan in planned}

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
                name = f"{plan.name}/{number}" if number else plan.name
                drawing = plan.make(rng_for(self.config.seed, name))
                keys = drawing.keys or [(name, member) for member in range(drawing.num_members)]
                having = (
                    (each, key) for each in passes for key, pool in each.pools.items() if pool.places.keys() >= {*keys}
                )
                home, pool_name = next(having, None) or (add(name, _Pool.of(drawing, keys, plan.stage)), name)
                places = torch.tensor([home.pools[pool_name].places[key] for key in keys])
                home.draws[name] = _Draw(plan, View(pool_name, places), number == 0)
        return passes

    def _recorded(self, planned: Sequence[PlannedSet], room: int) -> list[Tensor]:
        """Places of the recorded snapshots that are run together; sets of them are whole in the last, and lead it.

        What holds references only is read without all other snapshots.
        """
        of_sets = [plan.recorded for plan in planned if plan.recorded is not None]
        first = torch.tensor(sorted({place for places in of_sets for place in places.tolist()}), dtype=torch.int64)
        rest = self.references.places[~torch.isin(self.references.places, first)]
        size = max(1, min(room, _POOL_MEMBERS))
        num_full = max(0, -(-(len(first) + len(rest) - size) // size))
        start = max(0, len(rest) - num_full * size)
        return [*torch.split(rest[start:], size)[:num_full], torch.cat([first, rest[:start]])]

    def _pass(self, work: _Pass, on_progress: OnProgress | None) -> dict[str, _Found]:
        members, products = self._made(work)
        values = {name: self.pictures.values(weights) for name, weights in members.items()} if self.pictures else {}
        if self.config.recalibrate:
            with timed(self.seconds, "recalibrate"):
                members = {name: _recalibrated(self.task, weights) for name, weights in members.items()}
        views = {name: draw.view for name, draw in work.draws.items()}
        own = {f"reference {name}": self._reference_view(work, name) for name in work.references}
        with timed(self.seconds, "score"):
            scores = self._score_held_out(members, views | own, on_progress)
            shifted = self._score_elsewhere("shifted", members, views, partial(measure_shifted, self.kind))
            strange = self._score_elsewhere("out_of_distribution", members, views, lambda found: found.uncertainty)
        for name, numbers in work.references.items():
            self.references.add(numbers, scores[f"reference {name}"])
            if self.pictures is not None:
                self.pictures.add_references(numbers, values[name][own[f"reference {name}"].places])
        return {
            name: _Found(
                scores[name],
                products[name],
                values[view.pool][view.places] if values else None,
                {data: found[name] for data, found in shifted.items()},
                {data: found[name] for data, found in strange.items()},
            )
            for name, view in views.items()
        }

    def _reference_view(self, work: _Pass, name: str) -> View:
        places = self.references.places[work.references[name]].tolist()
        return View(name, torch.tensor([work.pools[name].places["recorded", place] for place in places]))

    def _made(self, work: _Pass) -> tuple[dict[str, WeightSet], dict[str, Products]]:
        """The pools' members, and what the sets among them have in common with the snapshots."""
        size_bytes = work.num_members * self.rows.layout.num_values * 4
        empty = in_memory if size_bytes <= _MEMBERS_SHARE * self.config.memory_gb * 1e9 else on_disk
        if not work.draws:
            return {name: self.rows.members(pool.recorded, empty) for name, pool in work.pools.items()}, {}
        members, by_block = {}, {}
        for name, pool in work.pools.items():
            with timed(self.seconds, pool.stage):
                if pool.drawing.of_block is None:
                    members[name] = pool.drawing.made(self.rows, empty)
                    self.rows.check(members[name], f"the store {self.rows.store.path}")
                else:
                    by_block[name] = pool.drawing.of_block
                    members[name] = WeightSet(empty(self.rows.layout, len(pool)))
        products = {name: Products(len(draw.view.places), len(self.rows)) for name, draw in work.draws.items()}
        for block in self.rows.blocks():
            for name, of_block in by_block.items():
                pool = work.pools[name]
                with timed(self.seconds, pool.stage):
                    made = of_block(block)
                    block.of(members[name])[:] = made if pool.kept is None else made[pool.kept]
            with timed(self.seconds, "compare"):
                columns = {name: block.of(members[name]) for name in {d.view.pool for d in work.draws.values()}}
                if self.pictures is not None:
                    self.pictures.see(block)
                for name, draw in work.draws.items():
                    products[name].add(block, columns[draw.view.pool][draw.view.places])
        if self.pictures is not None:
            self.pictures.end()
        return members, products

    def _score_held_out(
        self, members: Mapping[str, WeightSet], views: Mapping[str, View], on_progress: OnProgress | None
    ) -> dict[str, Scores]:
        scores, targets = self._score(self.task, members, views=views, seed=self.config.seed, on_progress=on_progress)
        if self._targets is not None and not torch.equal(targets, self._targets):
            raise ConfigError("eval_loader", "another order in a second pass", "must not shuffle (shuffle=False)")
        self._targets = targets
        return scores

    def _score_elsewhere(
        self, which: str, members: Mapping[str, WeightSet], views: Mapping[str, View], keep: Callable[[Scores], T]
    ) -> dict[str, dict[str, T]]:
        """What is kept of the scores on the task's further data, by the name of the data and by set."""
        # Snapshots that are references only come last in their pool.
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

    def _judged(self, plan: PlannedSet, passes: Sequence[_Pass], found: Mapping[str, _Found]) -> JudgedSet:
        draws = {name: draw for each in passes for name, draw in each.draws.items()}
        judged = JudgedSet(plan, self.kind)
        for number in range(plan.num_draws):
            name = f"{plan.name}/{number}" if number else plan.name
            of_draw = found[name]
            strange = {
                data: _auroc(of_draw.scores.uncertainty, uncertainty) for data, uncertainty in of_draw.strange.items()
            }
            judged.scores.append(of_draw.scores)
            judged.draws.append(
                Figures(measure(self.kind, self._measured(draws[name], of_draw)), of_draw.shifted, strange)
            )
        return judged

    def _measured(self, draw: _Draw, found: _Found) -> Measured:
        errors, recorded = self.kind.errors(found.scores), draw.plan.recorded
        near = None if recorded is None else self.rows.same_block[recorded]
        products = found.products.cross, found.products.squares
        measured = Measured(
            found.scores,
            within=self.kind.likeness.of(errors, None),
            closest=self.references.closest(errors, recorded),
            distance=metrics.nearest_distance(self.rows.distances(products), near),
            first_half=half_mask(found.scores.num_items, self.config.seed),
        )
        if self.pictures is not None and draw.is_first:
            assert found.values is not None
            self.pictures.add_set(self.kind, draw.plan.name, found.values, products[0], measured)
        return measured

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
