"""Every example runs to its end in its quick mode."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_prints_the_table_and_the_verdict(tmp_path: Path) -> None:
    text = run(str(EXAMPLES / "quickstart.py"), "--smoke", cwd=tmp_path)
    assert "WeightSet(8 members of 8 tensors)" in text
    for name in ("snapshots", "generated", "average", "gaussian", "noise"):
        assert f"\n{name} " in text


def test_a_workload_prints_its_table_and_its_curve(tmp_path: Path) -> None:
    text = run(str(EXAMPLES / "workloads.py"), "--smoke", "w1", cwd=tmp_path)
    for name in ("snapshots", "generated", "average", "gaussian"):
        assert f"\n{name} " in text
    assert "At equal novelty" in text


@pytest.mark.slow
def test_a_refined_generator_stands_beside_as_much_training(tmp_path: Path) -> None:
    text = run(str(EXAMPLES / "refine_runs.py"), "--smoke", "w1", cwd=tmp_path)
    for name in ("snapshots", "generated", "refined", "snapshots, each trained on", "run gone on, averages"):
        assert f"\n{name} " in text


@pytest.mark.slow
def test_a_whole_resnet_is_fitted_and_its_member_judged_beside_snapshots(tmp_path: Path) -> None:
    text = run(str(EXAMPLES / "whole_resnet.py"), "--smoke", cwd=tmp_path)
    assert "18 snapshots of 191,594 values" in text
    assert "generator file: " in text
    assert "accuracy of generated member 3: " in text
    assert "\ngenerated " in text


@pytest.mark.parametrize(
    ("options", "num_values"),
    [(["--smoke"], "16,384"), pytest.param([], "4,399,104", marks=pytest.mark.slow)],
    ids=["tiny", "half a billion"],
)
def test_adapters_of_a_language_model_are_generated(tmp_path: Path, options: list[str], num_values: str) -> None:
    pytest.importorskip("peft")
    text = run(str(EXAMPLES / "lora_language_model.py"), *options, "--out", str(tmp_path), cwd=tmp_path)
    assert f"40 snapshots of {num_values} values" in text
    lines = dict(line.split(": loss ", 1) for line in text.splitlines() if ": loss " in line)
    losses = {name: float(rest.split(",")[0]) for name, rest in lines.items()}
    assert losses.keys() == {
        "before training",
        "trained",
        "generated adapter 0",
        "generated adapter 1",
        "four generated adapters",
    }
    before = losses.pop("before training")
    assert max(losses.values()) < before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w2", "w3", "w5", "w6", "w7-cycles"])
def test_every_other_workload_runs_too(tmp_path: Path, name: str) -> None:
    text = run(str(EXAMPLES / "workloads.py"), "--smoke", name, cwd=tmp_path)
    assert "\ngenerated " in text
    assert "At equal novelty" in text


def test_a_dial_is_recorded_judged_refined_and_shown(tmp_path: Path) -> None:
    words = ["record", "judge", "refine", "table", "angle"]
    text = run(str(EXAMPLES / "dials.py"), *words, "--smoke", "--out", str(tmp_path), cwd=tmp_path)
    for variant in ("gaps of 60", "refined at recorded gaps of 60", "refined at any gaps of 60"):
        assert f"== angle {variant}, 1 seeds" in text
    assert "\nfrom the base, sweep's images " in text
    for name in ("trained", "generated", "shuffled", "nearest", "ridge", "joint", "input turned back", "best cheap"):
        assert f"\n{name} " in text
    assert (tmp_path / "angle-0" / "judged-gaps-of-60" / "conditions.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trial", "codes", "domains", "lora", "tradeoff"])
def test_every_other_dial_too(tmp_path: Path, name: str) -> None:
    text = run(str(EXAMPLES / "dials.py"), "record", "judge", "refine", "table", name, "--smoke", cwd=tmp_path)
    assert f"== {name}" in text
    assert "\ngenerated " in text
