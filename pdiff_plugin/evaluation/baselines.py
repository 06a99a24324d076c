"""The baselines that a generator has to beat, drawn from the same snapshots at no cost.

A *set* is a number of members that are judged together; a *baseline* is a way of making one from the snapshots alone.
One more baseline is one more entry of :data:`BASELINES`, from which tables, verdict, pictures and sweep take it.

Running variances are drawn as logarithms wherever something is added to them, so that none falls to zero or below.

Shapes: N snapshots, M members, b columns in a block, k snapshots in an average, r low-rank directions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.evaluation.rows import Block, SnapshotRows, evenly_spaced
from pdiff_plugin.evaluation.scratch import Empty, in_memory
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.statistics import LOG_SUFFIX, inverse_transform, transform

# What a member is made of: what is done, and with what.
Key = tuple[str, Any]

# Values that noise is added to at a time.
_NOISE_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Members that are decided on but not made: as many sets as there is room for are then made in one pass.

    Attributes:
        num_members: M.
        of_block: makes some columns of all members, (M, b), from those of all snapshots, called in order of columns.
        whole: makes all members at once, in the memory that it is given, where they do not come by columns.
        recorded: places (M,) of the snapshots that the members are, where they are such.
        keys: of each member; those of equal keys are equal, in other drawings too. None where all differ.
    """

    num_members: int
    of_block: Callable[[Block], Tensor] | None = None
    whole: Callable[[Empty], WeightSet] | None = None
    recorded: Tensor | None = None
    keys: Sequence[Key] | None = None

    def made(self, rows: SnapshotRows, empty: Empty = in_memory, chosen: Tensor | None = None) -> WeightSet:
        """The members, or some that are ``chosen``, made alone."""
        if self.recorded is not None:
            return rows.members(self.recorded if chosen is None else self.recorded[chosen], empty)
        if self.whole is not None:
            members = self.whole(empty)
            return members if chosen is None else members.select(chosen)
        assert self.of_block is not None
        num_members = self.num_members if chosen is None else len(chosen)
        tensors = empty(rows.layout, num_members)
        for block in rows.blocks():
            made = self.of_block(block)
            tensors[block.name].view(num_members, -1)[:, block.place] = made if chosen is None else made[chosen]
        return WeightSet(tensors)


# Decides on a set of about M members from the snapshots: (rows, num_members, rng), and the knob where there is one.
Draw = Callable[..., Drawing]


def rng_for(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each set, so that a set's members do not depend on which others are drawn."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def every_nth(rows: SnapshotRows, num_members: int) -> Tensor:
    """Places of M recorded snapshots, evenly spaced over the store; of all of them if there are fewer."""
    return evenly_spaced(len(rows), num_members)


def last_of_each_run(rows: SnapshotRows, num_members: int) -> Tensor:
    """Place of the last snapshot of each run: what a user without any of this would keep."""
    del num_members
    return torch.stack([run[-1] for run in rows.runs])


def _at(
    places: Callable[[SnapshotRows, int], Tensor], rows: SnapshotRows, num_members: int, rng: torch.Generator
) -> Drawing:
    """Snapshots at some places, as they were recorded."""
    del rng
    return recorded(places(rows, num_members))


def recorded(places: Tensor) -> Drawing:
    """The snapshots at ``places`` (M,)."""
    return Drawing(
        num_members=len(places),
        of_block=lambda block: block.values[places].to(block.dtype),
        recorded=places,
        keys=[("recorded", place) for place in places.tolist()],
    )


def swa(rows: SnapshotRows, num_members: int, rng: torch.Generator) -> Drawing:
    """The mean of all snapshots of each run: one model per run (stochastic weight averaging, Izmailov et al. 2018)."""
    del num_members, rng
    mixture = torch.zeros(len(rows.runs), len(rows), dtype=torch.float64)
    for member, group in enumerate(rows.runs):
        mixture[member, group] = 1 / len(group)
    return _mixed(mixture)


def average(
    rows: SnapshotRows, num_members: int, rng: torch.Generator, *, k: float = 16, per_run: bool = False
) -> Drawing:
    """Each member is the mean of ``k`` different random snapshots (of all, where there are fewer).

    ``per_run`` averages within one run; members take the runs in turn.
    """
    groups = _groups(rows, per_run)
    mixture = torch.zeros(num_members, len(rows), dtype=torch.float64)
    for member in range(num_members):
        group = groups[member % len(groups)]
        chosen = group[torch.randperm(len(group), generator=rng)[: int(k)]]
        mixture[member, chosen] = 1 / len(chosen)
    return _mixed(mixture)


def noise(rows: SnapshotRows, num_members: int, rng: torch.Generator, size: float = 0.05) -> Drawing:
    """Evenly spaced snapshots plus normal noise, relative to each tensor.

    The noise's standard deviation is ``size`` times that of the tensor's own values (not of its movement between
    snapshots), as in p-diff's evaluate.py; a tensor of equal values gets none.
    """
    places = evenly_spaced(len(rows), num_members)
    return Drawing(num_members=len(places), whole=partial(_noisy, rows, places, rng, size))


def _noisy(rows: SnapshotRows, places: Tensor, rng: torch.Generator, size: float, empty: Empty) -> WeightSet:
    members = rows.members(places, empty)
    for name, tensor in members.items():
        own = tensor.view(len(places), -1)  # (M, numel)
        for part in torch.split(own, max(1, _NOISE_VALUES // max(own.shape[1], 1))):
            values = transform(part.float(), name)
            sigma = size * values.std(dim=1, keepdim=True, unbiased=False)
            values = torch.randn(values.shape, generator=rng).mul_(sigma).add_(values)
            part.copy_(to_dtype(inverse_transform(values, name), name, tensor.dtype))
    return members


def gaussian(
    rows: SnapshotRows, num_members: int, rng: torch.Generator, *, scale: float = 1.0, per_run: bool = False
) -> Drawing:
    """Normal draws with the mean and ``scale`` times the standard deviation of each coordinate.

    Both over all snapshots, or with ``per_run`` over those of a run.
    """
    owner = torch.arange(num_members) % len(_groups(rows, per_run))

    def draw(block: Block) -> Tensor:
        mean, std = block.moments(per_run)  # (number of groups, b)
        return mean[owner] + scale * std[owner] * _normal(num_members, mean.shape[1], rng)

    return _drawn(num_members, draw)


def swag(
    rows: SnapshotRows,
    num_members: int,
    rng: torch.Generator,
    *,
    scale: float = 0.5,
    rank: int = 20,
    per_run: bool = False,
) -> Drawing:
    """Draws from a Gaussian of low rank plus diagonal around the mean (SWAG, Maddox et al. 2019, algorithm 1).

    A member is mean + sqrt(scale) (std * z1 + deviations^T z2 / sqrt(r - 1)), with ``deviations`` those of r evenly
    spaced snapshots, z1 drawn for each coordinate and z2 (r,) once for all layers. With ``scale`` 0.5 the two halves
    of the covariance have the weights of the paper. ``per_run`` makes one such Gaussian for each run (MultiSWAG).
    """
    groups = _groups(rows, per_run)
    owner = torch.arange(num_members) % len(groups)
    picked = [group[evenly_spaced(len(group), rank)] for group in groups]
    shared = [_normal(num_members, len(places), rng) / max(len(places) - 1, 1) ** 0.5 for places in picked]

    def draw(block: Block) -> Tensor:
        mean, std = block.moments(per_run)
        drawn = std[owner] * _normal(num_members, mean.shape[1], rng)
        for number, places in enumerate(picked):
            mine = owner == number
            drawn[mine] += shared[number][mine] @ (block.transformed[places] - mean[number])
        return mean[owner] + math.sqrt(scale) * drawn

    return _drawn(num_members, draw)


def runs_in_turn(num_members: int, num_runs: int) -> Tensor:
    """Strata of members that take the runs in turn, (M,) int64: they differ by run whatever is drawn.

    Where a run has a single member its own spread cannot be seen: all members then count as drawn alike, which makes
    the error too large rather than too small.
    """
    members = torch.arange(num_members)
    return members % num_runs if num_members >= 2 * num_runs else torch.zeros_like(members)


def neighbours(num_members: int) -> Tensor:
    """Strata of members that start from evenly spaced snapshots, (M,) int64.

    They differ by snapshot, and two neighbours stand for draws from one.
    """
    return (torch.arange(num_members) // 2).clamp_max(max(num_members // 2 - 1, 0))


@dataclass(frozen=True)
class Look:
    """How a set is drawn.

    Attributes:
        colour: of everything.
        marker: of single points.
        line: style of lines.
        pictures: those that show it although they have no room for every set.
    """

    colour: str
    marker: Any
    line: Any = "-"
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Knob:
    """The setting that trades accuracy for novelty.

    Attributes:
        argument: of the function that draws.
        values: what the sweep sets it to.
        by_run: whether the function takes ``per_run``, which the sweep asks for in stores of several runs.
    """

    argument: str
    values: tuple[float, ...]
    by_run: bool = True


@dataclass(frozen=True)
class Baseline:
    """How a set is drawn, called and shown.

    Attributes:
        draw: decides on the set.
        text: its name in a sentence.
        look: in pictures.
        is_random: whether another seed gives other members.
        needs_runs: whether it is drawn only from stores of several runs.
        is_core: whether a quick evaluation has it.
        recorded: places (M,) of the snapshots that its members are, where they are such.
        strata: which of M members were drawn alike, (M,) int64; all of them where there is no such function.
        adds_noise: whether its members are snapshots plus noise, which lie as near to them as the noise is small.
        knob: for the sweep, which draws the set anew for each of its values.
    """

    draw: Draw
    text: str
    look: Look
    _: KW_ONLY
    is_random: bool = True
    needs_runs: bool = False
    is_core: bool = False
    recorded: Callable[[SnapshotRows, int], Tensor] | None = None
    strata: Callable[[SnapshotRows, int], Tensor] | None = None
    adds_noise: bool = False
    knob: Knob | None = None

    @property
    def is_cheap_alternative(self) -> bool:
        """Whether it makes new members of the snapshots, near which others are no copies."""
        return self.is_random and not self.adds_noise


def _by_run(rows: SnapshotRows, num_members: int) -> Tensor:
    return runs_in_turn(num_members, len(rows.runs))


def _by_neighbour(rows: SnapshotRows, num_members: int) -> Tensor:
    del rows
    return neighbours(num_members)


# Pictures in which every set would make a tangle.
_PLANE, _DENSITIES, _RELIABILITY = "plane", "densities", "reliability"
_BLUE, _GREEN, _PINK, _ORANGE, _SKY = "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"

BASELINES = {
    "snapshots": Baseline(
        partial(_at, every_nth), "the snapshots themselves", Look("#000000", "o", "--", (_RELIABILITY,)),
        is_random=False, is_core=True, recorded=every_nth,
    ),
    "last": Baseline(
        partial(_at, last_of_each_run), "the last snapshot of each run", Look(_SKY, "v"),
        is_random=False, recorded=last_of_each_run,
    ),
    "swa": Baseline(swa, "the average of all snapshots of each run", Look(_SKY, "8"), is_random=False),
    "average-4": Baseline(partial(average, k=4), "averages of 4 snapshots", Look(_BLUE, "<", (0, (1, 1)))),
    "average": Baseline(
        partial(average, k=16), "averages of 16 snapshots",
        Look(_BLUE, "s", (0, (4, 1, 1, 1)), (_PLANE, _DENSITIES, _RELIABILITY)),
        is_core=True, knob=Knob("k", (2, 3, 4, 8, 16, 64)),
    ),
    "average-64": Baseline(partial(average, k=64), "averages of 64 snapshots", Look(_BLUE, ">", (0, (1, 3)))),
    "average-per-run": Baseline(
        partial(average, per_run=True), "averages of 16 snapshots of one run", Look(_BLUE, "D", (0, (6, 2))),
        needs_runs=True, is_core=True, strata=_by_run,
    ),
    "gaussian": Baseline(
        gaussian, "a Gaussian around the snapshots", Look(_GREEN, "^", (0, (2, 1)), (_PLANE, _DENSITIES)),
        is_core=True, knob=Knob("scale", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)),
    ),
    "gaussian-per-run": Baseline(
        partial(gaussian, per_run=True), "a Gaussian around each run",
        Look(_GREEN, "h", (0, (6, 2)), (_RELIABILITY,)),
        needs_runs=True, is_core=True, strata=_by_run,
    ),
    "swag": Baseline(
        swag, "SWAG", Look(_PINK, "d", (0, (2, 1))), knob=Knob("scale", (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0))
    ),
    "swag-per-run": Baseline(
        partial(swag, per_run=True), "SWAG around each run", Look(_PINK, "p", (0, (6, 2))),
        needs_runs=True, strata=_by_run,
    ),
    "noise-0.02": Baseline(
        partial(noise, size=0.02), "snapshots with 2 % noise", Look(_ORANGE, (4, 1, 0), (0, (1, 1))),
        strata=_by_neighbour,
        adds_noise=True,
    ),
    "noise": Baseline(
        partial(noise, size=0.05), "snapshots with 5 % noise", Look(_ORANGE, "X", (0, (4, 1, 1, 1))),
        is_core=True, strata=_by_neighbour, adds_noise=True,
        knob=Knob("size", (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), by_run=False),
    ),
    "noise-0.1": Baseline(
        partial(noise, size=0.1), "snapshots with 10 % noise", Look(_ORANGE, "P", (0, (1, 3))),
        strata=_by_neighbour, adds_noise=True,
    ),
}  # fmt: skip
"""Every baseline, in the order of the table."""

SNAPSHOTS, GENERATED, DEEP_ENSEMBLE = "snapshots", "generated", "deep-ensemble"
LOOKS = {
    SNAPSHOTS: BASELINES[SNAPSHOTS].look,
    GENERATED: Look("#D55E00", "*", pictures=(_PLANE, _DENSITIES, _RELIABILITY)),
    **{name: baseline.look for name, baseline in BASELINES.items()},
    DEEP_ENSEMBLE: Look("#7F6000", (6, 1, 0), "-."),
}
"""Every set that has a look of its own, in the order of legends."""


def look_of(name: str) -> Look:
    """How a set is drawn; sets unknown to this release share a look."""
    return LOOKS.get(name, Look("#777777", "."))


def _groups(rows: SnapshotRows, per_run: bool) -> list[Tensor]:
    return rows.runs if per_run else [torch.arange(len(rows))]


def _normal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64)


def _mixed(mixture: Tensor) -> Drawing:
    """Means of snapshots, from their weights in each member, (M, N) float64."""
    return Drawing(
        num_members=len(mixture),
        of_block=lambda block: to_dtype(mixture @ block.doubles, block.name, block.dtype),
        keys=[("mixed", row.numpy().tobytes()) for row in mixture],
    )


def _drawn(num_members: int, draw: Callable[[Block], Tensor]) -> Drawing:
    """Members of which ``draw`` makes (M, b) as they are transformed."""

    def of_block(block: Block) -> Tensor:
        return to_dtype(inverse_transform(draw(block), block.name), block.name, block.dtype)

    return Drawing(num_members=num_members, of_block=of_block)


def to_dtype(values: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Values of a tensor as they are recorded; what must be positive stays so."""
    values = values.to(dtype)
    # A positive float64 can round to zero in half precision.
    return values.clamp_min(torch.finfo(dtype).tiny) if name.endswith(LOG_SUFFIX) else values
