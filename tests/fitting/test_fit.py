"""Fitting from end to end on small stores: results, bad input, interruptions."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pdiff_plugin import DiffusionConfig, FitConfig, Layout, SnapshotStore, SubspaceConfig, WeightGenerator, fit
from pdiff_plugin.errors import (
    FitExistsError,
    FormatError,
    FormatVersionError,
    StoreNotFoundError,
    UnusableSnapshotsError,
)
from pdiff_plugin.fitting import statistics_stage
from pdiff_plugin.fitting.folder import FitFolder
from pdiff_plugin.fitting.statistics_stage import nonfinite_names
from pdiff_plugin.snapshots.conditions import set_condition
from pdiff_plugin.snapshots.layout import TensorSpec
from pdiff_plugin.snapshots.split import Split

DATA = Path(__file__).parents[1] / "data"
QUICK = FitConfig(
    autoencoder=SubspaceConfig(latent_dim=6),
    diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=60, batch_size=16, eval_every_n_steps=20),
)


class InterruptAt:
    """``on_progress`` that is Ctrl-C at the first report of a stage from a step on."""

    def __init__(self, stage, step=0):
        self.stage, self.step = stage, step

    def __call__(self, progress):
        if progress.stage == self.stage and progress.step >= self.step:
            raise KeyboardInterrupt


def file_of(folder):
    return (folder / "generator.safetensors").read_bytes()


def test_a_fit_leaves_a_generator_and_its_history(make_store, tmp_path):
    generator = fit(make_store(), QUICK, out=tmp_path / "fit")

    assert sorted(p.name for p in (tmp_path / "fit").iterdir()) == ["fit.json", "generator.safetensors"]
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert document["status"] == "finished"
    assert [entry["step"] for entry in document["history"]] == [0, 20, 40, 60]
    assert document["report"] == generator.report
    assert {"statistics", "autoencoder", "diffusion", "report"} <= document["seconds"].keys()
    assert generator.sample(3)["head.weight"].shape == (3, 3, 8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fit_is_the_same_where_gradients_are_switched_off(make_store, mode):
    store = make_store()
    expected = fit(store, QUICK)

    with mode():
        found = fit(store, QUICK)

    for name, tensor in expected.denoiser.state_dict().items():
        assert torch.equal(found.denoiser.state_dict()[name], tensor), name


def test_a_fit_ignores_conditions(make_store, tmp_path):
    store = make_store(trajectories=2)
    without = fit(store, QUICK, out=tmp_path / "without")
    set_condition(store.path, "run-001", {"angle": 1.0})
    set_condition(store.path, "run-002", {"angle": 2.0})
    found = SnapshotStore.open(store.path)
    assert found.conditions == {"run-001": {"angle": 1.0}, "run-002": {"angle": 2.0}}

    fitted = fit(found, QUICK, out=tmp_path / "with")

    expected, tensors = (load_file(tmp_path / name / "generator.safetensors") for name in ("without", "with"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert fitted.report == without.report
    # A condition that is set after a fit does not make its snapshots other ones.
    assert fit(found, QUICK, out=tmp_path / "without").report == without.report


def test_a_bfloat16_basis_halves_the_file_and_survives_it(make_store, tmp_path):
    layout = Layout((TensorSpec("w", (4, 5000), "float32", "parameter"),))
    rows = torch.randn(40, layout.num_values, generator=torch.Generator().manual_seed(0)).cumsum(0)
    store = make_store(rows, layout=layout)
    settings = replace(QUICK, autoencoder=SubspaceConfig(latent_dim=30, explained_variance=1.0))
    whole = fit(store, settings, out=tmp_path / "whole")
    half = fit(
        store, replace(settings, autoencoder=replace(settings.autoencoder, basis_dtype="bfloat16")), out=tmp_path
    )

    sizes = [len(file_of(folder)) for folder in (tmp_path, tmp_path / "whole")]
    found = WeightGenerator.load(tmp_path)
    assert found.config.autoencoder.basis_dtype == "bfloat16"
    assert found.autoencoder.basis.dtype == torch.bfloat16
    assert 0.5 < sizes[0] / sizes[1] < 0.55
    one, two, exact = (g.sample(5, rng=torch.Generator().manual_seed(0))["w"] for g in (half, found, whole))
    assert torch.equal(one, two)
    assert 0 < (one - exact).norm() < 2**-8 * (exact - exact.mean(0)).norm()


def test_a_large_basis_is_written_once_into_the_same_file(make_store, tmp_path, monkeypatch):
    layout = Layout((TensorSpec("w", (4, 50), "float32", "parameter"), TensorSpec("b", (7,), "float32", "parameter")))
    store = make_store(layout=layout)
    monkeypatch.setattr(Split, "block_values", lambda split, memory_gb: 16)
    fit(store, QUICK, out=tmp_path / "small")
    seen = []
    monkeypatch.setattr("pdiff_plugin.fitting.subspace_stage._MAPPED_BYTES", 100)
    monkeypatch.setattr("pdiff_plugin.fitting.subspace_stage.mapped", None)  # nowhere else

    generator = fit(store, QUICK, out=tmp_path / "large", on_progress=lambda progress: seen.append(progress.stage))

    assert file_of(tmp_path / "large") == file_of(tmp_path / "small")
    assert seen[-1] == "autoencoder"
    assert generator.sample(1)["w"].shape == (1, 4, 50)


def test_a_fit_that_is_interrupted_while_a_large_basis_is_written_goes_on(make_store, tmp_path, monkeypatch):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "whole")
    monkeypatch.setattr("pdiff_plugin.fitting.subspace_stage._MAPPED_BYTES", 100)
    seen = []

    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "cut", on_progress=InterruptAt("autoencoder"))
    left = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert json.loads((tmp_path / "cut" / "fit.json").read_text())["status"] == "running"
    fit(store, QUICK, out=tmp_path / "cut", on_progress=lambda progress: seen.append(progress.stage))

    assert left == ["diffusion.checkpoint.safetensors", "fit.json", "statistics.checkpoint.safetensors"]
    assert file_of(tmp_path / "cut") == file_of(tmp_path / "whole")
    assert set(seen) == {"autoencoder"}


def test_the_basis_of_a_large_model_is_bfloat16_unless_said_otherwise(make_store, tmp_path, monkeypatch):
    store = make_store()
    small = fit(store, QUICK, out=tmp_path / "small")
    monkeypatch.setattr("pdiff_plugin.config._MAX_FLOAT32_VALUES", store.layout.num_values - 1)

    large = fit(store, QUICK)
    asked = fit(store, replace(QUICK, autoencoder=replace(QUICK.autoencoder, basis_dtype="float32")))

    dtypes = [generator.autoencoder.basis.dtype for generator in (small, large, asked)]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    # As an earlier release, which does not know "auto", writes and reads it.
    assert (small.config.autoencoder.basis_dtype, large.config.autoencoder.basis_dtype) == ("float32", "bfloat16")


def test_a_fit_that_began_with_a_float32_basis_goes_on_with_it_however_large(make_store, tmp_path, monkeypatch):
    store = make_store()
    of_old = replace(QUICK, autoencoder=replace(QUICK.autoencoder, basis_dtype="float32"))
    fit(store, of_old, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(store, of_old, out=tmp_path / "cut", on_progress=InterruptAt("diffusion", 20))
    monkeypatch.setattr("pdiff_plugin.config._MAX_FLOAT32_VALUES", 1)

    fit(store, QUICK, out=tmp_path / "cut")

    assert file_of(tmp_path / "cut") == file_of(tmp_path / "whole")


def test_a_fit_from_before_a_setting_existed_counts_as_one_with_its_default(make_store, tmp_path):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "fit")
    before = file_of(tmp_path / "fit")
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    del document["config"]["autoencoder"]["basis_dtype"]
    del document["config"]["autoencoder"]["kind"]
    (tmp_path / "fit" / "fit.json").write_text(json.dumps(document))
    tensors = load_file(tmp_path / "fit" / "generator.safetensors")
    with safe_open(tmp_path / "fit" / "generator.safetensors", framework="pt") as file:
        header = {**file.metadata(), "config": json.dumps(document["config"])}
    save_file(tensors, tmp_path / "fit" / "generator.safetensors", header)

    found = fit(store, QUICK, out=tmp_path / "fit")

    assert found.config == QUICK.settled(store.layout.num_values)
    assert len(file_of(tmp_path / "fit")) < len(before)  # it was taken as it is


def test_a_longer_fit_returns_the_mean_and_spread_of_the_snapshots(make_store):
    store = make_store(num_snapshots=200)
    config = FitConfig(diffusion=DiffusionConfig(width=64, max_steps=600))

    weights = fit(store, config).sample(200, rng=torch.Generator().manual_seed(0))

    flat, rows = store.layout.flatten(weights), store.rows()
    movement = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
    assert (flat.mean(0) - rows.mean(0)).norm() < 0.35 * movement
    spread = (flat - flat.mean(0)).square().sum(1).mean().sqrt()
    assert 0.6 * movement < spread < 1.4 * movement


def test_nothing_is_written_without_a_folder(make_store, tmp_path, monkeypatch):
    store = make_store()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    fit(store, QUICK)

    assert sorted(tmp_path.rglob("*")) == before


def test_two_fits_of_one_seed_are_equal_and_of_another_are_not(make_store, tmp_path):
    store = make_store()
    before = torch.get_rng_state()

    fit(store, QUICK, out=tmp_path / "a")
    torch.manual_seed(99)
    fit(store, QUICK, out=tmp_path / "b")
    torch.set_rng_state(before)
    other = FitConfig(autoencoder=QUICK.autoencoder, diffusion=QUICK.diffusion, seed=1)
    fit(store, other, out=tmp_path / "c")

    assert file_of(tmp_path / "a") == file_of(tmp_path / "b")
    assert WeightGenerator.load(tmp_path / "c").report != WeightGenerator.load(tmp_path / "a").report


def test_global_random_state_is_left_alone(make_store):
    store = make_store()
    before = torch.get_rng_state()

    fit(store, QUICK)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_fit_returns_at_once(make_store, tmp_path):
    store = make_store()
    first = fit(store, QUICK, out=tmp_path / "fit")
    stages = []

    again = fit(store, QUICK, out=tmp_path / "fit", on_progress=lambda p: stages.append(p.stage))

    assert stages == []
    assert again.report == first.report


@pytest.mark.parametrize(
    ("stage", "step"), [("statistics", 0), ("autoencoder", 0), ("diffusion", 20), ("diffusion", 60)]
)
@pytest.mark.parametrize("trajectories", [1, 2])
def test_an_interrupted_fit_goes_on_to_the_same_generator(make_store, tmp_path, stage, step, trajectories):
    store = make_store(trajectories=trajectories)
    fit(store, QUICK, out=tmp_path / "whole")
    seen = []

    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "cut", on_progress=InterruptAt(stage, step))
    fit(store, QUICK, out=tmp_path / "cut", on_progress=seen.append)

    assert file_of(tmp_path / "cut") == file_of(tmp_path / "whole")
    if stage == "diffusion":
        assert not any(p.stage == "statistics" for p in seen)
        assert all(p.step > step for p in seen if p.stage == "diffusion")


def test_an_interruption_inside_a_step_goes_back_to_the_last_whole_one(make_store, tmp_path, monkeypatch):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "whole")
    monkeypatch.setattr("pdiff_plugin.fitting.training.CHECKPOINT_EVERY_S", 0.0)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = torch._foreach_lerp_
    monkeypatch.setattr("torch._foreach_lerp_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "cut")
    fit(store, QUICK, out=tmp_path / "cut")

    assert file_of(tmp_path / "cut") == file_of(tmp_path / "whole")


def test_a_fit_of_other_settings_in_the_folder_is_not_touched(make_store, tmp_path):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "fit")
    before = file_of(tmp_path / "fit")

    with pytest.raises(FitExistsError) as error:
        fit(store, FitConfig(), out=tmp_path / "fit")

    assert str(error.value) == (
        f"{tmp_path / 'fit'} holds another fit (other settings). "
        "Choose another output folder, or pass --fresh (fresh=True) to replace it."
    )
    assert file_of(tmp_path / "fit") == before


@pytest.mark.parametrize("differ_by", ["number", "values"])
def test_a_fit_of_other_snapshots_in_the_folder_is_refused_and_replaced_when_asked(make_store, tmp_path, differ_by):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "fit")
    rows = store.rows()[:30] if differ_by == "number" else 2.0 * store.rows()
    other = make_store(rows, name="other")

    with pytest.raises(FitExistsError, match="other snapshots"):
        fit(other, QUICK, out=tmp_path / "fit")
    generator = fit(other, QUICK, out=tmp_path / "fit", fresh=True)

    assert generator.provenance["store"] == str(tmp_path / "other")


@pytest.mark.parametrize("status", ["finished", "running"])
def test_a_store_that_was_exchanged_in_its_last_columns_alone_is_refused(make_store, tmp_path, status):
    layout = Layout((TensorSpec("w", (500,), "float32", "parameter"), TensorSpec("b", (8,), "float32", "parameter")))
    store = make_store(layout=layout)
    fit(store, QUICK, out=tmp_path / "fit")
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    (tmp_path / "fit" / "fit.json").write_text(json.dumps({**document, "status": status}))
    rows = store.rows()
    rows[:, 500:] += 1.0
    other = make_store(rows, name="other", layout=layout)

    with pytest.raises(FitExistsError, match="other snapshots"):
        fit(other, QUICK, out=tmp_path / "fit")


def test_a_fit_from_before_there_was_a_fingerprint_of_the_whole_row_is_taken_as_it_is(make_store, tmp_path):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "fit")
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    del document["fingerprint"]
    (tmp_path / "fit" / "fit.json").write_text(json.dumps(document))
    stages = []

    fit(store, QUICK, out=tmp_path / "fit", on_progress=lambda p: stages.append(p.stage))

    assert stages == []
    with pytest.raises(FitExistsError, match="other snapshots"):
        fit(make_store(2.0 * store.rows(), name="other"), QUICK, out=tmp_path / "fit")


def test_a_fit_that_an_older_release_left_unfinished_goes_on_to_the_generator_of_a_whole_one(tmp_path):
    shutil.copytree(DATA / "fit-v1-unfinished", tmp_path / "cut")
    document = json.loads((tmp_path / "cut" / "fit.json").read_text())
    document["store"] = str((DATA / "store-v1-fitted").resolve())
    (tmp_path / "cut" / "fit.json").write_text(json.dumps(document))
    config, seen = FitConfig.from_json(document["config"]), []
    fit(DATA / "store-v1-fitted", config, out=tmp_path / "whole")

    fit(DATA / "store-v1-fitted", config, out=tmp_path / "cut", on_progress=seen.append)

    assert [(p.stage, p.step) for p in seen if p.stage != "autoencoder"] == [("diffusion", 60)]
    # To rounding, because the first forty steps were taken on another machine.
    cut, whole = (load_file(tmp_path / name / "generator.safetensors") for name in ("cut", "whole"))
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)
    cut, whole = (json.loads((tmp_path / name / "fit.json").read_text())["history"] for name in ("cut", "whole"))
    assert [entry["step"] for entry in cut] == [0, 20, 40, 60]
    assert [entry["heldout_loss"] for entry in cut] == pytest.approx([entry["heldout_loss"] for entry in whole], 1e-4)


def test_fresh_forgets_an_interrupted_fit_and_keeps_files_of_others(make_store, tmp_path):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "cut", on_progress=InterruptAt("diffusion"))
    (tmp_path / "cut" / "notes.txt").write_text("mine")
    steps = []

    fit(store, QUICK, out=tmp_path / "cut", fresh=True, on_progress=lambda p: steps.append((p.stage, p.step)))

    assert ("diffusion", 20) in steps
    assert file_of(tmp_path / "cut") == file_of(tmp_path / "whole")
    assert (tmp_path / "cut" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("stage", ["centre", "distill"])
def test_fresh_forgets_the_checkpoints_of_all_stages(make_store, tmp_path, stage):
    store, checkpoint = make_store(), tmp_path / "fit" / f"{stage}.checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "fit", on_progress=InterruptAt("statistics"))
    checkpoint.write_bytes(b"of an earlier fit")

    with pytest.raises(KeyboardInterrupt):
        fit(store, replace(QUICK, seed=1), out=tmp_path / "fit", fresh=True, on_progress=InterruptAt("statistics"))

    assert not checkpoint.exists()


def test_a_fit_folder_of_a_newer_release_is_refused(make_store, tmp_path):
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "fit.json").write_text(json.dumps({"format": "pdiff-fit", "format_version": 7}))

    with pytest.raises(FormatVersionError, match="has format version 7; this release reads versions up to 1"):
        fit(make_store(), QUICK, out=tmp_path / "fit")


def test_a_folder_that_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"is not a snapshot store: it has no layout\.json"):
        fit(tmp_path, QUICK)


@pytest.mark.parametrize("count", [0, 9])
def test_too_few_snapshots_are_refused_with_their_number(make_store, count):
    store = make_store(torch.randn(count, 40))

    with pytest.raises(UnusableSnapshotsError) as error:
        fit(store, QUICK)

    assert str(error.value) == (
        f"{store.path}: found {count} snapshots, expected at least 10. "
        "Record more steps (last_steps, max_snapshots) or another run into the same store."
    )


def test_equal_snapshots_are_refused(make_store):
    store = make_store(torch.ones(20, 40))

    with pytest.raises(UnusableSnapshotsError) as error:
        fit(store, QUICK)

    assert str(error.value) == (
        f"{store.path}: found 20 snapshots that are all equal, expected weights that move. "
        "Record while the chosen layers train, with a learning rate above 0."
    )


def test_snapshots_with_nan_are_left_out_and_named_by_step(make_store, tmp_path, caplog):
    store = make_store()
    rows = store.rows()
    rows[4, 3], rows[17, 30] = float("nan"), float("inf")
    broken = make_store(rows, name="broken")

    with caplog.at_level(logging.WARNING):
        generator = fit(broken, QUICK, out=tmp_path / "fit")

    assert "1 snapshots hold NaN or Inf and are left out (run-001 step 5)" in caplog.text
    assert "(run-001 step 18)" in caplog.text
    assert generator.provenance["num_snapshots"] == 38
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert document["nonfinite_steps"] == ["run-001 step 5", "run-001 step 18"]
    assert all(t.isfinite().all() for t in generator.sample(4).values())


def test_snapshots_with_nan_are_named_in_the_order_of_runs_and_steps_and_no_others_are(make_store, monkeypatch):
    layout = Layout((TensorSpec("w", (1,), "float32", "parameter"),))
    for _ in range(2):
        store = make_store(torch.zeros(10_000, 1), layout=layout)
    lost = [8, 1999, 10_004, 17_000]
    is_lost = torch.zeros(20_000, dtype=torch.bool).index_fill_(0, torch.tensor(lost), True)
    named, original = [], statistics_stage.names_of
    monkeypatch.setattr(
        statistics_stage, "names_of", lambda store, rows: named.append(len(rows)) or original(store, rows)
    )

    found = nonfinite_names(Split.choose(store, (~is_lost).nonzero().squeeze(1), 0.1))

    assert found == ["run-001 step 9", "run-001 step 2000", "run-002 step 5", "run-002 step 7001"]
    assert named == [4]


def test_more_than_five_percent_of_snapshots_with_nan_are_refused(make_store):
    rows = make_store().rows()
    rows[[4, 5, 20], 0] = float("nan")
    broken = make_store(rows, name="broken")

    with pytest.raises(UnusableSnapshotsError) as error:
        fit(broken, QUICK)

    assert str(error.value) == (
        f"{broken.path}: found 3 of 40 snapshots with NaN or Inf (run-001 step 5, run-001 step 6, run-001 step 21), "
        "expected at most 5%. The recorded training diverged. Lower its learning rate and record again."
    )


def test_a_run_without_a_usable_snapshot_is_refused_by_name(make_store):
    make_store(num_snapshots=100)
    store = make_store(torch.full((3, 40), float("nan")))

    with pytest.raises(UnusableSnapshotsError, match=r"no snapshot without NaN or Inf in run-002, .*Delete the folder"):
        fit(store, QUICK)


def test_runs_of_one_snapshot_each_are_refused(make_store):
    for number in range(12):
        store = make_store(torch.randn(1, 40, generator=torch.Generator().manual_seed(number)))

    with pytest.raises(
        UnusableSnapshotsError, match="12 trajectories of at most 1 snapshots, expected one of at least"
    ):
        fit(store, QUICK)


def test_a_short_run_beside_a_long_one_is_named_in_a_warning(make_store, caplog):
    make_store(num_snapshots=40)
    store = make_store(num_snapshots=3)

    with caplog.at_level(logging.WARNING):
        fit(store, QUICK)

    assert "fewer than 10 snapshots each, these trajectories say little of how weights move: run-002 (3)" in caplog.text


def test_snapshots_that_mostly_stand_still_are_fitted_without_a_novelty(make_store):
    rows = make_store(num_snapshots=12).rows()
    rows[4:] = rows[4]

    generator = fit(make_store(rows, name="still"), QUICK)

    assert generator.report["novelty"] is None
    assert generator.sample(2)["head.weight"].isfinite().all()


def test_an_autoencoder_that_loses_heldout_variance_says_so(make_store, caplog):
    rng = torch.Generator().manual_seed(0)
    store = make_store(1.0 + 0.01 * torch.randn(40, 40, generator=rng))

    with caplog.at_level(logging.WARNING):
        generator = fit(store, QUICK)

    assert not generator.report["fidelity_is_ok"]
    assert "of the held-out snapshots' variance, below the 90 % asked for" in caplog.text


def test_members_cover_every_trajectory(make_store):
    generator = fit(make_store(trajectories=3), QUICK)

    assert generator.trajectories == ["run-001", "run-002", "run-003"]
    assert set(generator.report["trajectory_coverage"]) == set(generator.trajectories)
    assert sum(generator.report["trajectory_coverage"].values()) == pytest.approx(1.0, abs=1e-3)


def test_fitting_needs_no_ray(make_store):
    store = make_store()
    script = (
        "import sys; from pdiff_plugin import fit, FitConfig, DiffusionConfig\n"
        f"fit({str(store.path)!r}, FitConfig(diffusion=DiffusionConfig(max_steps=5)))\n"
        "assert 'ray' not in sys.modules and 'rich' not in sys.modules"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_nothing_is_held_out_when_asked(make_store):
    config = FitConfig(autoencoder=QUICK.autoencoder, diffusion=QUICK.diffusion, heldout_fraction=0.0)
    assert "copy_ratio" not in fit(make_store(), config).report


@pytest.fixture
def ctrl_c_interrupts():
    """Python's own handler, which other libraries replace and background jobs start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(make_store, tmp_path, monkeypatch):
    store = make_store()
    fit(store, QUICK, out=tmp_path / "whole")
    steps = []

    def pressed(*args, **kwargs):
        steps.append(None)
        if len(steps) == 30:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    original = torch._foreach_lerp_
    monkeypatch.setattr("torch._foreach_lerp_", pressed)
    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "cut")
    fit(store, QUICK, out=tmp_path / "cut")

    assert len(steps) == 60
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert file_of(tmp_path / "cut") == file_of(tmp_path / "whole")


def test_a_distilled_map_makes_in_one_step_what_the_sampler_makes(make_store, tmp_path):
    store = make_store()
    settings = DiffusionConfig(width=32, num_blocks=1, max_steps=60, batch_size=16, distill_steps=200)

    generator = fit(store, FitConfig(diffusion=settings), out=tmp_path / "fit")
    slow, fast = (
        generator.sample_latents(200, sampler=sampler, rng=torch.Generator().manual_seed(0))
        for sampler in ("flow", "one-step")
    )

    assert (fast - slow).norm() < 0.2 * slow.norm()
    again = WeightGenerator.load(tmp_path / "fit").sample_latents(
        200, sampler="one-step", rng=torch.Generator().manual_seed(0)
    )
    assert torch.equal(again, fast)


@pytest.mark.parametrize("prediction_type", ["flow", "epsilon", "v_prediction"])
def test_diversity_is_the_spread_of_members_over_that_of_snapshots(make_store, prediction_type):
    store = make_store(num_snapshots=100)
    generator = fit(store, replace(QUICK, diffusion=replace(QUICK.diffusion, prediction_type=prediction_type)))
    snapshots = store.rows().var(dim=0).sum().sqrt()

    for diversity in (0.5, 1.0, 1.5):
        latents = generator.sample_latents(400, diversity=diversity, rng=torch.Generator().manual_seed(0))
        spread = generator.autoencoder.decode(latents).var(dim=0).sum().sqrt()
        assert float(spread / snapshots) == pytest.approx(diversity, rel=0.25)


def test_another_sampler_than_the_measured_one_takes_diversity_as_the_temperature(make_store):
    diffusion = replace(QUICK.diffusion, prediction_type="epsilon", num_timesteps=50, sampler="ddpm")
    generator = fit(make_store(), replace(QUICK, diffusion=diffusion))

    def members(**options):
        return generator.sample_latents(4, rng=torch.Generator().manual_seed(0), **options)

    plain, wider = members(), members(diversity=1.5)
    generator.report["diversity_curve"] = [{"temperature": 1.0, "spread_ratio": 4.0}]

    assert torch.equal(members(), plain)
    assert torch.equal(members(diversity=1.5), wider)
    assert torch.equal(members(temperature=1.5), wider)


def test_training_goes_on_only_while_samples_are_novel(make_store):
    store = make_store(num_snapshots=100)
    long = DiffusionConfig(width=64, max_steps=800, patience=1000)

    free = fit(store, FitConfig(diffusion=replace(long, min_novelty=0.0), heldout_fraction=0.0))
    held = fit(store, FitConfig(diffusion=replace(long, min_novelty=0.95), heldout_fraction=0.0))

    assert held.report["novelty"] > free.report["novelty"]
    assert held.report["diffusion_steps"] < free.report["diffusion_steps"]


def test_runs_far_apart_are_reported_and_named_in_a_warning(make_store, caplog):
    with caplog.at_level(logging.WARNING):
        generator = fit(make_store(trajectories=3), QUICK)

    assert generator.report["trajectory_separation"] > 3
    assert "3 trajectories lie far apart" in caplog.text
    assert "trajectory_separation" not in fit(make_store(name="one"), QUICK).report


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"config": None}, "TypeError"),
        ({"config": {}}, "KeyError: 'autoencoder'"),
        ({"seconds": {"diffusion": "long"}}, "a history or seconds that are none"),
        ({"history": {}}, "a history or seconds that are none"),
        ({"bytes_read": {"statistics": "all"}}, "numbers of bytes that are none"),
        ({"status": 3}, "that are no text"),
    ],
)
def test_a_fit_json_of_something_else_is_refused_by_its_path(make_store, tmp_path, changes, text):
    store = make_store()
    FitFolder.open(store, QUICK, tmp_path / "fit", fresh=False)
    path = tmp_path / "fit" / "fit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(FormatError) as caught:
        fit(store, QUICK, out=tmp_path / "fit")
    assert str(caught.value).startswith(f"{path}: found ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "tensors", "state", "text"),
    [
        ("statistics", {"rows": torch.arange(40).flip(0)}, {}, "rows that are not places in the store, in order"),
        ("statistics", {"rows": torch.arange(1, 41)}, {}, "rows that are not places in the store, in order"),
        ("statistics", {"rows": torch.arange(40.0)}, {}, "tensor 'rows' of torch.float32"),
        ("statistics", {"gram": torch.eye(39).double()}, {}, "rows that are not places"),
        ("statistics", {"scales": torch.full((3,), torch.nan).double()}, {}, "tensor 'scales' with NaN or Inf"),
        ("diffusion", {"denoiser.network.outlet.bias": torch.zeros(1)}, {}, "tensor 'denoiser.network.outlet.bias' of"),
        ("diffusion", {"average.network.outlet.bias": None}, {}, "tensor 'average.network.outlet.bias' missing"),
        # AdamW would write beyond its end.
        ("diffusion", {"optimizer.0.exp_avg": torch.zeros(())}, {}, "tensor 'optimizer.0.exp_avg' of shape ()"),
        ("diffusion", {"optimizer.0.exp_avg": None}, {}, "an optimizer that lacks some of its moments"),
        ("diffusion", {"rng": torch.zeros(3, dtype=torch.uint8)}, {}, "RNG state"),
        ("diffusion", {}, {"step": -(10**6)}, "step -1000000 of"),
        ("diffusion", {}, {"step": 10**6}, "step 1000000 of"),
        ("diffusion", {}, {"history": [{"step": 1}]}, "KeyError: 'train_loss'"),
        ("diffusion", {}, {"best_loss": "low"}, "a best loss, a best step or seconds that are no number"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_way_out(make_store, tmp_path, stage, tensors, state, text):
    store = make_store()
    with pytest.raises(KeyboardInterrupt):
        fit(store, QUICK, out=tmp_path / "cut", on_progress=InterruptAt("diffusion", 20))
    path = tmp_path / "cut" / f"{stage}.checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    header["state"] = json.dumps(json.loads(header["state"]) | state)
    whole = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, path, header)

    with pytest.raises(FormatError) as caught:
        fit(store, QUICK, out=tmp_path / "cut")

    assert str(caught.value).startswith(f"{path}: found ")
    assert text in str(caught.value)
    assert str(caught.value).endswith("expected a checkpoint; use --fresh.")
