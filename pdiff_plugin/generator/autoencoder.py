"""The `subspace` autoencoder: leading principal directions of the snapshots, from one streamed pass.

With N snapshots of D values and N much smaller than D, the directions follow from the N x N Gram matrix (the method of
snapshots, Sirovich 1987): its eigenvectors, carried back to the D coordinates, are the principal directions. The pass
reads the store column block by column block, so its memory does not grow with D.

Coordinates are standardised per tensor: one mean per coordinate, one standard deviation per tensor. Running variances
are handled as logarithms, so that no decoded one is negative.

Shapes: N snapshots, D values in a row, K latent width, B rows in a batch.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pdiff_plugin.config import SubspaceConfig
from pdiff_plugin.snapshots.files import TEMP_MARK
from pdiff_plugin.snapshots.layout import DTYPES, Layout

logger = logging.getLogger(__name__)

# Reads columns [lo, hi) of chosen snapshots: (lo, hi) -> (N, hi - lo) float32.
ColumnReader = Callable[[int, int], Tensor]

# Tensors of this name are positive and vary by factors: their logarithm is modelled.
LOG_SUFFIX = "running_var"
_TINY = 1e-12
# Eigenvalues below this share of the largest are noise of the accumulation.
_NOISE_SHARE = 1e-10
# A basis of this size is kept on disk while fitting, where there is room for it.
_MAPPED_BYTES = 256 << 20
# Rows encoded or decoded at a time: with one number for every way of working, all of them give the same bits.
ROWS_AT_A_TIME = 16
# Columns encoded or decoded at a time: with 300 directions, 79 MB of the basis in float32.
BLOCK_VALUES = 1 << 16


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
    is_train = _indicator(train_rows, N)
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


class Autoencoder(Protocol):
    """What a generator needs of an autoencoder.

    Attributes:
        scales: what each tensor's values are divided by, (number of tensors,).
    """

    scales: Tensor

    @property
    def latent_dim(self) -> int:
        """K."""

    def encode(self, flat: Tensor) -> Tensor:
        """Latents (B, K) float32 of flat vectors (B, D)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Flat vectors (B, D) float32 of latents (B, K)."""

    def decode_blocks(self, latents: Tensor, block_values: int = BLOCK_VALUES) -> Iterator[tuple[str, slice, Tensor]]:
        """(tensor name, place in the flat vector, values (B, place)) of a few columns at a time."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that rebuild it together with its layout and config."""


class SubspaceAutoencoder:
    """Encode (B, D) -> (B, K) and decode (B, K) -> (B, D) by an orthonormal basis of the standardised coordinates.

    Latents keep the relative size of their directions and have unit variance over all their entries, so that a
    diffusion meets neither vanishing nor exploding inputs.

    Attributes:
        mean: (D,) float32, of the transformed training rows.
        basis: (K, D) float32 or bfloat16, orthonormal rows in standardised coordinates; computed with in float32.
        scales: (number of tensors,) float32.
        latent_scale: standard deviation that latents were divided by.
    """

    def __init__(self, layout: Layout, mean: Tensor, basis: Tensor, scales: Tensor, latent_scale: float) -> None:
        self.layout, self.mean, self.basis, self.scales, self.latent_scale = layout, mean, basis, scales, latent_scale

    @property
    def latent_dim(self) -> int:
        return len(self.basis)

    def encode(self, flat: Tensor) -> Tensor:
        """Latents (B, K) float32 of flat vectors (B, D)."""
        latents = torch.zeros(len(flat), self.latent_dim, dtype=torch.float64)
        for number, lo, hi in column_blocks(self.layout, BLOCK_VALUES):
            values = transform(flat[:, lo:hi].float(), self.layout.tensors[number].name) - self.mean[lo:hi]
            latents += (values.div_(self.scales[number]) @ self.basis[:, lo:hi].float().T).double()
        return (latents / self.latent_scale).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Flat vectors (B, D) float32 of latents (B, K)."""
        out = torch.empty(len(latents), self.layout.num_values)
        for spec, place, values in self.decode_blocks(latents):
            del spec
            out[:, place] = values
        return out

    def decode_blocks(self, latents: Tensor, block_values: int = BLOCK_VALUES) -> Iterator[tuple[str, slice, Tensor]]:
        """Decode a few columns at a time.

        Args:
            latents: (B, K).
            block_values: columns at most in a block.

        Yields:
            (tensor name, place [lo, hi) in the flat vector, values (B, hi - lo)).
        """
        scaled = latents.to("cpu", torch.float32) * self.latent_scale
        for number, lo, hi in column_blocks(self.layout, block_values):
            name, scale = self.layout.tensors[number].name, float(self.scales[number])
            mean, basis = self.mean[lo:hi], self.basis[:, lo:hi].float()
            rows = [torch.addmm(mean, part, basis, alpha=scale) for part in torch.split(scaled, ROWS_AT_A_TIME)]
            yield name, slice(lo, hi), inverse_transform(torch.cat(rows), name)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that rebuild this autoencoder together with its layout."""
        return {
            "mean": self.mean,
            "basis": self.basis,
            "scales": self.scales,
            "latent_scale": torch.tensor(self.latent_scale, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, layout: Layout, state: Mapping[str, Tensor]) -> SubspaceAutoencoder:
        return cls(layout, state["mean"], state["basis"], state["scales"], float(state["latent_scale"]))


@dataclass(frozen=True)
class Encoded:
    """A fitted autoencoder and what is known of the rows it was fitted on.

    Attributes:
        autoencoder: the encoder and decoder.
        latents: (N, K) float32, of all rows that were read, held-out ones included.
        variances: (K,) float64, share of the training rows' variance along each kept direction.
        fidelity: share of the held-out rows' variance about the mean of their trajectory (of all rows', if none are
            held out) that survives encoding and decoding; one minus the relative squared error.
    """

    autoencoder: Autoencoder
    latents: Tensor
    variances: Tensor
    fidelity: float


def fit_subspace(
    read: ColumnReader,
    layout: Layout,
    statistics: Statistics,
    config: SubspaceConfig,
    *,
    block_values: int,
    train_rows: Tensor,
    heldout_rows: Tensor,
    trajectory: Tensor | None = None,
    scratch: Path | None = None,
    columns: slice | None = None,
    join_columns: Callable[[Tensor, Callable[[int], Tensor]], Tensor] = lambda part, empty: part,
    on_columns: Callable[[int], None] | None = None,
) -> Encoded:
    """Turn the Gram matrix into an autoencoder with one more pass over the columns.

    Where several processes share the work, the autoencoder is whole on the one that ``join_columns`` chooses and holds
    the columns of their own on the others.

    Args:
        read: gives columns of the N rows, as for :func:`measure`.
        layout: of the rows.
        statistics: of the same rows.
        config: how many directions to keep.
        block_values: columns held at a time.
        train_rows: (n,) int64 places of the training rows.
        heldout_rows: (m,) int64 places of the others.
        trajectory: (n,) int64, the run of each training row; one run unless given.
        scratch: folder where a large basis is kept in a mapped file; a temporary one unless given.
        columns: those that this process reads, where several share the work; all unless given.
        join_columns: puts their columns side by side, given this process's (K, own columns) and what makes the result.
        on_columns: told after each block how many columns are done.
    """
    columns = columns or slice(0, layout.num_values)
    labels = torch.zeros(len(train_rows), dtype=torch.int64) if trajectory is None else trajectory
    lift, means = _directions(statistics.gram[train_rows][:, train_rows], labels, config)  # (n, K), (n, R)
    K = lift.shape[1]
    # Every row's coordinates follow from the Gram matrix alone: z = X b = G[:, train] lift.
    of_train = statistics.gram[:, train_rows]
    coordinates = of_train @ lift  # (N, K)
    latent_scale = float(coordinates[train_rows].std(correction=0)) or 1.0

    dtype = DTYPES[config.basis_dtype]
    basis = _empty_basis(K, columns.stop - columns.start, dtype, scratch)
    mean = torch.empty(1, columns.stop - columns.start)
    # Zero for the rows held out, which saves copying the others.
    is_train = _indicator(train_rows, len(of_train))
    lift_all = torch.zeros(len(of_train), K, dtype=torch.float64)
    lift_all[train_rows] = lift
    for number, lo, hi in column_blocks(layout, block_values, columns):
        own = slice(lo - columns.start, hi - columns.start)
        values = transform(read(lo, hi), layout.tensors[number].name).double()
        mean_here = (is_train @ values) / len(train_rows)
        mean[0, own] = mean_here.float()
        values -= mean_here
        # A float64 product: in float32 the small directions of a long trajectory lose four digits.
        basis[:, own] = (lift_all.T @ values).div_(statistics.scales[number])
        if on_columns is not None:
            on_columns(own.stop)
    basis = join_columns(basis, lambda D: _empty_basis(K, D, dtype, scratch))
    mean = join_columns(mean, lambda D: torch.empty(1, D))[0]

    judged = heldout_rows if len(heldout_rows) else train_rows
    squares = statistics.gram.diagonal()
    lost = (squares - coordinates.square().sum(dim=1))[judged].clamp_min(0).sum()
    # Distance to the nearest mean of a trajectory, which for all rows but strays is their own.
    to_means = squares[:, None] - 2 * of_train @ means + (means * (of_train[train_rows] @ means)).sum(dim=0)  # (N, R)
    movement = to_means.amin(dim=1)[judged].clamp_min(0).sum()
    variances = coordinates[train_rows].square().sum(dim=0)
    return Encoded(
        SubspaceAutoencoder(layout, mean, basis, statistics.scales.float(), latent_scale),
        (coordinates / latent_scale).float(),
        variances / squares[train_rows].sum(),
        float(1 - lost / movement) if movement > 0 else 1.0,
    )


def _directions(gram: Tensor, labels: Tensor, config: SubspaceConfig) -> tuple[Tensor, Tensor]:
    """Orthonormal directions as combinations of training rows, by falling variance.

    They span where the trajectories' means lie and the leading directions in which snapshots move about those means:
    runs that lie far apart would else leave none of a few directions to the movement.

    Args:
        gram: (n, n) float64 of the training rows.
        labels: trajectory of each, (n,).
        config: how many directions to keep.

    Returns:
        (n, K) and, as combinations too, the R means (n, R).
    """
    member = torch.stack([labels == run for run in sorted(set(labels.tolist()))], dim=1).double()  # (n, R)
    means = member / member.sum(dim=0)
    centring = torch.eye(len(gram), dtype=torch.float64) - means @ member.T
    eigenvalues, vectors = torch.linalg.eigh(centring @ gram @ centring)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    R = member.shape[1]
    # Centring leaves rank n - R at most. Values under the noise of the accumulation are no directions.
    num_real = int((eigenvalues > eigenvalues[0] * _NOISE_SHARE).sum())
    share = eigenvalues.clamp_min(0).cumsum(0) / eigenvalues.clamp_min(0).sum()
    needed = int((share < config.explained_variance).sum()) + 1
    K = max(1, min(R * config.latent_dim, needed, num_real, len(gram) - R))
    spanning = centring @ vectors[:, :K] / eigenvalues[:K].clamp_min(1e-300).sqrt()  # (n, K)
    if R == 1:
        return _fix_signs(spanning), means
    between = means / (means * (gram @ means)).sum(dim=0).clamp_min(1e-300).sqrt()
    spanning = torch.cat([spanning, between], dim=1)
    overlap, rotation = torch.linalg.eigh(spanning.T @ gram @ spanning)
    keep = overlap > overlap[-1] * _NOISE_SHARE
    orthonormal = spanning @ (rotation[:, keep] / overlap[keep].sqrt())
    coordinates = gram @ orthonormal
    _, principal = torch.linalg.eigh(coordinates.T @ coordinates)
    return _fix_signs(orthonormal @ principal.flip(1)), means


def _fix_signs(directions: Tensor) -> Tensor:
    """Turn each column so that its largest entry is positive: solvers leave the sign to the last digit."""
    return directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()


def _indicator(places: Tensor, size: int) -> Tensor:
    """(size,) float64: one at ``places``, else zero. A sum of equal values stays exact, one of n-ths would not."""
    return torch.zeros(size, dtype=torch.float64).index_fill_(0, places, 1.0)


def _empty_basis(K: int, D: int, dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """(K, D); from _MAPPED_BYTES on in a file of ``scratch`` that is gone with the tensor, if there is room for it."""
    size_bytes = K * D * dtype.itemsize
    if size_bytes < _MAPPED_BYTES or os.name != "posix":
        return torch.empty(K, D, dtype=dtype)
    try:
        # Unlinked at once: the mapping keeps it alive, and nothing is left behind by a kill.
        with tempfile.NamedTemporaryFile(prefix=f"{TEMP_MARK}basis-", dir=scratch or _disk_folder()) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would show as a SIGBUS in the middle of the pass
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            return torch.from_file(file.name, shared=True, size=K * D, dtype=dtype).view(K, D)
    except OSError as error:
        logger.warning("no room on disk for %.1f GB of basis (%s): it is kept in memory", size_bytes / 1e9, error)
        return torch.empty(K, D, dtype=dtype)


def _disk_folder() -> str:
    """The folder for temporary files; ``/var/tmp`` instead of ``/tmp``, which is memory on many systems."""
    folder = tempfile.gettempdir()
    return "/var/tmp" if folder == "/tmp" and os.access("/var/tmp", os.W_OK | os.X_OK) else folder
