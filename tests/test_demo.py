"""The demo: the whole path on real data, as the README promises it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdiff_plugin import Evaluation, console, demo, describe
from pdiff_plugin.cli import main
from pdiff_plugin.config import DiffusionConfig, FitConfig
from pdiff_plugin.errors import FitExistsError
from pdiff_plugin.progress import OnProgress, Progress

FIGURES = {
    "members", "accuracy_mean", "accuracy_best", "accuracy_worst", "accuracy_std", "ensemble_accuracy", "ensemble_nll",
    "ensemble_ece", "wrong_iou_mean", "wrong_iou_max_to_snapshots", "nearest_snapshot_distance",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    """One run of `pdiff demo --json` in a process of its own: its folder and the document on its stdout."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "pdiff_plugin.cli", "demo", "--out", str(folder), "--json", "--num-threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_all_sets_are_judged_by_finite_figures(finished: tuple[Path, Mapping[str, Any]]) -> None:
    _, document = finished
    assert {"snapshots", "generated", "average", "gaussian", "noise"} <= set(document["sets"])
    for name, figures in document["sets"].items():
        assert set(figures) >= FIGURES, name
        assert all(math.isfinite(figures[key]) for key in FIGURES - {"wrong_iou_mean"}), name
    assert isinstance(document["verdict"], str)
    assert {"train", "fit", "score"} <= set(document["seconds"])


def test_the_test_error_leaves_room_for_differences(finished: tuple[Path, Mapping[str, Any]]) -> None:
    _, document = finished
    assert 0.90 <= document["sets"]["snapshots"]["accuracy_mean"] <= 0.95


def test_generated_members_are_about_as_accurate_as_the_snapshots(finished: tuple[Path, Mapping[str, Any]]) -> None:
    _, document = finished
    sets = document["sets"]
    assert sets["generated"]["accuracy_mean"] >= sets["snapshots"]["accuracy_mean"] - 0.003


def test_everything_is_left_on_disk(finished: tuple[Path, Mapping[str, Any]]) -> None:
    folder, document = finished
    assert json.loads((folder / "evaluation" / "evaluation.json").read_text())["sets"] == document["sets"]
    assert (folder / "fit" / "generator.safetensors").is_file()
    assert (folder / "store" / "layout.json").is_file()


def test_the_same_seed_gives_the_same_figures(finished: tuple[Path, Mapping[str, Any]], tmp_path: Path) -> None:
    _, first = finished
    command = [sys.executable, "-m", "pdiff_plugin.cli", "demo", "--out", str(tmp_path / "x"), "--json"]
    done = subprocess.run([*command, "--num-threads", "1"], capture_output=True, text=True, check=True)
    second = json.loads(done.stdout)
    assert second["sets"] == first["sets"]
    assert second["verdict"] == first["verdict"]


def test_the_commands_that_it_prints_next_work(
    finished: tuple[Path, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    assert main(["inspect", str(folder / "store")]) == 0
    assert main(["inspect", str(folder / "fit")]) == 0
    assert main(["generate", str(folder / "fit"), "--num-members", "2", "--out", str(folder / "members")]) == 0
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main(["evaluate", "fit", "--task", "task:task", "--num-members", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sets"]["generated"]["members"] == 4


def test_its_table_is_whole_in_a_terminal_of_80_columns(
    finished: tuple[Path, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    monkeypatch.setattr(console, "out", Console(force_terminal=True, width=80, color_system=None, highlight=False))
    evaluation = Evaluation.load(folder / "evaluation")
    describe.show_evaluation(evaluation)
    table = capsys.readouterr().out.partition("best*: chosen")[0]
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert max(map(len, table.splitlines())) <= 80
    assert [line for line in lines if line.startswith("set ")] == [
        "set acc mean ens NLL IoU members ± std best* worst",
        "set ens acc at T ECE IoU to snap nearest passes",
    ]
    for name, *figures in evaluation.table()[1]:
        shown = [line.split()[1:] for line in lines if line.split()[:1] == [name]]
        assert sorted(cell for part in shown for cell in part) == sorted(figures)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a few seconds."""
    for name, value in {"NUM_EPOCHS": 20, "NUM_SNAPSHOTS": 40, "NUM_MEMBERS": 4}.items():
        monkeypatch.setattr(demo, name, value)
    diffusion = DiffusionConfig(max_steps=20, eval_every_n_steps=10)
    monkeypatch.setattr(demo, "FitConfig", lambda seed: FitConfig(seed=seed, diffusion=diffusion))


@pytest.mark.usefixtures("quick")
def test_an_interrupted_demo_goes_on_by_the_same_call(tmp_path: Path) -> None:
    stages: list[str] = []

    def interrupt_at(stage: str | None) -> OnProgress:
        def on_progress(report: Progress) -> None:
            stages.append(report.stage)
            if report.stage == stage:
                raise KeyboardInterrupt

        return on_progress

    whole = demo.run(tmp_path / "whole", on_progress=interrupt_at(None))
    after_training = list(dict.fromkeys(stages))[1:]
    assert stages[0] == "train"
    assert len(after_training) >= 2
    for stage in ("train", *after_training):
        with pytest.raises(KeyboardInterrupt):
            demo.run(tmp_path / "cut", on_progress=interrupt_at(stage))
    stages.clear()

    result = demo.run(tmp_path / "cut", on_progress=interrupt_at(None))

    assert "train" not in stages
    assert result.to_json()["sets"] == whole.to_json()["sets"]
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.usefixtures("quick")
def test_a_demo_goes_on_neither_with_another_seed_nor_with_a_store_of_the_users(tmp_path: Path) -> None:
    def interrupt(report: Progress) -> None:
        if report.stage != "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, seed=1, on_progress=interrupt)
    with pytest.raises(FitExistsError, match="a store that is not of a demo with this seed"):
        demo.run(tmp_path, seed=2)
    (tmp_path / "task.py").unlink()
    with pytest.raises(FitExistsError, match="a store that is not of a demo with this seed"):
        demo.run(tmp_path, seed=1)


def test_a_second_demo_in_the_same_folder_is_refused(
    finished: tuple[Path, Mapping[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    assert main(["demo", "--out", str(folder)]) == 1
    assert "--fresh" in capsys.readouterr().err


def test_the_split_is_the_same_each_time_and_shares_no_image() -> None:
    train, test = demo.digits()
    again, _ = demo.digits()
    assert (train.tensors[0] == again.tensors[0]).all()
    assert len(train) == demo.NUM_TRAIN
    assert len(train) + len(test) == 1797
