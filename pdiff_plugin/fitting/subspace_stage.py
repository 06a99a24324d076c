"""The `subspace` autoencoder's stage: principal directions from the Gram matrix and one more pass.

With N snapshots of D values and N much smaller than D, the directions follow from the N x N Gram matrix (the method of
snapshots, Sirovich 1987): its eigenvectors, carried back to the D coordinates, are the principal directions.

Shapes: N snapshots, n of them for training, D values in a row, K latent width, R runs.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pdiff_plugin.config import SubspaceConfig
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.snapshots.files import TEMP_MARK
from pdiff_plugin.snapshots.layout import DTYPES, Layout
from pdiff_plugin.snapshots.statistics import ColumnReader, Statistics, column_blocks, indicator, transform

logger = logging.getLogger(__name__)

# Eigenvalues below this share of the largest are noise of the accumulation.
_NOISE_SHARE = 1e-10
# A basis of this size is kept on disk while fitting, where there is room for it.
_MAPPED_BYTES = 256 << 20


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
    is_train = indicator(train_rows, len(of_train))
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
