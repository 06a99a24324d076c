"""What one streamed pass over the columns of all snapshots leaves: their Gram matrix, means and scales.

Coordinates are standardised per tensor: one mean per coordinate, one standard deviation per tensor. Running variances
are handled as logarithms, so that nothing made from them is negative. The pass reads the store column block by column
block, so its memory does not grow with D.

Shapes: N snapshots, D values in a row, B rows in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pdiff_plugin.snapshots.layout import Layout

# Reads columns [lo, hi) of chosen snapshots: (lo, hi) -> (N, hi - lo) float32.
ColumnReader = Callable[[int, int], Tensor]

T = TypeVar("T")

# Tensors of this name are positive and vary by factors: their logarithm is modelled.
LOG_SUFFIX = "running_var"
_TINY = 1e-12


@dataclass(frozen=True)
class Statistics:
    """What one pass over the snapshots leaves: the Gram matrix and how coordinates were standardised.

    Attributes:
        gram: (N, N) float64, inner products of the standardised, centred rows.
        scales: (number of tensors,) float64, standard deviation of each tensor over snapshots and coordinates; one
            where the tensor never moved.
    """

    gram: Tensor
    scales: Tensor


class NonFiniteRowsError(ValueError):
    """Rows with NaN or Inf were met; ``rows`` are their places in what was read. Internal: the caller drops them."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows)
        self.rows = rows


def column_blocks(layout: Layout, block_values: int, columns: slice | None = None) -> Iterator[tuple[int, int, int]]:
    """Cut [0, D), or ``columns`` of it, into pieces (tensor number, lo, hi) that cross no tensor border."""
    first, last = (columns.start, columns.stop) if columns else (0, layout.num_values)
    for number, spec in enumerate(layout):
        place = layout.slices[spec.name]
        stop = min(place.stop, last)
        for lo in range(max(place.start, first), stop, block_values):
            yield number, lo, min(lo + block_values, stop)


def transform(values: Tensor, name: str) -> Tensor:
    """Values as the autoencoder sees them: the logarithm for running variances, else unchanged."""
    return values.clamp_min(_TINY).log() if name.endswith(LOG_SUFFIX) else values


def inverse_transform(values: Tensor, name: str) -> Tensor:
    """Inverse of :func:`transform`."""
    return values.exp() if name.endswith(LOG_SUFFIX) else values


def measure(
    read: ColumnReader,
    layout: Layout,
    *,
    block_values: int,
    train_rows: Tensor,
    columns: slice | None = None,
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    on_columns: Callable[[int], None] | None = None,
) -> Statistics:
    """Accumulate the Gram matrix of all rows in one pass over the columns.

    Means and standard deviations are those of ``train_rows``, so that held-out rows leave no trace in them.

    Args:
        read: gives columns of the N rows.
        layout: of the rows.
        block_values: columns held at a time.
        train_rows: (n,) int64, places of the training rows among the N.
        columns: those that this process reads, where several share the work; all unless given.
        all_reduce: sums a tensor over these processes, in place.
        on_columns: told after each block how many columns are done.

    Raises:
        NonFiniteRowsError: naming the rows to leave out, the same ones in every process.
    """
    columns = columns or slice(0, layout.num_values)
    N = read(columns.start, columns.start).shape[0]
    is_train = indicator(train_rows, N)
    gram = torch.zeros(N, N, dtype=torch.float64)
    is_bad = torch.zeros(N, dtype=torch.float64)
    squares = torch.zeros(len(layout.tensors), dtype=torch.float64)
    # A tensor cut by a border of ``columns`` waits here until its scale is known: one at each end.
    waiting: dict[int, Tensor] = {}
    of_tensor = torch.zeros(N, N, dtype=torch.float64)
    for number, lo, hi in column_blocks(layout, block_values, columns):
        spec = layout.tensors[number]
        place = layout.slices[spec.name]
        if lo == max(place.start, columns.start):
            of_tensor = torch.zeros(N, N, dtype=torch.float64)
        rows = read(lo, hi)
        bad = (~torch.isfinite(rows.sum(dim=1))).nonzero().squeeze(1)
        if len(bad):
            # A sum of finite float32 values may overflow: look again before a row is given up.
            bad = bad[~torch.isfinite(rows[bad]).all(dim=1)]
            if len(bad):
                is_bad[bad] = 1.0
                break
        values = transform(rows, spec.name).double()
        values -= (is_train @ values) / len(train_rows)
        of_tensor.addmm_(values, values.T)
        if hi == min(place.stop, columns.stop):
            squares[number] = of_tensor.diagonal()[train_rows].sum()
            if place.start < columns.start or columns.stop < place.stop:
                waiting[number] = of_tensor
            elif squares[number] > 0:
                gram += of_tensor / (squares[number] / (len(train_rows) * spec.numel))
        if on_columns is not None:
            on_columns(hi - columns.start)
    is_bad = all_reduce(is_bad)
    if bool(is_bad.any()):
        raise NonFiniteRowsError(is_bad.nonzero().squeeze(1).tolist())
    numel = torch.tensor([spec.numel for spec in layout], dtype=torch.float64)
    variances = all_reduce(squares) / (len(train_rows) * numel.clamp_min(1))
    for number, part in waiting.items():
        if variances[number] > 0:
            gram += part / variances[number]
    scales = torch.where(variances > 0, variances.sqrt(), 1.0)
    return Statistics(all_reduce(gram), scales)


def without_nonfinite(num_rows: int, attempt: Callable[[Tensor], T], on_dropped: Callable[[Tensor, Tensor], None]) -> T:
    """What ``attempt`` makes of those rows that hold neither NaN nor Inf.

    Args:
        num_rows: N; all rows are tried first.
        attempt: given the rows to read, (any,) int64; raises :class:`NonFiniteRowsError` for places among them, which
            are left out from then on.
        on_dropped: told the rows that are left and those that were just left out; raises where these are too many.
    """
    rows = torch.arange(num_rows)
    while True:
        try:
            return attempt(rows)
        except NonFiniteRowsError as error:
            keep = torch.ones(len(rows), dtype=torch.bool)
            keep[error.rows] = False
        lost, rows = rows[~keep], rows[keep]
        on_dropped(rows, lost)


def indicator(places: Tensor, size: int) -> Tensor:
    """(size,) float64: one at ``places``, else zero. A sum of equal values stays exact, one of n-ths would not."""
    return torch.zeros(size, dtype=torch.float64).index_fill_(0, places, 1.0)
