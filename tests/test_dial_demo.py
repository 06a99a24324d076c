"""The demo of a dial: a sweep over rotations, fitted to half of them and judged at the others."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pdiff_plugin import SnapshotStore, dial_demo
from pdiff_plugin.cli import main
from pdiff_plugin.errors import FitExistsError
from pdiff_plugin.progress import Progress


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    """One run of `pdiff demo --dial --json` in a process of its own: its folder and the document on its stdout."""
    folder = tmp_path_factory.mktemp("dial") / "out"
    command = [sys.executable, "-m", "pdiff_plugin.cli", "demo", "--dial", "--out", str(folder), "--json"]
    done = subprocess.run([*command, "--num-threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.fixture
def no_other_task() -> Iterator[None]:
    """Modules of user code are imported once in a process, and the other demo's has the same name."""
    sys.modules.pop("task", None)
    yield
    sys.modules.pop("task", None)


def losses(document: Mapping[str, Any]) -> dict[str, float]:
    """Mean loss of each row over the conditions."""
    places = document["conditions"]
    return {name: sum(place["rows"][name]["loss"] for place in places) / len(places) for name in places[0]["rows"]}


def test_it_is_judged_at_the_angles_between_the_fitted_ones(finished: tuple[Path, Mapping[str, Any]]) -> None:
    _, document = finished
    assert [place["condition"]["angle"] for place in document["conditions"]] == list(range(15, 360, 30))
    assert [condition["angle"] for condition in document["fitted"]] == list(range(0, 360, 30))
    assert not any(place["outside"] for place in document["conditions"])  # the circle has no outside
    assert all(math.isfinite(loss) for loss in losses(document).values())


def test_training_at_an_angle_is_worth_more_than_one_model_for_all(finished: tuple[Path, Mapping[str, Any]]) -> None:
    loss = losses(finished[1])
    assert loss["trained"] < 0.5 * loss["joint"]


def test_weights_generated_for_an_angle_are_for_that_angle(finished: tuple[Path, Mapping[str, Any]]) -> None:
    loss = losses(finished[1])
    assert loss["generated"] < 0.3 * loss["shuffled"]
    assert loss["generated"] < 0.3 * loss["average of all"]


def test_everything_is_left_on_disk(finished: tuple[Path, Mapping[str, Any]]) -> None:
    folder, document = finished
    assert json.loads((folder / "evaluation" / "conditions.json").read_text()) == document
    assert (folder / "fit" / "generator.safetensors").is_file()
    assert len(SnapshotStore.open(folder / "store").conditions) == 24


@pytest.mark.usefixtures("no_other_task")
def test_the_commands_that_it_prints_next_work(
    finished: tuple[Path, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, document = finished
    assert main(["condition", str(folder / "store")]) == 0
    assert main(["inspect", str(folder / "fit")]) == 0
    members = ["--num-members", "2", "--out", str(folder / "at-50")]
    assert main(["generate", str(folder / "fit"), "--condition", "angle=50", *members]) == 0
    monkeypatch.chdir(folder)
    capsys.readouterr()
    judged = ["--task", "task:task", "--conditions", "held-out", "--num-members", str(dial_demo.NUM_MEMBERS)]
    assert main(["evaluate", "fit", *judged, "--out", "again", "--json"]) == 0
    again = losses(json.loads(capsys.readouterr().out))
    assert again == {name: pytest.approx(losses(document)[name]) for name in again}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a few seconds."""
    brief = {
        "BASE_STEPS": 20,
        "NUM_STEPS": 20,
        "LAST_STEPS": 10,
        "JOINT_STEPS": 5,
        "DIFFUSION_STEPS": 20,
        "NUM_MEMBERS": 2,
    }
    for name, value in {**brief, "ANGLES": tuple(range(0, 360, 30)), "GAP": 60}.items():
        monkeypatch.setattr(dial_demo, name, value)


@pytest.mark.usefixtures("quick")
def test_an_interrupted_demo_goes_on_by_the_same_call(tmp_path: Path) -> None:
    def interrupt(report: Progress) -> None:
        if report.stage == "conditions":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dial_demo.run(tmp_path, on_progress=interrupt)
    stages: list[str] = []

    result = dial_demo.run(tmp_path, on_progress=lambda report: stages.append(report.stage))

    assert "train" not in stages
    assert len(result.places) == 6
    with pytest.raises(FitExistsError, match="the demo has run here before"):
        dial_demo.run(tmp_path)


@pytest.mark.usefixtures("quick")
def test_each_angle_is_trained_from_the_same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_demo, "LR", 0.0)
    dial_demo.record(tmp_path, tmp_path / "store", seed=0)
    store, base = SnapshotStore.open(tmp_path / "store"), dial_demo.load_task(tmp_path, 0.0).model
    assert len(store) == 12 * 10
    assert torch.equal(store.rows(), store.layout.flatten(base.state_dict()).expand(len(store), -1))


def test_angles_are_drawn_among_those_asked_for() -> None:
    assert set(dial_demo.at(15.0, 45.0)(200).tolist()) == {15.0, 45.0}


def test_a_quarter_turn_moves_no_pixel_aside() -> None:
    images = dial_demo.digits()[1][0][:4]
    torch.testing.assert_close(dial_demo.rotated(images, 90.0), images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
