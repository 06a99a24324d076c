"""The command line as a person meets it: tables, JSON, error texts and exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from pdiff_plugin import FitConfig, Layout, PDiffRecorder, SnapshotStore, WeightGenerator, __version__, cli
from pdiff_plugin.cli import main
from pdiff_plugin.config import ConvConfig, SubspaceConfig
from pdiff_plugin.snapshots.conditions import set_condition
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

TASK = """
import torch
from pdiff_plugin import Task

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Linear(5, 8)

    def forward(self, x):
        return self.norm(x)

def task():
    return Task(Net(), [(torch.zeros(2, 5), torch.full((2,), CLASS))])
"""
QUICK = ["--diffusion.max-steps", "40", "--diffusion.eval-every-n-steps", "20"]


@pytest.fixture
def fitted(walk_store: Path, tmp_path: Path) -> Path:
    assert main(["fit", str(walk_store), "--out", str(tmp_path / "fit"), *QUICK]) == 0
    return tmp_path / "fit"


def error_text(capsys: pytest.CaptureFixture[str]) -> str:
    """What the panel on stderr says, without its frame and line breaks."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_answers_within_a_second() -> None:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "pdiff_plugin.cli", "--help"], capture_output=True, text=True)
    # The promise is one second; a loaded machine gets five, and loading torch alone takes longer than that on one.
    assert time.perf_counter() - start < 5
    assert done.returncode == 0
    for command in cli.COMMANDS:
        assert command in done.stdout


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_wrong_usage_exits_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit"])
    assert caught.value.code == 2


def test_layers_lists_what_would_be_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "timm:resnet18", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in document["tensors"]] == [
        f"layer4.1.{norm}.{tensor}"
        for norm in ("bn1", "bn2")
        for tensor in ("weight", "bias", "running_mean", "running_var")
    ]
    assert document["num_values"] == 4096


def test_layers_prints_a_table_with_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "timm:resnet18", "--layers", "head"]) == 0
    text = capsys.readouterr().out
    assert "fc.weight" in text
    assert "1000 x 512" in text
    assert "513,000 values in 2 tensors" in text


def test_layers_of_an_unknown_model_names_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "timm:resnet1888"]) == 1
    assert "near it: " in error_text(capsys)


def test_inspect_shows_the_trajectories(walk_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(walk_store)]) == 0
    text = capsys.readouterr().out
    assert "60 snapshots" in text
    assert "run-001" in text
    assert "1..60" in text
    assert "48 values in 2 tensors: norm.weight, norm.bias" in text


def test_inspect_reports_a_truncated_chunk(walk_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk = walk_store / "trajectories" / "run-001" / "chunk-000002.safetensors"
    chunk.write_bytes((chunk.parent / "chunk-000001.safetensors").read_bytes()[:500])
    assert main(["inspect", str(walk_store)]) == 0
    assert "chunk-000002.safetensors: found an unreadable file" in capsys.readouterr().out


def test_inspect_of_something_else_says_what_was_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    text = error_text(capsys)
    assert "is not a snapshot store: it has no layout.json" in text
    assert "Give the folder that PDiffRecorder wrote" in text


def test_inspect_shows_what_a_fit_measured(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(fitted)]) == 0
    assert "spread_ratio" in capsys.readouterr().out


def test_what_a_fit_read_from_a_bucket_is_shown_beside_the_size_of_its_store(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = WeightGenerator.load(fitted)
    generator.report |= {"bytes_read": 3_030_000, "bytes_in_store": 2_000_000}
    generator.save(fitted)
    capsys.readouterr()
    assert main(["inspect", str(fitted)]) == 0
    text = capsys.readouterr().out
    assert "3.0 MB of a store of 2.0 MB" in text
    assert "bytes_read" not in text


def test_debug_adds_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_conditions_are_set_and_shown(walk_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = SnapshotStore.open(walk_store)
    for _ in range(2):
        TrajectoryWriter(walk_store, opened.layout).write_chunk(opened.rows(), opened.steps.tolist())
    assert main(["condition", str(walk_store)]) == 0
    assert "No run has a condition" in capsys.readouterr().out

    first = ["--set", "run-001", "angle=45", "style=ink", "user=0.5,-1", "on=true"]
    second = ["--set", "run-002", "angle=-1e-3", 'style="7"', "user=1,2", "on=False"]
    assert main(["condition", str(walk_store), *first, *second]) == 0
    text = capsys.readouterr().out
    assert re.search(r"trajectory +angle +style +user +on", text)
    assert re.search(r"run-001 +45 +ink +0\.5,-1\.0 +true", text)
    assert re.search(r"run-002 +-0\.001 +7 +1\.0,2\.0 +false", text)
    assert re.search(r"run-003 +- +- +- +-", text)

    assert main(["condition", str(walk_store), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["conditions"]["run-001"] == {"angle": 45, "style": "ink", "user": [0.5, -1.0], "on": True}
    assert document["conditions"]["run-003"] is None
    assert SnapshotStore.open(walk_store).conditions["run-002"]["style"] == "7"


def test_inspect_shows_conditions_as_columns_where_there_are_some(
    walk_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(walk_store)]) == 0
    before = capsys.readouterr().out
    set_condition(walk_store, "run-001", {"angle": 45.0, "user": list(range(8))})
    assert main(["inspect", str(walk_store)]) == 0
    text = capsys.readouterr().out
    assert "angle" not in before
    assert re.search(r"drift of the rest +angle +user", text)
    assert re.search(r"run-001 .* 45\.0 +0\.0,1\.0,2\.0,3\.0,4\.0,5\.0,\.\.\. \(8\)", text)
    assert main(["inspect", str(walk_store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trajectories"][0]["condition"]["angle"] == 45.0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["run-001"], "must be a run and NAME=VALUE pairs"),
        (["run-001", "angle"], "found 'angle', expected NAME=VALUE"),
        (["run-7", "angle=1"], "found no such trajectory"),
        (["run-001", "angle=nan"], "expected a finite number"),
        (["run-001", "=1"], "found '=1', expected NAME=VALUE"),
    ],
)
def test_a_condition_that_cannot_be_set_says_why(
    walk_store: Path, capsys: pytest.CaptureFixture[str], given: list[str], text: str
) -> None:
    assert main(["condition", str(walk_store), "--set", *given]) == 1
    assert text in error_text(capsys)
    assert SnapshotStore.open(walk_store).conditions == {}


def test_import_makes_a_store_of_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    files = []
    for step in (2, 10, 9):
        nn.init.constant_(model[1].weight, step)
        files.append(tmp_path / f"step-{step}.pt")
        torch.save(model.state_dict(), files[-1])

    assert main(["import", *map(str, files), "--store", str(tmp_path / "store"), "--layers", "norms"]) == 0

    assert "3 snapshots" in capsys.readouterr().out
    store = SnapshotStore.open(tmp_path / "store")
    assert [float(store.state_dict(i)["1.weight"][0]) for i in range(3)] == [2.0, 9.0, 10.0]


def test_import_says_that_a_store_keeps_to_its_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    command = ["import", str(tmp_path / "model.pt"), "--store", str(tmp_path / "store"), "--layers"]
    assert main([*command, "norms"]) == 0
    assert "the same tensors" not in capsys.readouterr().err

    assert main([*command, "all"]) == 0

    assert "the same tensors are taken, whatever --layers all says" in capsys.readouterr().err
    assert {spec.name.split(".")[0] for spec in SnapshotStore.open(tmp_path / "store").layout} == {"1"}


def test_import_of_something_else_says_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert main(["import", str(tmp_path / "notes.txt"), "--store", str(tmp_path / "store")]) == 1
    assert "notes.txt" in error_text(capsys)
    assert not (tmp_path / "store").exists()


@pytest.fixture
def sweep_files(tmp_path: Path) -> list[str]:
    """Checkpoints of a sweep over two angles, two steps each."""
    files = []
    for angle in (45, 90):
        for step in (1, 2):
            files.append(tmp_path / "ckpts" / f"angle={angle}-step{step}.pt")
            files[-1].parent.mkdir(exist_ok=True)
            torch.save(nn.Linear(3, 2).state_dict(), files[-1])
    return list(map(str, files))


@pytest.mark.parametrize("way", ["pattern", "table"])
def test_a_sweep_is_imported_with_its_conditions(
    sweep_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("name,loss,params_angle,params_lr\nangle=45,0.5,45,1\nangle=90,0.4,90,1\n")
    flags = ["--condition", r"angle=(\d+)"] if way == "pattern" else ["--conditions", str(table), "--columns", "angle"]
    command = ["import", *sweep_files, "--store", str(tmp_path / "store"), "--layers", "all"]

    assert main([*command, *flags]) == 0

    assert re.search(r"run-002 +2 +1\.\.2 +yes +- +90", capsys.readouterr().out)
    assert SnapshotStore.open(tmp_path / "store").conditions == {"run-001": {"angle": 45}, "run-002": {"angle": 90}}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--condition", r"tilt=([a-c]+)_"], "step1.pt: found nothing that 'tilt="),
        (["--condition", "angle"], "condition = 'angle': it must be NAME=REGEX with one group"),
        (["--conditions", "no.csv"], "no.csv: found"),
        (["--columns", "lr"], "--columns = 'lr': it must be given together with --conditions TABLE"),
        (["--conditions", "no.csv", "--condition", "a=(b)"], "--condition = 'a=(b)': it must be left out with --condi"),
    ],
)
def test_a_sweep_that_cannot_be_imported_says_why(
    sweep_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    assert main(["import", *sweep_files, "--store", str(tmp_path / "store"), "--layers", "all", *flags]) == 1
    assert text in error_text(capsys)
    assert not (tmp_path / "store").exists()


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Stores of three runs, 20 snapshots each."""
    layout = Layout.from_tensors({"norm.weight": torch.zeros(8, 5), "norm.bias": torch.zeros(8)})
    for number in range(3):
        writer = TrajectoryWriter(tmp_path / "grid" / f"seed-{number}" / "pdiff-snapshots", layout)
        writer.write_chunk(torch.randn(20, 48, generator=torch.Generator().manual_seed(number)), range(1, 21))
        writer.close()
    return tmp_path / "grid"


def test_merge_makes_one_store_of_many_and_says_what_it_did(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge", f"{grid}/*/pdiff-snapshots", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert f"{out}: added 3 trajectories with 60 snapshots, from 3 stores; 0.0 MB linked and 0.0 MB copied." in told.out
    assert f"{grid}/seed-1/pdiff-snapshots/trajectories/run-001 is seed-1-run-001 there" in told.out
    assert f"Next: pdiff inspect {out}   or   pdiff fit {out} --out FIT" in told.out
    assert "merge stores: 3/3" in told.err

    stores = [str(path) for path in sorted(grid.glob("*/*"))]  # as a shell writes a pattern out
    assert main(["merge", *stores, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["added"] == {}
    assert list(document["duplicates"].values()) == ["run-001", "seed-1-run-001", "seed-2-run-001"]
    assert main(["merge", stores[0], "--out", str(out)]) == 0
    assert f"{stores[0]}/trajectories/run-001 is there already, as run-001" in capsys.readouterr().out


def test_merge_tells_what_was_left_out_and_of_many_lines_how_many(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        shutil.copytree(grid / "seed-0", grid / f"copy-{number}")
    (grid / "seed-1/pdiff-snapshots/trajectories/empty").mkdir()
    assert main(["merge", f"{grid}/*/*", "--out", str(tmp_path / "merged")]) == 0
    told = capsys.readouterr().out
    assert told.count("is there already, as run-001") == 10
    assert "... and 2 more, which --json lists" in told
    assert f"! {grid}/seed-1/pdiff-snapshots/trajectories/empty holds no snapshots" in told


def test_merge_of_something_else_says_what_was_expected(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(grid), "--out", str(tmp_path / "merged")]) == 1
    assert "it holds 3 further down, which '" in error_text(capsys)
    assert main(["merge", f"{grid}/*/*", "--out", "s3://bucket/merged"]) == 1
    assert "out = 's3://bucket/merged': it must be a folder on disk" in error_text(capsys)
    with pytest.raises(SystemExit) as caught:
        main(["merge", "--out", str(tmp_path / "merged")])
    assert caught.value.code == 2


@pytest.mark.parametrize("is_pattern", [True, False])
def test_several_stores_are_fitted_judged_and_fitted_again_as_one(
    grid: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_pattern: bool,
) -> None:
    stores = [f"{grid}/*/pdiff-snapshots"] if is_pattern else [str(path) for path in sorted(grid.glob("*/*"))]
    command = ["fit", *stores, "--out", str(tmp_path / "fit"), *QUICK]
    assert main(command) == 0
    (tmp_path / "my_grid_task.py").write_text(TASK.replace("CLASS", "0"))
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "fit", "--task", "my_grid_task:task", "--num-members", "4"]) == 0
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trajectories"] == ["run-001", "seed-1-run-001", "seed-2-run-001"]
    assert main(["inspect", str(tmp_path / "fit" / "merged-store")]) == 0

    shutil.rmtree(grid / "seed-1")
    remaining = stores if is_pattern else [stores[0], stores[2]]
    assert main(["fit", *remaining, "--out", str(tmp_path / "fit"), *QUICK]) == 1
    assert "holds another fit (other snapshots)" in error_text(capsys)


def test_fit_prints_what_it_measured_as_json(
    walk_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(walk_store), "--out", str(tmp_path / "fit"), "--json", *QUICK]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["diffusion"]["max_steps"] == 40
    assert document["report"]["latent_dim"] >= 1


def test_fit_refuses_a_folder_with_another_fit(
    fitted: Path, walk_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["fit", str(walk_store), "--out", str(fitted), "--seed", "7", *QUICK]) == 1
    text = error_text(capsys)
    assert "holds another fit (other settings)" in text
    assert "--fresh" in text


def test_an_impossible_setting_is_named(walk_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", str(walk_store), "--out", str(tmp_path / "fit"), "--diffusion.num-timesteps", "0"])
    assert caught.value.code == 2
    assert "num_timesteps = 0" in error_text(capsys)


def test_generated_members_load_into_the_model(fitted: Path, tmp_path: Path) -> None:
    assert main(["generate", str(fitted), "--num-members", "3", "--out", str(tmp_path / "members")]) == 0
    files = sorted((tmp_path / "members").iterdir())
    assert [f.name for f in files] == [f"member-{i:04d}.safetensors" for i in range(3)]
    model = nn.ModuleDict({"norm": nn.Linear(5, 8), "other": nn.Linear(2, 2)})
    missing, unexpected = model.load_state_dict(load_file(files[1]), strict=False)
    assert missing == ["other.weight", "other.bias"]
    assert unexpected == []
    assert torch.equal(model["norm"].weight, load_file(files[1])["norm.weight"])


def test_one_seed_generates_the_same_members(fitted: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(["generate", str(fitted), "--num-members", "2", "--seed", "5", "--out", str(tmp_path / name)]) == 0
    a, b = (load_file(tmp_path / name / "member-0001.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_generate_does_not_overwrite_members_unasked(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(fitted), "--num-members", "2", "--out", str(tmp_path / "members")]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 1
    text = error_text(capsys)
    assert "already holds 2 members. Choose another output folder, or pass --overwrite to replace them" in text
    assert "fit" not in text.replace(str(tmp_path), "")
    assert "--fresh" not in text
    assert main([*command, "--overwrite"]) == 0


def test_generate_drops_members_that_are_not_good_enough(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", str(fitted), "--num-members", "6", "--out", str(tmp_path / "members"), "--json"]
    capsys.readouterr()
    assert main(command) == 0
    # All inputs are zeros, so the largest bias of a member is its answer to all of them.
    answers = [int(load_file(path)["norm.bias"].argmax()) for path in json.loads(capsys.readouterr().out)["members"]]
    (tmp_path / "my_gated_task.py").write_text(TASK.replace("CLASS", str(answers[0])))
    monkeypatch.chdir(tmp_path)

    assert main([*command, "--overwrite", "--keep-above", "0.5", "--task", "my_gated_task:task"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert len(document["members"]) == answers.count(answers[0])
    assert document["num_dropped"] == 6 - len(document["members"]) > 0
    assert len(list((tmp_path / "members").iterdir())) == len(document["members"])

    assert main([*command, "--keep-above", "0.5", "--overwrite"]) == 1
    assert "must be given together with --task" in error_text(capsys)
    assert len(list((tmp_path / "members").iterdir())) == len(document["members"])


def test_sweep_draws_the_diversity_beside_the_alternatives(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_swept_task.py").write_text(TASK.replace("CLASS", "0"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    command = ["sweep", str(fitted), "--num-members", "4", "--out", str(tmp_path / "sweep")]
    assert main([*command, "--task", "my_swept_task:task"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy against novelty" in shown
    assert "At equal novelty" in shown
    curve = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    generated = [point["setting"] for point in curve if point["set"] == "generated"]
    assert generated == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
    assert {point["set"] for point in curve} == {"snapshots", "generated", "average", "gaussian", "swag", "noise"}
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "--task" in error_text(capsys)


def test_the_old_spelling_of_a_sweep_does_the_same_and_says_so(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_old_task.py").write_text(TASK.replace("CLASS", "0"))
    monkeypatch.chdir(tmp_path)
    rest = [str(fitted), "--task", "my_old_task:task", "--seed", "3", "--json"]
    capsys.readouterr()
    assert main(["generate", *rest, "--sweep", "--overwrite", "--out", "old"]) == 0
    old = capsys.readouterr()
    assert "DeprecationWarning: `pdiff generate --sweep` will be removed; use `pdiff sweep`" in old.err
    assert main(["sweep", *rest, "--num-members", "16", "--out", "new"]) == 0
    new = capsys.readouterr()
    assert json.loads(old.out) == json.loads(new.out)
    assert "DeprecationWarning" not in new.err


def test_a_sweep_finds_a_store_that_has_moved_and_writes_json_for_a_single_member(
    fitted: Path,
    walk_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my_moved_task.py").write_text(TASK.replace("CLASS", "0"))
    monkeypatch.chdir(tmp_path)
    walk_store.rename(tmp_path / "elsewhere")
    command = ["sweep", str(fitted), "--num-members", "1", "--out", "sweep", "--json"]
    command += ["--task", "my_moved_task:task"]
    capsys.readouterr()
    assert main(command) == 1
    assert "pass --store" in error_text(capsys)

    assert main([*command, "--store", "elsewhere"]) == 0

    shown = capsys.readouterr().out
    for text in (shown, (tmp_path / "sweep" / "sweep.json").read_text()):
        points = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["points"]
        assert points[0]["wrong_iou_mean"] is None


@pytest.mark.parametrize(
    "setting",
    [
        ("--diversity", "0.5"),
        ("--trajectory", "run-001"),
        ("--sampler", "ddim"),
        ("--temperature", "0.9"),
        ("--num-sampling-steps", "5"),
        ("--keep-above", "0.5"),
        ("--num-workers", "2"),
    ],
    ids=lambda setting: setting[0],
)
def test_a_sweep_refuses_settings_that_it_would_not_use(
    setting: tuple[str, str], fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for spelling in (["sweep"], ["generate", "--sweep"]):
        with pytest.raises(SystemExit) as caught:
            main([*spelling, str(fitted), "--out", str(tmp_path / "sweep"), "--task", "no_such_module:task", *setting])
        assert caught.value.code == 2
        assert re.search(rf"[Uu]nrecognized .*{setting[0]}", error_text(capsys))


def test_keep_above_is_a_share_and_is_named_in_its_errors(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_strict_task.py").write_text(
        TASK.replace("torch.full((2,), CLASS)", "torch.tensor([0, 1])")  # one answer to both: at most half are right
    )
    monkeypatch.chdir(tmp_path)
    command = ["generate", str(fitted), "--num-members", "2", "--out", "members", "--task", "my_strict_task:task"]
    assert main([*command, "--keep-above", "75"]) == 1
    assert "--keep-above = 75.0: it must be a share of right answers, from 0 to 1" in error_text(capsys)
    assert main([*command, "--keep-above", "0.9"]) == 1
    assert "--keep-above = 0.9: it must be reached by a member" in error_text(capsys)


def test_members_need_no_store(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(fitted), "--out", str(tmp_path / "members"), "--store", "elsewhere"])
    assert caught.value.code == 2
    assert "--store" in error_text(capsys)


def fit_settings(args: list[str], monkeypatch: pytest.MonkeyPatch) -> FitConfig:
    """The settings that `pdiff fit` with these flags would fit with."""
    seen: list[FitConfig] = []

    class StopError(Exception):
        pass

    def instead(store: str, config: FitConfig, **options: object) -> None:
        seen.append(config)
        raise StopError

    monkeypatch.setattr("pdiff_plugin.fit", instead)
    with pytest.raises(StopError):
        main(["fit", "store", "--out", "fit", *args])
    return seen[0]


def test_flags_change_the_settings_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit_settings(["--preset", "paper"], monkeypatch) == FitConfig.paper()
    changed = fit_settings(
        ["--preset=paper", "--diffusion.max-steps", "50", "--autoencoder.lr", "0.1", "--seed", "3"], monkeypatch
    )
    paper = FitConfig.paper(seed=3)
    assert changed == dataclasses.replace(
        paper,
        autoencoder=dataclasses.replace(paper.autoencoder, lr=0.1),
        diffusion=dataclasses.replace(paper.diffusion, max_steps=50),
    )


@pytest.mark.parametrize("flag", ["--diffusion.precondition", "--diffusion.no-precondition"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_switch_of_the_diffusion_can_be_set_either_way(
    flag: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--preset", preset, "--diffusion.network", "residual", flag]
    assert fit_settings(args, monkeypatch).diffusion.precondition == ("no-" not in flag)


def test_either_autoencoder_can_be_chosen_with_all_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = ["--autoencoder", "conv", "--autoencoder.latent-dim", "9", "--autoencoder.channels", "8", "4"]
    assert fit_settings(conv, monkeypatch).autoencoder == ConvConfig(latent_dim=9, channels=(8, 4))
    plain = fit_settings(["--autoencoder.latent-dim", "32"], monkeypatch)
    assert plain.autoencoder == SubspaceConfig(latent_dim=32)
    other = fit_settings(["--preset", "paper", "--autoencoder", "subspace"], monkeypatch)
    assert other == dataclasses.replace(FitConfig.paper(), autoencoder=SubspaceConfig())


def test_the_help_of_fit_shows_every_setting_of_the_chosen_autoencoder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, kind in (("subspace", SubspaceConfig), ("conv", ConvConfig)):
        with pytest.raises(SystemExit):
            main(["fit", "--autoencoder", name, "--help"])
        text = capsys.readouterr().out
        shown = set(re.findall(r"--autoencoder\.([a-z-]+)", text))
        assert {field.name.replace("_", "-") for field in dataclasses.fields(kind)} <= shown
        assert f"(default: {name})" in text


def test_help_texts_of_several_lines_flow(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = flowing(capsys.readouterr().out)
    assert (
        "Factor on the noise that sampling starts from, and on what `ddpm` and `ddim` add. Below 1 members move" in text
    )
    assert not re.search(r"questions asked", text, re.IGNORECASE)


def flowing(text: str) -> str:
    """Help without its frame and line breaks."""
    return " ".join(text.replace("│", " ").split())


def test_a_retrained_ensemble_needs_a_training_function(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_trained_task.py").write_text(
        TASK.replace("CLASS", "0") + "\n\ndef train(seed):\n    torch.manual_seed(seed)\n    return Net()\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", str(fitted), "--task", "my_trained_task:task", "--num-members", "2", "--sets", "core"]
    assert main([*command, "--num-retrained", "3"]) == 1
    assert "--num-retrained = 3: it must be given together with --train-with" in error_text(capsys)

    assert main([*command, "--json", "--retrain", "2", "--train-with", "my_trained_task:train"]) == 0

    told = capsys.readouterr()
    assert json.loads(told.out)["sets"]["deep-ensemble"]["members"] == 2
    assert "`pdiff evaluate --retrain` will be removed; use --num-retrained" in told.err


def test_evaluate_saves_the_best_and_says_how_it_is_loaded(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_eight_items.py").write_text(
        TASK.replace("torch.zeros(2, 5)", "torch.randn(8, 5, generator=torch.Generator().manual_seed(0))").replace(
            "torch.full((2,), CLASS)", "torch.arange(8)"
        )
    )
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", str(fitted), "--task", "my_eight_items:task", "--num-members", "4"]
    assert main([*command, "--save-best", "best", "--best-passes", "0.5"]) == 1
    assert "--best-passes = 0.5: it must be at least 1" in error_text(capsys)

    assert main([*command, "--save-best", "best"]) == 0
    told = capsys.readouterr().out
    assert "Best for one pass: " in told
    assert "Best for eight passes: " in told
    line = next(line.strip() for line in told.splitlines() if "best.safetensors" in line)
    import safetensors.torch

    model = importlib.import_module("my_eight_items").Net()
    exec(line.strip(), {"model": model, "safetensors": safetensors})
    assert torch.equal(model.norm.weight, load_file(tmp_path / "best" / "best.safetensors")["norm.weight"])


@pytest.mark.parametrize(("given", "sets"), [(["core"], "core"), (["swa", "average"], ("swa", "average"))])
def test_sets_are_a_choice_or_names(
    given: list[str], sets: object, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    def instead(*args: object, sets: object, **options: object) -> None:
        seen.append(sets)
        raise StopError

    seen: list[object] = []
    (tmp_path / "my_chosen_task.py").write_text(TASK.replace("CLASS", "0"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pdiff_plugin.evaluate", instead)
    with pytest.raises(StopError):
        main(["evaluate", str(fitted), "--task", "my_chosen_task:task", "--sets", *given])
    assert seen == [sets]


def test_generate_without_a_generator_says_where_one_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path), "--out", str(tmp_path / "members")]) == 1
    assert "holds no generator.safetensors. Give the --out folder of a finished `pdiff fit`" in error_text(capsys)


def test_evaluate_names_a_task_that_cannot_be_imported(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(fitted), "--task", "no_such_module:task"]) == 1
    assert "must name a module that can be imported" in error_text(capsys)
    assert main(["evaluate", str(fitted), "--task", "json"]) == 1
    assert "must be package.module:function" in error_text(capsys)
    assert main(["evaluate", str(fitted), "--task", "collections:OrderedDict"]) == 1
    assert "must return a Task, not a OrderedDict" in error_text(capsys)
    assert main(["evaluate", str(fitted), "--task", "./my_task.py:task"]) == 1
    assert "not a path; give my_task:task" in error_text(capsys)


def test_evaluate_says_so_when_the_store_has_moved(
    fitted: Path, walk_store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    walk_store.rename(walk_store.with_name("elsewhere"))
    (fitted.parent / "my_task.py").write_text(TASK.replace("CLASS", "0"))
    monkeypatch.chdir(fitted.parent)
    assert main(["evaluate", str(fitted), "--task", "my_task:task"]) == 1
    assert "pass --store" in error_text(capsys)


def test_an_out_that_is_a_file_is_told_before_the_work(
    fitted: Path, walk_store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fitted.parent / "my_plain_task.py").write_text(TASK.replace("CLASS", "0"))
    (fitted.parent / "taken").write_text("a file of the user's")
    monkeypatch.chdir(fitted.parent)
    monkeypatch.setattr("pdiff_plugin.evaluate", lambda *a, **k: pytest.fail("scored first"))
    monkeypatch.setattr("pdiff_plugin.sweep", lambda *a, **k: pytest.fail("scored first"))
    task = ["--task", "my_plain_task:task"]
    for command in (
        ["fit", str(walk_store)],
        ["generate", str(fitted)],
        ["sweep", str(fitted), *task],
        ["evaluate", str(fitted), *task],
    ):
        capsys.readouterr()
        assert main([*command, "--out", "taken"]) == 1, command
        text = error_text(capsys)
        assert "FileExistsError" in text or "NotADirectoryError" in text, command
        assert "taken" in text, command
        assert "Traceback" not in text, command
    assert (fitted.parent / "taken").read_text() == "a file of the user's"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_fit_says_so_and_the_same_command_goes_on(
    walk_store: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "fit"
    command = [sys.executable, "-m", "pdiff_plugin.cli", "fit", str(walk_store), "--out", str(out)]
    command += ["--diffusion.max-steps", "400", "--diffusion.eval-every-n-steps", "10", "--diffusion.patience", "1000"]
    # A background job starts with Ctrl-C ignored, and so would its children.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    while not (out / "fit.json").exists() or not json.loads((out / "fit.json").read_text())["history"]:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again" in err
    before = json.loads((out / "fit.json").read_text())
    assert before["status"] == "running"

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    after = json.loads((out / "fit.json").read_text())
    assert after["status"] == "finished"
    kept = before["history"][: len(before["history"]) - 1]
    assert after["history"][: len(kept)] == kept
    assert [entry["step"] for entry in after["history"] if entry["step"]] == list(range(10, 401, 10))
    assert len(SnapshotStore.open(walk_store)) == 60


def test_a_closed_pipe_is_no_traceback(walk_store: Path) -> None:
    command = f"{sys.executable} -m pdiff_plugin.cli inspect {walk_store} --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr


def test_fit_offers_alignment_and_refuses_it_for_a_single_norm(
    walk_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "--align {none,rebasin}" in capsys.readouterr().out
    assert main(["fit", str(walk_store), "--out", str(tmp_path / "fit"), "--align", "rebasin", *QUICK]) == 1
    assert "Tensor 'norm.weight' of shape (8, 5)" in error_text(capsys)


@pytest.fixture(scope="module")
def sweep_fit(sweep_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "fit"
    quick = ["--diffusion.max-steps", "50", "--diffusion.width", "32"]
    held = ["--condition", "angle:cyclic=360", "--hold-out", "angle=90,210"]
    assert main(["fit", str(sweep_store), "--out", str(out), *quick, *held]) == 0
    return out


def test_a_fit_on_conditions_tells_what_it_learned_and_from_what(
    sweep_fit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(sweep_fit)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"num_conditions +10", text)
    assert re.search(r"angle +cyclic +10 +0 to 330", text)
    assert re.search(r"style +category +2 +ink, oil", text)
    assert main(["inspect", str(sweep_fit), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["condition"]["num_conditions"] == 10


def test_members_are_made_for_a_condition(sweep_fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(sweep_fit), "--num-members", "2"]
    assert main([*command, "--out", str(tmp_path / "one"), "--condition", "angle=50", "style=ink"]) == 0
    with safe_open(tmp_path / "one" / "member-0001.safetensors", "pt") as file:
        assert json.loads(file.metadata()["condition"]) == {"angle": 50, "style": "ink"}

    lines = tmp_path / "many.jsonl"
    lines.write_text('{"angle": 50, "style": "ink"}\n\n{"angle": 400}\n')
    assert main([*command, "--out", str(tmp_path / "many"), "--conditions", str(lines)]) == 0
    assert "4 members" in capsys.readouterr().out
    one, first, second = (
        load_file(tmp_path / place / "member-0001.safetensors")
        for place in ("one", "many/condition-0000", "many/condition-0001")
    )
    assert all(torch.equal(one[name], first[name]) for name in one)
    assert not all(torch.equal(one[name], second[name]) for name in one)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--condition", "angel=50"], "the unknown name 'angel' (did you mean 'angle'?)"),
        (["--condition", "style=chalk"], "found style = 'chalk', expected one of ink, oil"),
        (["--condition", "angle"], "found 'angle', expected NAME=VALUE"),
        (["--condition", "angle=1", "angle=2"], "found 'angle' twice, expected each name once"),
        (["--condition", "angle=@no.npy"], "@no.npy, which cannot be read"),
        (["--conditions", "LINES", "--condition", "angle=1"], "must be given without --condition"),
        (["--conditions", "LINES"], "lines.jsonl, line 2: found {oops, expected a JSON mapping"),
        (["--conditions", "no.jsonl"], "expected a JSON mapping a line"),
    ],
)
def test_a_condition_that_cannot_be_is_told_before_anything_is_written(
    sweep_fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], text: str
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"angle": 50}\n{oops\n')
    out = tmp_path / "members"
    given = [str(lines) if one == "LINES" else one for one in given]
    assert main(["generate", str(sweep_fit), "--out", str(out), *given]) == 1
    assert text in error_text(capsys)
    assert not out.exists()


def test_a_generator_is_refined_by_a_loss_and_says_what_that_gave(
    sweep_fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"refining_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(
        "import torch\nfrom pdiff_plugin import Task\n\n"
        "def task(angle):\n    return Task(torch.nn.Sequential(), [])\n\n"
        "def net(angle):\n"
        "    model = torch.nn.Module()\n    model.norm = torch.nn.Linear(5, 8)\n"
        "    model.forward = lambda x: model.norm(x)\n    return Task(model, [])\n\n"
        "def loss(model, condition):\n    x = torch.randn(16, 5)\n"
        "    return (model(x) - condition['angle'] / 100).square().mean()\n\n"
        "def trained(angle):\n    data = [(torch.randn(16, 5), torch.full((16, 8), angle / 100))]\n"
        "    return Task(net(angle).model, [], data, kind='regression')\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["refine", str(sweep_fit), "--task", f"{module}:net", "--loss", f"{module}:loss", "--out", "refined"]
    quick = ["--num-steps", "60", "--num-directions", "2", "--lr", "0.01"]
    (tmp_path / "at.jsonl").write_text(
        "".join(f'{{"angle": {angle}, "style": "ink"}}\n' for angle in range(0, 360, 20))
    )
    assert main([*command, *quick, "--conditions", "at.jsonl"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"refined +\d+ ", text)
    assert "2 of 18 conditions held out" in text
    assert "pdiff evaluate refined --task" in text
    report = WeightGenerator.load(tmp_path / "refined").report["refinement"]
    assert report["heldout_loss"] < report["heldout_loss_before"]
    assert main([*command, *quick, "--conditions", "at.jsonl", "--json"]) == 0  # it had finished
    assert json.loads(capsys.readouterr().out) == report

    assert main([*command[:-1], "other", "--task", f"{module}:task", *quick]) == 1
    assert "norm.weight" in error_text(capsys)
    assert main([*command[:-1], "other", "--loss", f"{module}:task", *quick]) == 1
    assert "must name a function that takes model, condition" in error_text(capsys)
    assert main([*command[:2], "--task", f"{module}:net", "--out", "other", *quick]) == 1
    assert "train_loader = None" in error_text(capsys)
    assert not (tmp_path / "other" / "generator.safetensors").exists()

    assert main([*command[:2], "--task", f"{module}:trained", "--out", "by-task", *quick]) == 0
    report = WeightGenerator.load(tmp_path / "by-task").report["refinement"]
    assert report["heldout_loss"] < report["heldout_loss_before"]


def test_inspect_tells_of_a_run_that_ended_before_its_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(num_steps: int) -> None:
        model = torch.nn.Linear(3, 2)
        with PDiffRecorder(tmp_path, layers="all", last_steps=20).attach(model, total_steps=100) as recorder:
            for _ in range(num_steps):
                torch.nn.init.normal_(model.weight)
                recorder.step()

    record(61)
    assert main(["inspect", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "! run-001 has snapshots up to step 61 of 100, and its window begins at step 81: 12 of them were" in text
    record(100)
    assert main(["inspect", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "! run-001 has snapshots up to step 61 of 100, and its window begins at step 81: its 12 sparse" in text
    assert "run-002 20 81..100" in text
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in document["trajectories"]] == ["run-002"]
    assert len(document["left_out"]) == 1
