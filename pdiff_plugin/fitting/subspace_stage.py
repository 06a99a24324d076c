"""The `subspace` autoencoder's stage: principal directions from the Gram matrix and one more pass.

With N snapshots of D values and N much smaller than D, the directions follow from the N x N Gram matrix (the method of
snapshots, Sirovich 1987): its eigenvectors, carried back to the D coordinates, are the principal directions.

Shapes: N snapshots, n of them for training, D values in a row, K latent width, R runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pdiff_plugin.config import FitConfig, SubspaceConfig
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.generator.autoencoder import Encoded
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.snapshots.bucket_store import BucketStore
from pdiff_plugin.snapshots.layout import DTYPES
from pdiff_plugin.snapshots.mapped import mapped
from pdiff_plugin.snapshots.split import Split
from pdiff_plugin.snapshots.statistics import Statistics, column_blocks, indicator, transform
from pdiff_plugin.snapshots.tensor_files import TensorFileWriter

# Eigenvalues below this share of the largest are noise of the accumulation.
_NOISE_SHARE = 1e-10
# Times `latent_dim` directions for all snapshots of many conditions.
_POOLED = 4
# Of more snapshots than this, of many conditions, only the leading eigenvectors are computed.
_MANY_ROWS = 1500
# A basis of this size is never in memory: it is made as the generator's file is written, or else kept on disk
# meanwhile, where there is room for it.
_MAPPED_BYTES = 256 << 20


def fit_subspace(split: Split, statistics: Statistics, config: FitConfig, runtime: Runtime) -> Encoded:
    """Turn the Gram matrix into an autoencoder with one more pass over the columns.

    Where several ranks share the work, the autoencoder is whole on rank 0 and holds the columns of their own on the
    others.

    Args:
        split: the snapshots.
        statistics: of the same snapshots.
        config: of the fit.
        runtime: shares out the columns. A large basis is made as the generator's file is written, if there is to be
            one, one process, and no bucket; else it is kept in a mapped file of the folder meanwhile.
    """
    settings, train = cast(SubspaceConfig, config.autoencoder), split.train_rows
    gram = statistics.gram
    lift, means = _directions(
        gram[train][:, train], split.clouds[train], settings, is_pooled=split.is_pooled
    )  # (n, K), (n, R)
    # Every row's coordinates follow from the Gram matrix alone: z = X b = G[:, train] lift.
    coordinates = gram[:, train] @ lift  # (N, K)
    latent_scale = float(coordinates[train].std(correction=0)) or 1.0
    blocks = partial(_column_blocks, split, lift, statistics.scales, config, runtime)
    layout, K, late = split.store.layout, lift.shape[1], None
    D, dtype = layout.num_values, DTYPES[settings.basis_dtype]
    is_large, is_alone = K * D * dtype.itemsize >= _MAPPED_BYTES, runtime.world_size == 1
    # The header of the file comes first, and says how many bytes of a bucket were read.
    if is_large and is_alone and runtime.folder is not None and not isinstance(split.store, BucketStore):
        mean = torch.empty(D, dtype=torch.float32, device="meta")
        basis = torch.empty(K, D, dtype=dtype, device="meta")
        late = partial(_write_columns, blocks, D)
    else:
        mean, basis = _mean_and_basis(blocks, K, D, dtype, runtime)
    return Encoded(
        SubspaceAutoencoder(layout, mean, basis, statistics.scales.float(), latent_scale),
        (coordinates / latent_scale).float(),
        coordinates[train].square().sum(dim=0) / gram.diagonal()[train].sum(),
        _fidelity(split, gram, coordinates, means),
        late,
    )


# (first of this rank's columns, their mean (c,), their part of the basis (K, c)), a few columns at a time.
_Blocks = Iterator[tuple[int, Tensor, Tensor]]


def _column_blocks(split: Split, lift: Tensor, scales: Tensor, config: FitConfig, runtime: Runtime) -> _Blocks:
    """Carry combinations ``lift`` (n, K) of training rows to this rank's columns."""
    layout, train = split.store.layout, split.train_rows
    columns = runtime.share(layout.num_values)
    # Zero for the rows held out, which saves copying the others.
    is_train = indicator(train, len(split))
    lift_all = torch.zeros(len(split), lift.shape[1], dtype=torch.float64)
    lift_all[train] = lift
    for number, lo, hi in column_blocks(layout, split.block_values(config.memory_gb), columns):
        values = transform(split.read(lo, hi), layout.tensors[number].name).double()
        mean = (is_train @ values) / len(train)
        values -= mean
        # A float64 product: in float32 the small directions of a long trajectory lose four digits.
        yield lo - columns.start, mean, (lift_all.T @ values).div_(scales[number])
        runtime.report("autoencoder", hi - columns.start, columns.stop - columns.start)


def _mean_and_basis(
    blocks: Callable[[], _Blocks], K: int, D: int, dtype: torch.dtype, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """The mean, (D,), and the basis, (K, D): whole on rank 0, the columns of their own on other ranks."""
    columns = runtime.share(D)
    basis = _empty("basis", K, columns.stop - columns.start, dtype, runtime.folder)
    mean = _empty("mean", 1, columns.stop - columns.start, torch.float32, runtime.folder)
    for lo, mean_here, basis_here in blocks():
        own = slice(lo, lo + len(mean_here))
        mean[0, own], basis[:, own] = mean_here, basis_here
    basis = runtime.join_columns(basis, lambda D: _empty("basis", K, D, dtype, runtime.folder))
    return runtime.join_columns(mean, lambda D: _empty("mean", 1, D, torch.float32, runtime.folder))[0], basis


def _write_columns(blocks: Callable[[], _Blocks], D: int, file: TensorFileWriter) -> None:
    """Write the mean, (D,), and the basis, (K, D), into the file of a generator."""
    for lo, mean, basis in blocks():
        file.write("autoencoder.mean", mean, lo)
        for number, direction in enumerate(basis):
            file.write("autoencoder.basis", direction, number * D + lo)


def _fidelity(split: Split, gram: Tensor, coordinates: Tensor, means: Tensor) -> float:
    """Share of the judged rows' variance about the mean of their trajectory that the coordinates (N, K) keep.

    Args:
        split: tells the rows.
        gram: (N, N).
        coordinates: along the kept directions.
        means: of the R trajectories, as combinations of training rows, (n, R).
    """
    train, judged, squares = split.train_rows, split.judged_rows, gram.diagonal()
    lost = (squares - coordinates.square().sum(dim=1))[judged].clamp_min(0).sum()
    # Distance to the nearest mean of a trajectory, which for all rows but strays is their own.
    of_train = gram[:, train]
    to_means = squares[:, None] - 2 * of_train @ means + (means * (of_train[train] @ means)).sum(dim=0)  # (N, R)
    movement = to_means.amin(dim=1)[judged].clamp_min(0).sum()
    return float(1 - lost / movement) if movement > 0 else 1.0


def _all(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (n,) by falling size, their vectors (n, n), and their sum."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    return eigenvalues, vectors, eigenvalues.clamp_min(0).sum()


def _leading(gram: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_all` of the centred Gram matrix, but of the ``count`` largest eigenvalues alone."""
    import numpy as np
    from scipy.sparse.linalg import eigsh

    mean = gram.mean(dim=0)
    centred = (gram - mean - mean[:, None] + mean.mean()).numpy()
    start = np.random.default_rng(0).standard_normal(len(gram))  # one that is the same every time
    values, vectors = eigsh(centred, k=count, which="LA", v0=start)
    order = np.argsort(values)[::-1].copy()
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order].copy()), torch.tensor(centred.trace())


def _directions(
    gram: Tensor, labels: Tensor, config: SubspaceConfig, *, is_pooled: bool = False
) -> tuple[Tensor, Tensor]:
    """Orthonormal directions as combinations of training rows, by falling variance.

    They span where the trajectories' means lie and the leading directions in which snapshots move about those means:
    runs that lie far apart would else leave none of a few directions to the movement.

    Args:
        gram: (n, n) float64 of the training rows.
        labels: trajectory of each, (n,).
        config: how many directions to keep.
        is_pooled: whether the rows are of many conditions, and so may be many.

    Returns:
        (n, K) and, as combinations too, the R means (n, R).
    """
    member = torch.stack([labels == run for run in sorted(set(labels.tolist()))], dim=1).double()  # (n, R)
    means = member / member.sum(dim=0)
    centring = torch.eye(len(gram), dtype=torch.float64) - means @ member.T
    R = member.shape[1]
    most = config.latent_dim * (_POOLED if is_pooled else member.shape[1])
    is_large = is_pooled and len(gram) > max(_MANY_ROWS, 8 * most)
    eigenvalues, vectors, total = _leading(gram, most) if is_large else _all(centring @ gram @ centring)
    # Centring leaves rank n - R at most. Values under the noise of the accumulation are no directions.
    num_real = int((eigenvalues > eigenvalues[0] * _NOISE_SHARE).sum())
    share = eigenvalues.clamp_min(0).cumsum(0) / total
    needed = int((share < config.explained_variance).sum()) + 1
    K = max(1, min(most, needed, num_real, len(gram) - R))
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


def _empty(what: str, rows: int, columns: int, dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """Room for ``what``; from _MAPPED_BYTES on in a file of ``scratch`` that is gone with it, if there is any there."""
    return mapped((rows, columns), dtype, what, least_bytes=_MAPPED_BYTES, folder=scratch)
