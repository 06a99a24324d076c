"""Weights mixed from what was recorded at other conditions.

Running variances are mixed as logarithms, so that no mixture of them is negative.

Shapes: R conditions that were fitted, D values in a row, K latent width, F features, L mixtures, M members.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_plugin.errors import UnusableSnapshotsError
from pdiff_plugin.evaluation.baselines import to_dtype
from pdiff_plugin.evaluation.condition_places import by_condition
from pdiff_plugin.evaluation.rows import evenly_spaced
from pdiff_plugin.generator.autoencoder import ROWS_AT_A_TIME
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.conditions import Condition
from pdiff_plugin.snapshots.layout import DTYPES, Layout
from pdiff_plugin.snapshots.mapped import mapped
from pdiff_plugin.snapshots.statistics import column_blocks, inverse_transform, transform
from pdiff_plugin.snapshots.store import SnapshotStore

_BLOCK_VALUES = 1 << 14
_MAPPED_BYTES = 1 << 26


def usable_snapshots(store: SnapshotStore, trajectory: str) -> Tensor:
    """Places in the store of a trajectory's snapshots without NaN or Inf, in order of time."""
    places = (store.trajectory_index == store.trajectories.index(trajectory)).nonzero().squeeze(1)
    is_finite = torch.ones(len(places), dtype=torch.bool)
    for _, lo, hi in column_blocks(store.layout, _BLOCK_VALUES):
        is_finite &= torch.isfinite(store.rows(lo, hi, places)).all(dim=1)
    return places[is_finite]


def mean_row(store: SnapshotStore, places: Tensor) -> Tensor:
    """Mean of snapshots, running variances as logarithms, (D,) float32."""
    out = torch.empty(store.layout.num_values)
    for number, lo, hi in column_blocks(store.layout, _BLOCK_VALUES):
        out[lo:hi] = transform(store.rows(lo, hi, places), store.layout.tensors[number].name).double().mean(dim=0)
    return out


def some_usable(store: SnapshotStore, trajectory: str) -> Tensor:
    """As :func:`usable_snapshots`.

    Raises:
        UnusableSnapshotsError: all of them hold NaN or Inf.
    """
    places = usable_snapshots(store, trajectory)
    if not len(places):
        raise UnusableSnapshotsError(
            f"{store.path}, {trajectory}", "no snapshot without NaN or Inf", "one at least", "Leave this run out."
        )
    return places


def recorded_members(store: SnapshotStore, places: Tensor, num_members: int) -> WeightSet:
    """Up to M of the snapshots at ``places``, evenly spaced."""
    return WeightSet.from_flat(store.rows(indices=places[evenly_spaced(len(places), num_members)]), store.layout)


def averaged(weights: WeightSet) -> WeightSet:
    """The mean of all members as one model."""
    return WeightSet(
        {
            name: to_dtype(
                inverse_transform(transform(stacked.double(), name).mean(dim=0, keepdim=True), name),
                name,
                stacked.dtype,
            )
            for name, stacked in weights.items()
        }
    )


@dataclass(frozen=True)
class Recorded:
    """What a generator was fitted on, by condition.

    Attributes:
        layout: of a row.
        conditions: the R different ones.
        features: of these, (R, F).
        means: mean of all snapshots of each, runs of one condition counting alike, running variances as logarithms,
            (R, D) float32.
        latents: of the means, (R, K).
    """

    layout: Layout
    conditions: list[Condition]
    features: Tensor
    means: Tensor
    latents: Tensor

    @classmethod
    def read(cls, store: SnapshotStore, generator: WeightGenerator) -> Recorded:
        """Read what ``generator`` was fitted on; conditions of which no snapshot is usable are left out."""
        assert generator.variables is not None
        fitted = {run: store.conditions[run] for run in generator.trajectories}
        groups = by_condition(fitted)
        means = mapped(
            (len(groups), store.layout.num_values),
            torch.float32,
            "means",
            least_bytes=_MAPPED_BYTES,
            folder=None,
        )
        conditions: list[Condition] = []
        for runs in groups:
            usable = [places for places in (usable_snapshots(store, run) for run in runs) if len(places)]
            if usable:
                rows = [mean_row(store, places) for places in usable]
                means[len(conditions)] = torch.stack(rows).mean(dim=0)
                conditions.append(fitted[runs[0]])
        means = means[: len(conditions)]
        return cls(
            store.layout,
            conditions,
            generator.variables.encode(conditions),
            means,
            encoded(generator, means),
        )

    def mixed(self, weights: Tensor) -> WeightSet:
        """Weighted means over the conditions, from weights (L, R) float64: L members."""
        L = len(weights)
        tensors = {spec.name: torch.empty(L, *spec.shape, dtype=DTYPES[spec.dtype]) for spec in self.layout}
        for number, lo, hi in column_blocks(self.layout, _BLOCK_VALUES):
            spec = self.layout.tensors[number]
            start = self.layout.slices[spec.name].start
            values = inverse_transform(weights @ self.means[:, lo:hi].double(), spec.name)
            tensors[spec.name].view(L, -1)[:, lo - start : hi - start] = to_dtype(values, spec.name, DTYPES[spec.dtype])
        return WeightSet(tensors)


def encoded(generator: WeightGenerator, means: Tensor) -> Tensor:
    """Latents (R, K) of rows (R, D) whose running variances are logarithms."""
    parts = torch.split(means, ROWS_AT_A_TIME)
    return torch.cat([generator.autoencoder.encode(_plain(rows, generator.layout)) for rows in parts])


def _plain(rows: Tensor, layout: Layout) -> Tensor:
    out = rows.clone()
    for spec in layout:
        place = layout.slices[spec.name]
        out[:, place] = inverse_transform(out[:, place], spec.name)
    return out
