"""Fits of runs whose hidden units are in different orders."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from pdiff_plugin import DiffusionConfig, FitConfig, SubspaceConfig, WeightGenerator, fit
from pdiff_plugin.cluster.tune import HeldoutScore
from pdiff_plugin.config import ConvConfig
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.alignment import Alignment, recognise
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.split import Split
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

LAYOUT = Layout.from_tensors(dict(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).named_parameters()))
PLAIN = FitConfig(
    autoencoder=SubspaceConfig(latent_dim=6),
    diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=60, batch_size=16, eval_every_n_steps=20),
)
ALIGNED = replace(PLAIN, align="rebasin")


def rows_of_a_run(seed):
    rng = torch.Generator().manual_seed(seed)
    centre = torch.randn(LAYOUT.num_values, generator=torch.Generator().manual_seed(100))
    directions = torch.randn(4, LAYOUT.num_values, generator=rng)
    return centre + 0.05 * torch.randn(40, 4, generator=rng).cumsum(0) / 6 @ directions


@pytest.fixture
def shuffled(tmp_path):
    """Two runs about one centre, of which the second has its units in another order."""
    (_, width), *_ = recognise(LAYOUT).layers
    order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
    columns = Alignment(LAYOUT, {"": order}).columns("", 0, LAYOUT.num_values)
    for rows in (rows_of_a_run(0), rows_of_a_run(1)[:, columns]):
        TrajectoryWriter(tmp_path / "store", LAYOUT).write_chunk(rows, list(range(1, 41)))
    return SnapshotStore.open(tmp_path / "store")


def test_aligned_runs_lie_together_and_the_report_says_how_far_apart_they_were(shuffled, tmp_path):
    apart = fit(shuffled, PLAIN).report
    generator = fit(shuffled, ALIGNED, out=tmp_path / "fit")

    measured = generator.report["alignment"]
    assert apart["trajectory_separation"] > 5
    assert generator.report["trajectory_separation"] < 2
    assert measured["separation_before"] == pytest.approx(apart["trajectory_separation"], rel=0.02)
    assert measured["separation_after"] == pytest.approx(generator.report["trajectory_separation"], rel=0.02)
    assert measured["units_moved"]["0.weight"][0] > 6
    assert json.loads((tmp_path / "fit" / "fit.json").read_text())["report"]["alignment"] == measured
    loaded = WeightGenerator.load(tmp_path / "fit").alignment
    assert torch.equal(loaded.rows(shuffled)[:40], rows_of_a_run(0))
    assert torch.equal(loaded.rows(shuffled)[40:], rows_of_a_run(1))


def test_members_of_every_run_have_the_order_of_the_first(shuffled):
    generator = fit(shuffled, ALIGNED)

    members = LAYOUT.flatten(generator.sample(8, trajectory="run-002", rng=torch.Generator().manual_seed(0)))

    assert torch.cdist(members, rows_of_a_run(1)).min() < 0.3 * torch.cdist(members, shuffled.rows()[40:]).min()


@pytest.mark.parametrize("stage", ["statistics", "autoencoder", "diffusion"])
def test_an_interrupted_aligned_fit_goes_on_to_the_same_generator(shuffled, tmp_path, stage):
    fit(shuffled, ALIGNED, out=tmp_path / "whole")

    def interrupt(progress):
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(shuffled, ALIGNED, out=tmp_path / "cut", on_progress=interrupt)
    fit(shuffled, ALIGNED, out=tmp_path / "cut")

    name = "generator.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_single_run_is_fitted_as_without_alignment(make_store):
    store = make_store(rows_of_a_run(0), layout=LAYOUT)

    plain, aligned = (fit(store, config) for config in (PLAIN, ALIGNED))

    for name, tensor in plain.autoencoder.state_dict().items():
        assert torch.equal(aligned.autoencoder.state_dict()[name], tensor)
    assert aligned.alignment.permutations == {}


def test_snapshots_with_nan_are_left_out_of_an_aligned_fit(tmp_path, shuffled):
    rows = rows_of_a_run(2)
    rows[7, 30] = torch.nan
    TrajectoryWriter(tmp_path / "store", LAYOUT).write_chunk(rows, list(range(1, 41)))

    generator = fit(SnapshotStore.open(tmp_path / "store"), ALIGNED)

    assert generator.provenance["num_snapshots"] == 119
    assert generator.report["trajectory_separation"] < 0.5 * generator.report["alignment"]["separation_before"]


def test_the_trained_autoencoder_reads_aligned_rows_too(shuffled):
    conv = ConvConfig(latent_dim=8, channels=(4, 4), max_steps=10, lr=1e-3, min_fidelity=0.0)

    generator = fit(shuffled, replace(ALIGNED, autoencoder=conv))

    expected = torch.cat([rows_of_a_run(0), rows_of_a_run(1)])
    separation = generator.report["alignment"]["separation_after"]
    assert separation < 2
    torch.testing.assert_close(generator.alignment.rows(shuffled), expected)


def test_two_processes_fit_what_one_fits(shuffled, fit_in_a_group, tmp_path):
    alone = fit(shuffled, ALIGNED, out=tmp_path / "alone")

    together = fit_in_a_group(shuffled, ALIGNED)

    assert together.report["alignment"] == alone.report["alignment"]
    for name, tensor in alone.autoencoder.state_dict().items():
        torch.testing.assert_close(together.autoencoder.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_search_scores_samples_against_aligned_snapshots(shuffled):
    generator = fit(shuffled, ALIGNED)
    split = Split.choose(shuffled, torch.arange(len(shuffled)), 0.1)
    score = HeldoutScore(shuffled.path, split.rows[split.heldout])

    aligned = score(generator, 1.0)
    generator.alignment = None

    assert aligned < 0.5 * score(generator, 1.0)


def test_a_fit_of_far_runs_recommends_alignment_where_it_would_bring_them_closer(shuffled, caplog):
    with caplog.at_level(logging.WARNING):
        fit(shuffled, PLAIN)

    assert "(--align rebasin) the trajectories would lie" in caplog.text


def test_a_fit_of_far_runs_that_cannot_be_aligned_does_not_recommend_it(make_store, caplog):
    with caplog.at_level(logging.WARNING):
        fit(make_store(trajectories=2), PLAIN)

    assert "lie far apart" in caplog.text
    assert "--align" not in caplog.text


def test_a_store_of_norms_and_a_head_is_refused(make_store, tmp_path):
    with pytest.raises(ConfigError, match=r"Tensor 'norm.weight' of shape \(8,\) comes first"):
        fit(make_store(trajectories=2), ALIGNED, out=tmp_path / "fit")
