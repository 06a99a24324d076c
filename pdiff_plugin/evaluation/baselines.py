"""The cheap alternatives a generator has to beat, drawn from the same snapshots.

Running variances are drawn as logarithms wherever something is added to them, so that none falls to zero or below.

Shapes: N snapshots, M members, b columns in a block, k snapshots in an average, r low-rank directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pdiff_plugin.evaluation.rows import BLOCK_VALUES, SnapshotRows, evenly_spaced
from pdiff_plugin.generator.autoencoder import LOG_SUFFIX, column_blocks, inverse_transform, transform
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import DTYPES

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


def average(rows: SnapshotRows, num_members: int, rng: torch.Generator, k: int = 16) -> WeightSet:
    """Each member is the mean of ``k`` different random snapshots (of all, where there are fewer)."""
    groups = [torch.arange(len(rows))]
    return _averages(rows, groups, num_members, rng, k)


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


def gaussian(rows: SnapshotRows, num_members: int, rng: torch.Generator) -> WeightSet:
    """Normal draws with the mean and standard deviation of each coordinate over all snapshots."""

    def draw(values: Tensor) -> Tensor:
        z = torch.randn(num_members, values.shape[1], generator=rng, dtype=torch.float64)
        return values.mean(dim=0) + values.std(dim=0) * z

    return _by_block(rows, num_members, draw)


CORE: dict[str, Draw] = {
    "snapshots": snapshots,
    "average": average,
    "gaussian": gaussian,
    "noise": partial(noise, size=0.05),
}


def _averages(rows: SnapshotRows, groups: list[Tensor], num_members: int, rng: torch.Generator, k: int) -> WeightSet:
    """Member m is the mean of k snapshots of group m modulo the number of groups."""
    mixture = torch.zeros(num_members, len(rows), dtype=torch.float64)
    for member in range(num_members):
        group = groups[member % len(groups)]
        chosen = group[torch.randperm(len(group), generator=rng)[:k]]
        mixture[member, chosen] = 1 / len(chosen)
    return _mixtures(rows, mixture)


def _mixtures(rows: SnapshotRows, mixture: Tensor) -> WeightSet:
    """Members as weighted sums of the snapshots: mixture (M, N) float64."""
    return _by_block(rows, len(mixture), lambda values: mixture @ values, logarithms=False)


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
