"""Fits over several stores: one store in the fit's folder, from which everything else reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, Layout, SnapshotStore, WeightGenerator, fit, merge_stores
from pdiff_plugin.errors import ConfigError, FitExistsError, StoreNotFoundError
from pdiff_plugin.fitting import several
from pdiff_plugin.fitting.several import one_store
from pdiff_plugin.snapshots.ownership import Ownership
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

LAYOUT = Layout.from_tensors({"norm.weight": torch.zeros(8, 4), "norm.bias": torch.zeros(8)})
QUICK = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=20, eval_every_n_steps=10))


@pytest.fixture
def runs(make_store, tmp_path):
    for number in range(3):
        make_store(
            torch.randn(12, LAYOUT.num_values, generator=torch.Generator().manual_seed(number)),
            name=f"runs/lr-{number}",
            layout=LAYOUT,
        )
    return tmp_path / "runs"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "fit"


def add_row(store: Path) -> None:
    writer = TrajectoryWriter(store, LAYOUT, trajectory="run-001", resume_step=12)
    writer.write_chunk(torch.ones(1, LAYOUT.num_values), [13])
    writer.close()


@pytest.mark.parametrize("how", ["list", "pattern"])
def test_a_fit_over_several_stores_is_that_of_their_merged_store(runs, out, tmp_path, how):
    merge_stores([runs / "*"], tmp_path / "merged")
    expected = fit(tmp_path / "merged", QUICK)
    given = sorted(runs.iterdir()) if how == "list" else str(runs / "*")

    generator = fit(given, QUICK, out=out)

    assert generator.trajectories == ["lr-1-run-001", "lr-2-run-001", "run-001"]
    for name, tensor in generator.denoiser.state_dict().items():
        assert torch.equal(tensor, expected.denoiser.state_dict()[name]), name
    assert generator.provenance["store"] == str((out / "merged-store").resolve())
    assert len(SnapshotStore.open(generator.provenance["store"])) == 36


def test_the_same_call_returns_the_finished_fit_and_changes_nothing(runs, out, monkeypatch):
    fit([runs / "*"], QUICK, out=out)
    monkeypatch.setattr(several, "merge_stores", lambda *_, **__: pytest.fail("it merges again"))
    assert isinstance(fit([runs / "*"], QUICK, out=out), WeightGenerator)


def test_a_killed_merge_is_finished_before_the_fit(runs, out):
    merge_stores([runs / "lr-0"], out / "merged-store")
    (out / "merged-store" / ".tmp-000000000000-1-1-abc-merge").mkdir()
    assert len(fit([runs / "*"], QUICK, out=out).trajectories) == 3


@pytest.mark.parametrize("change", ["a run went on", "a store more", "a store less", "another run"])
def test_other_snapshots_are_another_fit(runs, out, make_store, tmp_path, change):
    fit([runs / "*"], QUICK, out=out)
    if change == "a run went on":
        add_row(runs / "lr-1")
    elif change == "a store less":
        shutil.rmtree(runs / "lr-1")
    else:
        if change == "another run":
            shutil.rmtree(runs / "lr-1")
        make_store(
            torch.randn(12, LAYOUT.num_values, generator=torch.Generator().manual_seed(9)),
            name="runs/lr-9",
            layout=LAYOUT,
        )
    with pytest.raises(FitExistsError, match="other snapshots"):
        fit([runs / "*"], QUICK, out=out)
    assert len(SnapshotStore.open(out / "merged-store")) == 36, "the store of the finished fit was changed"

    generator = fit([runs / "*"], QUICK, out=out, fresh=True)
    assert (
        len(SnapshotStore.open(out / "merged-store"))
        == generator.provenance["num_snapshots"]
        == sum(len(SnapshotStore.open(path)) for path in runs.iterdir())
    )


def test_what_a_killed_merge_of_other_stores_left_is_told(runs, out):
    merge_stores([runs / "lr-2"], out / "merged-store")
    with pytest.raises(FitExistsError, match="other snapshots"):
        fit([runs / "lr-0", runs / "lr-1"], QUICK, out=out)
    assert len(fit([runs / "lr-0", runs / "lr-1"], QUICK, out=out, fresh=True).trajectories) == 2


def test_a_run_that_is_being_recorded_is_left_out_with_a_warning(runs, out, caplog):
    own = Ownership(runs / "lr-1" / "trajectories" / "run-001")
    assert len(fit([runs / "*"], QUICK, out=out).trajectories) == 2
    assert f"lr-1/trajectories/run-001 is being recorded by process {os.getpid()} on" in caplog.text
    own.release()


def test_one_store_is_read_where_it_is(runs, out):
    assert (
        one_store([runs / "lr-0"], out, fresh=False) == one_store(runs / "lr-0", out, fresh=False) == str(runs / "lr-0")
    )
    os.rename(runs / "lr-0", runs / "lr-[0]")
    assert one_store(runs / "lr-[0]", out, fresh=False) == str(runs / "lr-[0]")
    assert not out.exists()


def test_where_several_stores_cannot_be_merged_the_next_move_is_told(runs, out):
    with pytest.raises(
        ConfigError, match="out = None: it must be on disk where several stores are fitted: `pdiff merge`"
    ):
        fit([runs / "lr-0", runs / "lr-1"], QUICK)
    with pytest.raises(ConfigError, match="out = 's3://bucket/fit': it must be on disk"):
        fit([runs / "lr-0", runs / "lr-1"], QUICK, out="s3://bucket/fit")
    with pytest.raises(ConfigError, match=r"store = .*: it must be on disk"):
        fit([runs / "lr-0", "s3://bucket/store"], QUICK, out=out)
    with pytest.raises(ConfigError, match=r"store = .*: it must be on disk"):
        fit("s3://bucket/*", QUICK, out=out)
    with pytest.raises(ConfigError, match="must be other stores than"):
        fit([runs / "lr-0", out / "merged-store"], QUICK, out=out, fresh=True)
    with pytest.raises(StoreNotFoundError, match="the pattern matches no store"):
        fit(runs / "ls-*", QUICK, out=out)
