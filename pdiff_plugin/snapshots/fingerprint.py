"""Telling whether a store still holds the snapshots that were read from it once.

Shapes: N snapshots, D values in a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor

from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.store import SnapshotStore

# Columns looked at: half of them spread over the row, half of them over its tensors, however small these are. Another
# training moves all of them. Of a row on a cold disk each costs a page, which the pass over all columns reads anyway.
_NUM_COLUMNS = 64
_NUM_FIRST = 64


def fingerprint(
    store: SnapshotStore, columns: slice | None = None, all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> str:
    """Hex digest of the layout, of which snapshots there are, and of some of their values all over the row.

    Args:
        store: the snapshots.
        columns: those that this process has, where several share the work; all unless given.
        all_reduce: sums a tensor over these processes, in place: all of them get the same digest.
    """
    columns = columns or slice(0, store.layout.num_values)
    wanted = watched_columns(store.layout)
    is_here = (wanted >= columns.start) & (wanted < columns.stop)
    own = store.gather(wanted[is_here], torch.arange(len(store)))
    values = torch.zeros(len(store), len(wanted), dtype=own.dtype)
    values[:, is_here] = own
    # A sum with zeros turns -0.0 into 0.0, here too where nothing is summed; of NaN there are many, which become one.
    values = all_reduce(values) + 0.0
    return _digest(store, values.masked_fill(values.isnan(), float("nan")))


def watched_columns(layout: Layout) -> Tensor:
    """The columns that :func:`fingerprint` reads, rising, (at most 64,) int64."""

    def spread(size: int) -> list[int]:
        count = min(size, _NUM_COLUMNS // 2)
        return [round(number) for number in torch.linspace(0, size - 1, count, dtype=torch.float64).tolist()]

    places = [place for place in layout.slices.values() if place.stop > place.start]
    middles = [(places[number].start + places[number].stop) // 2 for number in spread(len(places))]
    return torch.tensor(sorted({*spread(layout.num_values), *middles}))


def fingerprint_of_first_columns(store: SnapshotStore) -> str:
    """As :func:`fingerprint`, of the first columns alone: what ``fit.json`` and ``tune.json`` have always held."""
    return _digest(store, store.rows(0, first_columns(store.layout.num_values).stop))


def first_columns(num_values: int) -> slice:
    """The columns that :func:`fingerprint_of_first_columns` reads: all of a short row, few of a long one."""
    return slice(0, min(num_values, _NUM_FIRST))


def _digest(store: SnapshotStore, values: Tensor) -> str:
    text = json.dumps([store.layout.digest, store.trajectories, store.trajectory_index.tolist(), store.steps.tolist()])
    return hashlib.sha256(text.encode() + values.numpy().tobytes()).hexdigest()[:16]
