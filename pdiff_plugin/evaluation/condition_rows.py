"""What is compared at a condition: generated weights, what others would do, and what training there gives.

A *row* is one way of having weights for a condition. One more cheap row that mixes what was recorded is one more entry
of ``CENTRES``; any other one is an entry of :data:`ROWS` and a line in :class:`RowMaker`.

Shapes: C judged conditions, R fitted ones, F features, K latent width, M members.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from pdiff_plugin.config import EvaluateConditionsConfig
from pdiff_plugin.evaluation.baselines import Look, rng_for
from pdiff_plugin.evaluation.condition_places import Place, key_of
from pdiff_plugin.evaluation.condition_task import MakeRow, Train
from pdiff_plugin.evaluation.condition_training import Trainer, can_recalibrate, recalibrated
from pdiff_plugin.evaluation.condition_weights import (
    Recorded,
    averaged,
    encoded,
    mean_row,
    recorded_members,
    some_usable,
)
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.centre_stage import fit_centre
from pdiff_plugin.generator.centres import CENTRES
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.store import SnapshotStore

T = TypeVar("T")

# What a row is for: what training there gives; what is judged; a generator that was told another condition; mixtures of
# what was recorded; the most that any generator of this span can give; other ways to do without; a few steps there.
Role = Literal["trained", "generated", "control", "cheap", "ceiling", "other", "tuned"]

TRAINED, GENERATED, SHUFFLED = "trained", "generated", "shuffled"
AVERAGE, CEILING, BASE, BASE_BN, JOINT = "average of all", "span ceiling", "base", "base, BN", "joint"
GENERATED_AVERAGE, NETWORK, TWO_NEAREST = "generated average", "network", "2 nearest"


@dataclass(frozen=True)
class RowSpec:
    """How a row is called and shown.

    Attributes:
        text: its name in a sentence.
        role: what it is for.
        look: in pictures.
    """

    text: str
    role: Role
    look: Look


ROWS = {
    TRAINED: RowSpec("training at the condition itself", "trained", Look("#000000", "o", "--")),
    "trained average": RowSpec("the average of the snapshots there", "trained", Look("#000000", "s", (0, (1, 3)))),
    GENERATED: RowSpec("generated members", "generated", Look("#D55E00", "*")),
    GENERATED_AVERAGE: RowSpec("the average of generated members", "generated", Look("#D55E00", "s", (0, (4, 2)))),
    SHUFFLED: RowSpec("members generated for another condition", "control", Look("#777777", "X", (0, (1, 1)))),
    "nearest": RowSpec("the nearest condition", "cheap", Look("#56B4E9", "v")),
    TWO_NEAREST: RowSpec("the mean of the two nearest conditions", "cheap", Look("#56B4E9", "p", (0, (4, 1)))),
    "neighbours": RowSpec("the mean of the nearest conditions", "cheap", Look("#0072B2", "^", (0, (4, 1, 1, 1)))),
    "ridge": RowSpec("ridge regression", "cheap", Look("#009E73", "D", (0, (4, 2)))),
    "gp": RowSpec("a Gaussian process", "cheap", Look("#009E73", "P")),
    NETWORK: RowSpec("a small network's regression", "cheap", Look("#CC79A7", "d")),
    AVERAGE: RowSpec("the average of all conditions", "cheap", Look("#0072B2", "s", (0, (1, 1)))),
    CEILING: RowSpec("the condition's own weights in the span of the others", "ceiling", Look("#E69F00", "h", "-.")),
    BASE: RowSpec("the model as the task has it", "other", Look("#7F6000", "<", (0, (1, 3)))),
    BASE_BN: RowSpec(
        "the model with its BatchNorm statistics recomputed there", "other", Look("#7F6000", ">", (0, (6, 2)))
    ),
    JOINT: RowSpec("one joint model for all conditions", "other", Look("#7F6000", "8", "-.")),
}  # fmt: skip
"""Every row, in the order of the table; those of a user and a few steps of training come after them."""
# Row -> kind of centre whose weights mix it.
_MIXED = {
    AVERAGE: "mean",
    "nearest": "nearest",
    TWO_NEAREST: "neighbours",
    "neighbours": "neighbours",
    "ridge": "ridge",
    "gp": "gp",
}
# Settings that are not left to the recorded conditions: leaving one of few out says little of a gap half as wide.
_FIXED: dict[str, dict[str, float]] = {TWO_NEAREST: {"k": 2}}
# A few steps of training start from each of these.
_STARTS = {"average": AVERAGE, "nearest": "nearest", "generated": GENERATED_AVERAGE}


def tuned_name(start: str, num_steps: int) -> str:
    return f"{start} + {num_steps} steps"


def spec_of(name: str) -> RowSpec:
    """How a row is called and shown; a user's own are called by their name."""
    if name in ROWS:
        return ROWS[name]
    start, plus, steps = name.partition(" + ")
    if plus and start in _STARTS and steps.endswith(" steps"):
        return RowSpec(f"{steps} of training from {ROWS[_STARTS[start]].text}", "tuned", Look("#777777", "."))
    return RowSpec(name, "other", Look("#CC79A7", "X", (0, (6, 2))))


@dataclass(frozen=True)
class Made:
    """Weights for one condition.

    Attributes:
        weights: members to put into the task's model.
        task: instead of them, one whose own model is judged as it is.
        seconds: that it took to make them, of what is not shared by all conditions.
        run: of several that were recorded at the condition, the number of the one that it is of.
    """

    weights: WeightSet | None = None
    task: Task | None = None
    seconds: float = 0.0
    run: int = 0


class RowMaker:
    """Makes every row of one condition at a time.

    Attributes:
        settings: of the rows that have some.
        seconds_once: spent for all conditions together: joint training, the network's regression.
    """

    def __init__(
        self,
        store: SnapshotStore,
        generator: WeightGenerator,
        recorded: Recorded,
        places: Sequence[Place],
        config: EvaluateConditionsConfig,
        train: Train | None,
        extra: Mapping[str, MakeRow],
    ) -> None:
        assert generator.variables is not None
        self.store, self.generator, self.recorded, self.places = store, generator, recorded, places
        self.config, self.extra = config, extra
        self.trainer = Trainer(train, config.seed) if train is not None else None
        self.features = generator.variables.encode([place.condition for place in places])  # (C, F)
        self.settings = {
            row: _FIXED.get(row) or fit_centre(kind, recorded.features, recorded.latents).settings
            for row, kind in _MIXED.items()
        }
        self.mixtures = {
            row: CENTRES[kind].weights(self.features, recorded.features, **self.settings[row])
            for row, kind in _MIXED.items()
        }
        self.expected, seconds = _clocked(  # (C, K)
            lambda: fit_centre(NETWORK, recorded.features, recorded.latents, config.seed)(self.features)
        )
        self.seconds_once = {NETWORK: seconds}
        self.partners = partners(places, config.seed)
        self._joint: nn.Module | None = None

    def train_joint(self, task: Task) -> tuple[float, int]:
        """Train the joint model, from that of ``task``; seconds and steps that it took, none where it is not wanted."""
        if self.trainer is None or not self.config.joint_steps:
            return 0.0, 0
        trained, seconds = self.trainer.trained(task, None, self.recorded.conditions, self.config.joint_steps)
        self._joint, self.seconds_once[JOINT] = trained.model, seconds
        return seconds, self.config.joint_steps

    def rows(self, number: int, task: Task) -> Iterator[tuple[str, Made]]:
        """All rows at one of the conditions, one after the other."""
        place = self.places[number]
        yield from self._recorded(place)
        made: dict[str, WeightSet] = {}
        for name, one in self._made_of_others(number):
            assert one.weights is not None
            made[name] = one.weights
            yield name, one
        yield from self._of_the_model(task)
        if self.trainer is not None:
            starts = {start: made[row].member(0) for start, row in _STARTS.items()}
            yield from self._tuned(number, task, starts)
        for name, make in self.extra.items():
            found, seconds = _clocked(partial(make, dict(place.condition)))
            if isinstance(found, Task):
                yield name, Made(task=found, seconds=seconds)
            else:
                weights = found if isinstance(found, WeightSet) else WeightSet.from_members([found])
                yield name, Made(weights, seconds=seconds)

    def _recorded(self, place: Place) -> Iterator[tuple[str, Made]]:
        """What was recorded at the condition, of each of its runs."""
        for number, run in enumerate(place.runs):
            places = some_usable(self.store, run)
            yield TRAINED, Made(recorded_members(self.store, places, self.config.num_members), run=number)
            mean = mean_row(self.store, places)[None]  # (1, D)
            one = Recorded(self.store.layout, [place.condition], self.features[:0], mean, mean)
            yield "trained average", Made(one.mixed(torch.ones(1, 1, dtype=torch.float64)), run=number)
            yield CEILING, Made(self.generator.decode(encoded(self.generator, mean)), run=number)

    def _made_of_others(self, number: int) -> Iterator[tuple[str, Made]]:
        generated, seconds = _clocked(lambda: self._sampled(number, number))
        yield GENERATED, Made(generated, seconds=seconds)
        yield GENERATED_AVERAGE, Made(averaged(generated), seconds=seconds)
        if (partner := self.partners[number]) is not None:
            yield SHUFFLED, Made(self._sampled(number, partner), seconds=seconds)
        for row, weights in self.mixtures.items():
            mixed, seconds = _clocked(partial(self.recorded.mixed, weights[number : number + 1]))
            yield row, Made(mixed, seconds=seconds)
        decoded, seconds = _clocked(lambda: self.generator.decode(self.expected[number : number + 1]))
        yield NETWORK, Made(decoded, seconds=seconds)

    def _sampled(self, number: int, asked: int) -> WeightSet:
        """Members for the condition ``asked``, with the noise of condition ``number``."""
        return self.generator.sample(
            self.config.num_members,
            condition=self.places[asked].condition,
            extrapolate=True,
            rng=rng_for(self.config.seed, f"{GENERATED}/{key_of(self.places[number].condition)}"),
        )

    def _of_the_model(self, task: Task) -> Iterator[tuple[str, Made]]:
        own = named_tensors(task.model)
        yield BASE, Made(WeightSet({name: own[name].detach().cpu()[None] for name in self.recorded.layout.names}))
        if can_recalibrate(task):
            found, seconds = _clocked(lambda: recalibrated(task))
            yield BASE_BN, Made(task=found, seconds=seconds)

    def _tuned(self, number: int, task: Task, starts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Made]]:
        assert self.trainer is not None
        if self._joint is not None:
            yield JOINT, Made(task=replace(task, model=self._joint))
        condition = dict(self.places[number].condition)
        for start, weights in starts.items():
            for steps in self.config.fine_tune_steps:
                found, seconds = self.trainer.trained(task, weights, [condition], steps)
                yield tuned_name(start, steps), Made(task=found, seconds=seconds)


def partners(places: Sequence[Place], seed: int) -> list[int | None]:
    """For each place another one, none for two: among those inside the fitted range, or among those outside.

    None where there is no other.
    """
    found: list[int | None] = [None] * len(places)
    rng = torch.Generator().manual_seed(seed)
    for is_outside in (False, True):
        mine = [number for number, place in enumerate(places) if bool(place.outside) == is_outside]
        if len(mine) > 1:
            order = [mine[number] for number in torch.randperm(len(mine), generator=rng).tolist()]
            for number, other in zip(order, [*order[1:], order[0]], strict=True):
                found[number] = other
    return found


def _clocked(make: Callable[[], T]) -> tuple[T, float]:
    """What is made, and the seconds that it took."""
    started = time.perf_counter()
    made = make()
    return made, time.perf_counter() - started
