"""The cheap alternatives a generator has to beat, drawn from the same snapshots.

Running variances are drawn as logarithms wherever something is added to them, so that none falls to zero or below.

Shapes: N snapshots, M members, b columns in a block, k snapshots in an average, r low-rank directions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pdiff_plugin.evaluation.rows import BLOCK_VALUES, SnapshotRows, evenly_spaced
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import DTYPES
from pdiff_plugin.snapshots.statistics import LOG_SUFFIX, column_blocks, inverse_transform, transform

# Draws a set of about M members from the snapshots.
Draw = Callable[[SnapshotRows, int, torch.Generator], WeightSet]


def rng_for(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each set, so that a set's members do not depend on which others are drawn."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def snapshots(rows: SnapshotRows, num_members: int, rng: torch.Generator) -> WeightSet:
    """M recorded snapshots, evenly spaced over the store; all of them if there are fewer."""
    del rng
    return rows.members(evenly_spaced(len(rows), num_members))


def last(rows: SnapshotRows, num_members: int, rng: torch.Generator) -> WeightSet:
    """The last snapshot of each run: what a user without any of this would keep."""
    del num_members, rng
    return rows.members(torch.stack([group[-1] for group in rows.runs]))


def swa(rows: SnapshotRows, num_members: int, rng: torch.Generator) -> WeightSet:
    """The mean of all snapshots of each run: one model per run (stochastic weight averaging, Izmailov et al. 2018)."""
    del num_members, rng
    mixture = torch.zeros(len(rows.runs), len(rows), dtype=torch.float64)
    for member, group in enumerate(rows.runs):
        mixture[member, group] = 1 / len(group)
    return _by_block(rows, len(mixture), lambda values: mixture @ values, logarithms=False)


def average(
    rows: SnapshotRows, num_members: int, rng: torch.Generator, k: int = 16, *, per_run: bool = False
) -> WeightSet:
    """Each member is the mean of ``k`` different random snapshots (of all, where there are fewer).

    ``per_run`` averages within one run; members take the runs in turn.
    """
    groups = _groups(rows, per_run)
    mixture = torch.zeros(num_members, len(rows), dtype=torch.float64)
    for member in range(num_members):
        group = groups[member % len(groups)]
        chosen = group[torch.randperm(len(group), generator=rng)[:k]]
        mixture[member, chosen] = 1 / len(chosen)
    return _by_block(rows, num_members, lambda values: mixture @ values, logarithms=False)


def noise(rows: SnapshotRows, num_members: int, rng: torch.Generator, size: float = 0.05) -> WeightSet:
    """Evenly spaced snapshots plus normal noise, relative to each tensor.

    The noise's standard deviation is ``size`` times that of the tensor's own values (not of its movement between
    snapshots), as in p-diff's evaluate.py; a tensor of equal values gets none.
    """
    chosen = rows.members(evenly_spaced(len(rows), num_members))
    noisy = {}
    for name, tensor in chosen.items():
        values = transform(tensor.float().reshape(chosen.num_members, -1), name)  # (M, numel)
        sigma = size * values.std(dim=1, keepdim=True, unbiased=False)
        values = inverse_transform(values + sigma * torch.randn(values.shape, generator=rng), name)
        noisy[name] = _to_dtype(values, name, tensor.dtype).reshape(tensor.shape)
    return WeightSet(noisy)


def gaussian(
    rows: SnapshotRows, num_members: int, rng: torch.Generator, *, scale: float = 1.0, per_run: bool = False
) -> WeightSet:
    """Normal draws with the mean and ``scale`` times the standard deviation of each coordinate.

    Both over all snapshots, or with ``per_run`` over those of a run.
    """
    groups = _groups(rows, per_run)
    owner = torch.arange(num_members) % len(groups)

    def draw(values: Tensor) -> Tensor:
        mean, std = _moments(values, groups)  # (number of groups, b)
        return mean[owner] + scale * std[owner] * _normal(num_members, values.shape[1], rng)

    return _by_block(rows, num_members, draw)


def swag(
    rows: SnapshotRows,
    num_members: int,
    rng: torch.Generator,
    *,
    scale: float = 0.5,
    rank: int = 20,
    per_run: bool = False,
) -> WeightSet:
    """Draws from a Gaussian of low rank plus diagonal around the mean (SWAG, Maddox et al. 2019, algorithm 1).

    A member is mean + sqrt(scale) (std * z1 + deviations^T z2 / sqrt(r - 1)), with ``deviations`` those of r evenly
    spaced snapshots, z1 drawn for each coordinate and z2 (r,) once for all layers. With ``scale`` 0.5 the two halves
    of the covariance have the weights of the paper. ``per_run`` makes one such Gaussian for each run (MultiSWAG).
    """
    groups = _groups(rows, per_run)
    owner = torch.arange(num_members) % len(groups)
    picked = [group[evenly_spaced(len(group), rank)] for group in groups]
    shared = [_normal(num_members, len(places), rng) / max(len(places) - 1, 1) ** 0.5 for places in picked]

    def draw(values: Tensor) -> Tensor:
        mean, std = _moments(values, groups)
        drawn = std[owner] * _normal(num_members, values.shape[1], rng)
        for number, places in enumerate(picked):
            mine = owner == number
            drawn[mine] += shared[number][mine] @ (values[places] - mean[number])
        return mean[owner] + math.sqrt(scale) * drawn

    return _by_block(rows, num_members, draw)


@dataclass(frozen=True)
class Baseline:
    """How a set is drawn and called.

    Attributes:
        draw: makes the set.
        text: its name in a sentence.
        is_random: whether another seed gives other members.
        per_run: whether members take the runs in turn; drawn only from stores of several runs.
        per_snapshot: whether each member starts from a snapshot of its own.
    """

    draw: Draw
    text: str
    is_random: bool = True
    per_run: bool = False
    per_snapshot: bool = False


BASELINES = {
    "snapshots": Baseline(snapshots, "the snapshots themselves", is_random=False),
    "last": Baseline(last, "the last snapshot of each run", is_random=False),
    "swa": Baseline(swa, "the average of all snapshots of each run", is_random=False),
    "average-4": Baseline(partial(average, k=4), "averages of 4 snapshots"),
    "average": Baseline(partial(average, k=16), "averages of 16 snapshots"),
    "average-64": Baseline(partial(average, k=64), "averages of 64 snapshots"),
    "average-per-run": Baseline(partial(average, per_run=True), "averages of 16 snapshots of one run", per_run=True),
    "gaussian": Baseline(gaussian, "a Gaussian around the snapshots"),
    "gaussian-per-run": Baseline(partial(gaussian, per_run=True), "a Gaussian around each run", per_run=True),
    "swag": Baseline(swag, "SWAG"),
    "swag-per-run": Baseline(partial(swag, per_run=True), "SWAG around each run", per_run=True),
    "noise-0.02": Baseline(partial(noise, size=0.02), "snapshots with 2 % noise", per_snapshot=True),
    "noise": Baseline(partial(noise, size=0.05), "snapshots with 5 % noise", per_snapshot=True),
    "noise-0.1": Baseline(partial(noise, size=0.1), "snapshots with 10 % noise", per_snapshot=True),
}
"""Every cheap alternative, in the order of the table."""

CORE = ("snapshots", "generated", "average", "gaussian", "noise")
"""The sets of a quick evaluation; of a store of several runs, the per-run average and Gaussian come with them."""


def _groups(rows: SnapshotRows, per_run: bool) -> list[Tensor]:
    return rows.runs if per_run else [torch.arange(len(rows))]


def _moments(values: Tensor, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each group of rows of (N, b), both (number of groups, b)."""
    mean = torch.stack([values[group].mean(dim=0) for group in groups])
    std = torch.stack([values[group].std(dim=0, correction=min(1, len(group) - 1)) for group in groups])
    return mean, std


def _normal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64)


def _by_block(
    rows: SnapshotRows, num_members: int, draw: Callable[[Tensor], Tensor], *, logarithms: bool = True
) -> WeightSet:
    """Build members from blocks of columns: ``draw`` turns (N, b) float64 into (M, b)."""
    layout = rows.layout
    flat = {spec.name: torch.empty(num_members, spec.numel, dtype=DTYPES[spec.dtype]) for spec in layout}
    for number, lo, hi in column_blocks(layout, BLOCK_VALUES):
        spec = layout.tensors[number]
        start = layout.slices[spec.name].start
        values = rows.read(lo, hi)
        if logarithms:
            drawn = inverse_transform(draw(transform(values, spec.name).double()), spec.name)
        else:
            drawn = draw(values.double())
        flat[spec.name][:, lo - start : hi - start] = _to_dtype(drawn, spec.name, DTYPES[spec.dtype])
    return WeightSet({spec.name: flat[spec.name].reshape(num_members, *spec.shape) for spec in layout})


def _to_dtype(values: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    values = values.to(dtype)
    # A positive float64 can round to zero in half precision.
    return values.clamp_min(torch.finfo(dtype).tiny) if name.endswith(LOG_SUFFIX) else values
