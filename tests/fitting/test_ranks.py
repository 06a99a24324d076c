"""The fit on the ranks of a process group that is not Ray's, as torchrun and srun start them."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import pytest
import torch
from torch import distributed

from pdiff_plugin import ConditionConfig, ConvConfig, DiffusionConfig, FitConfig, SnapshotStore, WeightGenerator, fit
from pdiff_plugin.errors import ConfigError, FitExistsError, UnusableSnapshotsError
from pdiff_plugin.fitting.ranks import fit_on_ranks
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

QUICK = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=60, batch_size=16, eval_every_n_steps=20))


CONDITIONS = replace(QUICK, condition=ConditionConfig(kinds=("angle:cyclic=360",), hold_out=("angle=90,210",)))


@pytest.fixture
def wide_store(tmp_path):
    """40 snapshots of 20,000 values in one file."""
    layout = Layout((TensorSpec("w", (20_000,), "float32", "parameter"),))
    writer = TrajectoryWriter(tmp_path / "store", layout)
    writer.write_chunk(torch.randn(40, layout.num_values).cumsum(0), range(1, 41))
    return SnapshotStore.open(tmp_path / "store")


@pytest.fixture
def group_of_one(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_two_ranks_fit_what_one_process_fits_and_go_on_where_it_stopped(make_store, fit_in_a_group, tmp_path):
    store = make_store(trajectories=2)
    alone = fit(store, QUICK, out=tmp_path / "alone")

    def interrupt(progress):
        if progress.stage == "diffusion" and progress.step >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "fit", on_progress=interrupt)

    together = fit_in_a_group(store, QUICK)

    (log,) = tmp_path.glob("*.log")  # one rank logs
    assert log.name.endswith("-rank-0.log")
    assert any("diffusion/heldout_loss" in line for line in log.read_text().splitlines())
    for name, tensor in alone.denoiser.state_dict().items():
        torch.testing.assert_close(together.denoiser.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "fit").iterdir()) == ["fit.json", "generator.safetensors"]
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert [attempt["num_workers"] for attempt in document["attempts"]] == [2]
    assert together.provenance == alone.provenance
    before = (tmp_path / "fit" / "generator.safetensors").stat().st_mtime_ns
    fit_in_a_group(store, QUICK)
    assert (tmp_path / "fit" / "generator.safetensors").stat().st_mtime_ns == before


def test_two_ranks_fit_conditions_as_one_process_does(sweep_store, fit_in_a_group, tmp_path):
    store = SnapshotStore.open(sweep_store)
    alone = fit(store, CONDITIONS)

    together = fit_in_a_group(store, CONDITIONS)

    assert together.trajectories == alone.trajectories
    assert together.report["condition"]["centre"] == alone.report["condition"]["centre"]
    for name, tensor in alone.denoiser.state_dict().items():
        torch.testing.assert_close(together.denoiser.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "fit").glob("*checkpoint*"))


def test_ranks_that_read_their_columns_from_a_bucket_know_the_store_by_all_of_them(
    wide_store, fit_in_a_group, tmp_path
):
    store = wide_store
    bucket = f"file://{tmp_path}"  # goes through fsspec like any other

    together = fit_in_a_group(store, QUICK, source=f"{bucket}/store", out=f"{bucket}/fit")

    alone = fit(store, QUICK)
    assert together.provenance == alone.provenance | {"store": f"{bucket}/store"}
    size = together.report["bytes_in_store"]
    assert size == sum(path.stat().st_size for path in store.path.rglob("*.safetensors"))
    # Each value once, and the head of its one file by both ranks.
    values = len(store) * store.layout.num_values * 4
    assert together.report["bytes_read"] == values + 2 * 4096
    # The same fit may go on with the store on a disk.
    shutil.copytree(tmp_path / "fit", tmp_path / "here")
    assert fit(store, QUICK, out=tmp_path / "here").provenance == together.provenance


def test_a_group_of_one_rank_fits_exactly_what_one_process_fits(make_store, group_of_one, tmp_path, recorder):
    store, seen = make_store(), []
    alone = fit(store, QUICK, out=tmp_path / "alone")

    generator = fit_on_ranks(store.path, QUICK, out=tmp_path / "fit", on_progress=seen.append, loggers=[recorder])

    assert isinstance(generator, WeightGenerator)
    assert recorder.curves["report/fidelity"] == {0: generator.report["fidelity"]}
    files = [(tmp_path / name / "generator.safetensors").read_bytes() for name in ("alone", "fit")]
    assert files[0] == files[1]
    assert generator.report == alone.report
    assert {"statistics", "autoencoder", "diffusion"} <= {progress.stage for progress in seen}


def test_what_one_process_refuses_ranks_refuse_too(make_store, group_of_one, tmp_path):
    store = make_store()
    fit_on_ranks(store.path, QUICK, out=tmp_path / "fit")

    with pytest.raises(FitExistsError, match="other settings"):
        fit_on_ranks(store.path, FitConfig(), out=tmp_path / "fit")
    fit_on_ranks(store.path, FitConfig(diffusion=QUICK.diffusion, seed=1), out=tmp_path / "fit", fresh=True)
    with pytest.raises(UnusableSnapshotsError, match="found 9 snapshots"):
        fit_on_ranks(make_store(torch.rand(9, 40), name="few").path, QUICK, out=tmp_path / "few")


def test_more_ranks_than_a_batch_has_rows_are_refused(make_store, group_of_one, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "get_world_size", lambda: 17)
    with pytest.raises(ConfigError, match=r"num_workers = 17: it must be at most diffusion\.batch_size"):
        fit_on_ranks(make_store().path, QUICK, out=tmp_path / "fit")


@pytest.fixture
def bucket():
    """Puts a store into a bucket in memory; its URL."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]

    def put(store):
        fs.put(str(store.path), "memory://bucket/store", recursive=True)
        return "memory://bucket/store"

    yield put
    fs.store.clear()


CONV = FitConfig(autoencoder=ConvConfig(max_steps=5), diffusion=QUICK.diffusion)
ALIGNED = replace(QUICK, align="rebasin")


@pytest.mark.parametrize(("config", "kind"), [(CONV, "the conv autoencoder"), (ALIGNED, "align=rebasin")])
def test_what_reads_the_whole_store_again_and_again_wants_a_cache_that_holds_it(
    make_store, group_of_one, tmp_path, bucket, config, kind
):
    url = bucket(make_store())
    with pytest.raises(ConfigError, match=rf"cache_gb = 1e-06: it must be at least \S+ for {kind}, which reads"):
        fit_on_ranks(url, config, out=tmp_path / "fit", cache_gb=1e-6)
    with pytest.raises(ConfigError, match="cache_gb = 0: it must be above 0"):
        fit_on_ranks(url, config, out=tmp_path / "fit", cache_gb=0)


def test_a_disk_without_room_for_such_a_store_is_told(make_store, group_of_one, tmp_path, bucket, monkeypatch):
    url = bucket(make_store())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"and so must the room in /\S+ \(1e-06 GB\)"):
        fit_on_ranks(url, CONV, out=tmp_path / "fit")


def test_the_conv_autoencoder_fetches_a_store_once_and_fits_what_it_fits_from_a_disk(
    make_store, group_of_one, tmp_path, bucket
):
    store = make_store()
    alone = fit(store, CONV)

    generator = fit_on_ranks(bucket(store), CONV, out=tmp_path / "fit")

    for name, tensor in alone.autoencoder.state_dict().items():
        assert torch.equal(generator.autoencoder.state_dict()[name], tensor), name
    assert generator.report["bytes_read"] <= generator.report["bytes_in_store"] + 4096


def test_what_a_large_basis_reads_of_a_bucket_is_counted(make_store, group_of_one, tmp_path, bucket, monkeypatch):
    monkeypatch.setattr("pdiff_plugin.fitting.subspace_stage._MAPPED_BYTES", 100)
    store = make_store()
    fit(store, QUICK, out=tmp_path / "alone")

    generator = fit_on_ranks(bucket(store), QUICK, out=tmp_path / "fit", cache_gb=1e-6)

    read = json.loads((tmp_path / "fit" / "fit.json").read_text())["bytes_read"]
    assert read["autoencoder"] > 0
    assert sum(read.values()) == generator.report["bytes_read"]
    alone = WeightGenerator.load(tmp_path / "alone").autoencoder.basis
    assert torch.equal(generator.autoencoder.basis, alone)


def test_a_cache_of_half_the_store_reads_half_of_it_twice_and_a_fit_that_goes_on_counts_all(
    wide_store, group_of_one, tmp_path, bucket
):
    store = wide_store
    url, values = bucket(store), len(store) * store.layout.num_values * 4

    def interrupt(progress):
        if progress.stage == "diffusion" and progress.step >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_on_ranks(url, QUICK, out=tmp_path / "fit", on_progress=interrupt, cache_gb=values / 2e9)
    generator = fit_on_ranks(url, QUICK, out=tmp_path / "fit", cache_gb=values / 2e9)

    read = json.loads((tmp_path / "fit" / "fit.json").read_text())["bytes_read"]
    assert sum(read.values()) == generator.report["bytes_read"]
    # The second attempt reads what tells whether the store is the same.
    assert values <= read["statistics"] < 1.5 * values
    assert 1.5 * values <= read["autoencoder"] <= 2 * values
    for name, tensor in fit(store, QUICK).denoiser.state_dict().items():
        torch.testing.assert_close(generator.denoiser.state_dict()[name], tensor)
