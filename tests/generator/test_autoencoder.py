"""The subspace autoencoder against numpy's SVD and scikit-learn's PCA."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from pdiff_plugin.config import FitConfig, SubspaceConfig
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.fitting.subspace_stage import _empty, fit_subspace
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.split import Split
from pdiff_plugin.snapshots.statistics import NonFiniteRowsError, column_blocks, measure
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

N = 24
LAYOUT = Layout(
    (
        TensorSpec("weight", (7, 5), "float32", "parameter"),
        TensorSpec("bias", (7,), "float32", "parameter"),
        TensorSpec("bn.running_var", (3,), "float32", "buffer"),
        TensorSpec("frozen", (4,), "float32", "parameter"),
    )
)
FULL = SubspaceConfig(latent_dim=N, explained_variance=1.0)


@pytest.fixture
def rows():
    """Snapshots of one run: a random walk of two scales, running variances over many orders, a tensor that is still."""
    rng = torch.Generator().manual_seed(0)
    walk = torch.randn(N, LAYOUT.num_values, generator=rng).cumsum(0)
    walk[:, LAYOUT.slices["weight"]] *= 1e-3
    walk[:, LAYOUT.slices["bn.running_var"]] = walk[:, LAYOUT.slices["bn.running_var"]].exp()
    walk[:, LAYOUT.slices["frozen"]] = 0.5
    return walk


def fitted(rows, config=FULL, heldout=(), block_values=16):
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[list(heldout)] = True
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Split, "block_values", lambda split, memory_gb: block_values)
        TrajectoryWriter(folder, LAYOUT).write_chunk(rows, range(1, len(rows) + 1))
        store = SnapshotStore.open(folder)
        split = replace(Split.choose(store, torch.arange(len(store)), 0.0), heldout=held)
        statistics = measure(split.read, LAYOUT, block_values=block_values, train_rows=split.train_rows)
        return fit_subspace(split, statistics, FitConfig(autoencoder=config).settled(LAYOUT.num_values), Runtime())


def standardised(rows):
    """What the autoencoder should see, in numpy: logarithms, centred, each moving tensor with unit variance."""
    parts = []
    for spec in LAYOUT:
        values = rows[:, LAYOUT.slices[spec.name]].double().numpy()
        values = np.log(values) if spec.name.endswith("running_var") else values
        values = values - values.mean(axis=0)
        parts.append(values / (values.std() or 1.0))
    return np.concatenate(parts, axis=1)


def standardised_by(autoencoder, flat):
    """As :func:`standardised`, in torch and by the statistics of an autoencoder."""
    flat = flat.clone()
    flat[:, LAYOUT.slices["bn.running_var"]] = flat[:, LAYOUT.slices["bn.running_var"]].log()
    scales = torch.cat([autoencoder.scales[i].expand(spec.numel) for i, spec in enumerate(LAYOUT)])
    return (flat - autoencoder.mean) / scales


def test_every_snapshot_decodes_to_itself_at_full_rank(rows):
    autoencoder = fitted(rows).autoencoder

    decoded = autoencoder.decode(autoencoder.encode(rows))

    for spec in LAYOUT:
        place = LAYOUT.slices[spec.name]
        torch.testing.assert_close(decoded[:, place], rows[:, place], rtol=1e-4, atol=1e-6)


def test_directions_and_variances_agree_with_numpy_svd(rows):
    subspace = fitted(rows)
    _U, s, Vt = np.linalg.svd(standardised(rows), full_matrices=False)
    K = subspace.autoencoder.latent_dim

    assert K == N - 1
    np.testing.assert_allclose(subspace.variances.numpy(), (s**2 / (s**2).sum())[:K], rtol=1e-5, atol=1e-9)
    cosines = np.abs((subspace.autoencoder.basis.numpy() * Vt[:K]).sum(axis=1))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-4)


def test_latents_agree_with_scikit_learn_up_to_sign_and_one_scale(rows):
    subspace = fitted(rows, SubspaceConfig(latent_dim=5, explained_variance=1.0))
    pca = PCA(5, svd_solver="full")
    expected = pca.fit_transform(standardised(rows))

    found = subspace.latents.double().numpy() * subspace.autoencoder.latent_scale

    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(subspace.variances.numpy(), pca.explained_variance_ratio_, rtol=1e-6)


def test_latents_from_the_gram_matrix_are_what_encode_returns(rows):
    subspace = fitted(rows, heldout=range(10, 14))

    torch.testing.assert_close(subspace.autoencoder.encode(rows), subspace.latents, rtol=1e-3, atol=1e-4)


def test_training_latents_have_unit_variance_over_all_entries_and_keep_their_order_of_size(rows):
    latents = fitted(rows).latents

    assert float(latents.std(correction=0)) == pytest.approx(1.0, rel=1e-4)
    spread = latents.var(dim=0)
    assert torch.all(spread[:-1] >= spread[1:])


def test_blocks_of_any_size_give_the_same_autoencoder(rows):
    one, many = fitted(rows, block_values=1000), fitted(rows, block_values=2)

    torch.testing.assert_close(one.latents, many.latents, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.autoencoder.mean, many.autoencoder.mean)


def test_running_variances_stay_positive_however_far_a_latent_lies(rows):
    autoencoder = fitted(rows).autoencoder
    latents = 5 * torch.randn(50, autoencoder.latent_dim, generator=torch.Generator().manual_seed(1))

    decoded = autoencoder.decode(latents)[:, LAYOUT.slices["bn.running_var"]]

    assert decoded.min() > 0
    assert decoded.isfinite().all()


def test_a_tensor_that_never_moved_comes_back_as_it_was(rows):
    autoencoder = fitted(rows).autoencoder
    decoded = autoencoder.decode(torch.randn(8, autoencoder.latent_dim, generator=torch.Generator().manual_seed(1)))

    assert torch.all(decoded[:, LAYOUT.slices["frozen"]] == 0.5)


def test_a_running_variance_of_zero_survives(rows):
    rows[:, LAYOUT.slices["bn.running_var"]] = 0.0
    autoencoder = fitted(rows).autoencoder

    decoded = autoencoder.decode(autoencoder.encode(rows))

    assert decoded[:, LAYOUT.slices["bn.running_var"]].abs().max() < 1e-6


def test_explained_variance_decides_how_many_directions_are_kept(rows):
    s = np.linalg.svd(standardised(rows), compute_uv=False) ** 2
    share = s.cumsum() / s.sum()

    subspace = fitted(rows, SubspaceConfig(latent_dim=N, explained_variance=0.9))

    assert subspace.autoencoder.latent_dim == int((share < 0.9).sum()) + 1


def test_heldout_rows_leave_no_trace_in_the_autoencoder(rows):
    held = range(8, 12)
    other = rows.clone()
    other[list(held)] += 100.0

    one, two = fitted(rows, heldout=held).autoencoder, fitted(other, heldout=held).autoencoder

    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.basis, two.basis)


def test_fidelity_is_the_share_of_heldout_variance_that_survives(rows):
    held = list(range(8, 12))
    subspace = fitted(rows, SubspaceConfig(latent_dim=3), heldout=held)
    autoencoder = subspace.autoencoder
    truth = standardised_by(autoencoder, rows[held])
    decoded = standardised_by(autoencoder, autoencoder.decode(autoencoder.encode(rows[held])))

    expected = 1 - float((truth - decoded).square().sum() / truth.square().sum())
    assert subspace.fidelity == pytest.approx(expected, abs=1e-4)
    assert 0 < subspace.fidelity < 1


def test_rows_that_are_not_finite_are_named(rows):
    rows[3, 0], rows[7, 2] = float("nan"), float("inf")

    with pytest.raises(NonFiniteRowsError) as error:
        fitted(rows)

    assert error.value.rows == [3, 7]


def test_large_finite_values_whose_sum_overflows_are_not_taken_for_infinite(rows):
    rows[:, LAYOUT.slices["bias"]] = 3e38 * rows[:, LAYOUT.slices["bias"]].sign()

    assert fitted(rows).autoencoder.latent_dim > 0


def test_a_bfloat16_basis_decodes_and_encodes_within_half_a_percent_of_the_movement(rows):
    exact = fitted(rows)
    coarse = fitted(rows, replace(FULL, basis_dtype="bfloat16"))

    assert (exact.autoencoder.basis.dtype, coarse.autoencoder.basis.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(coarse.latents, exact.latents)
    # Rounding to 8 bits is off by 2^-8 of each entry at most.
    decoded = coarse.autoencoder.decode(coarse.latents)
    error = standardised_by(exact.autoencoder, decoded) - standardised_by(exact.autoencoder, rows)
    movement = standardised_by(exact.autoencoder, rows).norm()
    assert 0 < error.norm() < 2**-8 * movement
    torch.testing.assert_close(coarse.autoencoder.encode(rows), coarse.latents, rtol=0, atol=0.02)


def test_a_basis_is_never_converted_whole(rows, monkeypatch):
    monkeypatch.setattr("pdiff_plugin.generator.subspace.BLOCK_VALUES", 8)
    autoencoder = fitted(rows, replace(FULL, basis_dtype="bfloat16")).autoencoder
    widths, convert = [], torch.Tensor.float

    def watched(tensor):
        if tensor.dtype == torch.bfloat16:
            widths.append(tensor.shape[1])
        return convert(tensor)

    monkeypatch.setattr(torch.Tensor, "float", watched)
    autoencoder.encode(rows)
    for _ in autoencoder.decode_blocks(torch.zeros(2, autoencoder.latent_dim), 8):
        pass

    assert sum(widths) == 2 * LAYOUT.num_values
    assert max(widths) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_basis_lies_in_a_file_that_is_gone_with_it(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("pdiff_plugin.fitting.subspace_stage._MAPPED_BYTES", 100)

    basis = _empty("basis", 5, 30, dtype, tmp_path)
    basis[:] = 1.5

    assert mapped_file(basis).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert (basis.shape, basis.dtype, float(basis.sum())) == ((5, 30), dtype, 225.0)


def test_without_a_folder_a_large_basis_lies_in_the_system_s_one_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("pdiff_plugin.fitting.subspace_stage._MAPPED_BYTES", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert mapped_file(_empty("basis", 5, 30, torch.float32, None)).parent == tmp_path


def test_a_basis_for_which_the_disk_has_no_room_is_kept_in_memory_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pdiff_plugin.fitting.subspace_stage._MAPPED_BYTES", 100)

    basis = _empty("basis", 5, 30, torch.float32, tmp_path / "missing")

    assert basis.shape == (5, 30)
    assert mapped_file(basis) is None
    assert "kept in memory" in caplog.text


def mapped_file(tensor):
    """The (deleted) file in which a tensor lies, by the kernel's own list of mappings."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, path = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in place.split("-"))
        if first <= tensor.data_ptr() < last:
            return Path(path.removesuffix(" (deleted)")) if path.startswith("/") else None
    return None


def test_column_blocks_cover_every_column_once_and_cross_no_tensor_border():
    blocks = list(column_blocks(LAYOUT, 16))

    assert [i for _, lo, hi in blocks for i in range(lo, hi)] == list(range(LAYOUT.num_values))
    for number, lo, hi in blocks:
        place = LAYOUT.slices[LAYOUT.tensors[number].name]
        assert place.start <= lo < hi <= place.stop
        assert hi - lo <= 16


def test_float64_rows_are_encoded_like_float32_ones(rows):
    autoencoder = fitted(rows).autoencoder
    torch.testing.assert_close(autoencoder.encode(rows.double()), autoencoder.encode(rows))
