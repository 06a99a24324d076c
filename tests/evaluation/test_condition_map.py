"""What `pdiff inspect` shows of a store's conditions."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pdiff_plugin import SnapshotStore
from pdiff_plugin.cli import main
from pdiff_plugin.errors import ConfigError, MissingDependencyError
from pdiff_plugin.evaluation.condition_map import axes_of, draw_text, save_picture, summary
from pdiff_plugin.snapshots.conditions import Condition, set_conditions
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

GRID: list[Condition] = [
    {"angle": angle, "noise": noise, "style": style, "on": True, "user": [noise, 3.0]}
    for angle in (0, 90, 180)
    for noise in (0.0, 0.5)
    for style in ("ink", "oil")
]


def test_the_summary_has_kind_number_and_range_of_each_name() -> None:
    assert summary(GRID) == [
        {"name": "angle", "kind": "number", "num_values": 3, "low": 0.0, "high": 180.0},
        {"name": "noise", "kind": "number", "num_values": 2, "low": 0.0, "high": 0.5},
        {"name": "style", "kind": "text", "num_values": 2, "values": ["ink", "oil"]},
        {"name": "on", "kind": "true or false", "num_values": 1, "values": [True]},
        {"name": "user", "kind": "list of 2 numbers", "num_values": 2, "low": 0.0, "high": 3.0},
    ]
    assert axes_of(summary(GRID)) == ["angle", "noise"]
    assert axes_of(summary(GRID[:1])) == []
    assert summary([]) == []


def test_a_condition_unlike_the_others_is_left_out_of_the_picture() -> None:
    odd: list[Condition] = [{"a": "ink"}, {"a": 0}, {"a": 10}, {"b": 3}, {"a": [1.0]}]
    assert summary(odd) == [{"name": "a", "kind": "number", "num_values": 2, "low": 0.0, "high": 10.0}]
    assert draw_text(odd, ["a"]).endswith("] 10")


def test_numbers_at_the_ends_of_floats_and_equal_ones_of_two_types_have_a_place() -> None:
    assert summary([{"a": 1}, {"a": 1.0}])[0]["num_values"] == 1
    assert re.fullmatch(r"a  -1e\+308 \[•.{58}•\] 1e\+308", draw_text([{"a": -1e308}, {"a": 1e308}], ["a"]))
    assert draw_text([{"a": 10**30}, {"a": 10**30 + 1}], ["a"]).count("2") == 1


def test_one_number_is_a_line_of_dots() -> None:
    text = draw_text([{"a": 0}, {"a": 10}, {"a": 10}, *[{"a": 5}] * 12], ["a"])
    assert re.fullmatch(r"a  0 \[• {28,29}\+ {28,29}2\] 10", text)


def test_two_numbers_are_dots_in_a_box() -> None:
    lines = draw_text([{"x": 0.0, "y": 1}, {"x": 4.0, "y": 1}, {"x": 4.0, "y": 3}], ["x", "y"]).split("\n")
    assert lines[0] == "y 3 |" + 59 * " " + "•|"
    assert lines[11] == "  1 |•" + 58 * " " + "•|"
    assert all(line.split("|")[1].strip() == "" for line in lines[1:11])
    assert re.fullmatch(r" +0 +x +4", lines[12])
    assert len(lines[12]) == len(lines[0]) - 1


@pytest.mark.parametrize("names", [["angle"], ["angle", "noise"], ["angle", "style"]])
def test_the_picture_is_a_png(tmp_path: Path, names: list[str]) -> None:
    pytest.importorskip("matplotlib")
    save_picture([{name: one[name] for name in names} for one in GRID], tmp_path / "new" / "map")
    assert (tmp_path / "new" / "map").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("conditions", "text"),
    [
        ([{"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}], "conditions; there are a, b, c"),
        ([{"a": 1}, {"a": 1}], "it needs one or two numbers that vary among the conditions; there is none"),
        ([], "there is none"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, conditions: list[Condition], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        save_picture(conditions, tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"matplotlib is not installed.*pdiff-plugin\[report\]"):
        save_picture(GRID, tmp_path / "map.png")


def test_inspect_shows_summary_and_picture(
    walk_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(walk_store)]) == 0
    assert "range" not in capsys.readouterr().out
    opened = SnapshotStore.open(walk_store)
    TrajectoryWriter(walk_store, opened.layout).write_chunk(opened.rows(), opened.steps.tolist())
    set_conditions(walk_store, {"run-001": {"angle": 0, "style": "ink"}, "run-002": {"angle": 90, "style": "oil"}})

    assert main(["inspect", str(walk_store)]) == 0
    text = capsys.readouterr().out
    assert "conditions of 2 runs" in text
    assert re.search(r"angle +number +2 +0 to 90", text)
    assert re.search(r"style +text +2 +ink, oil", text)
    assert re.search(r"angle  0 \[• +•\] 90", text)

    assert main(["inspect", str(walk_store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conditions"][1]["values"] == ["ink", "oil"]


def test_inspect_draws_a_picture_on_request(
    walk_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    command = ["inspect", str(walk_store), "--picture", str(tmp_path / "map.png")]
    assert main(command) == 1
    assert "needs one or two numbers that vary among the" in " ".join(capsys.readouterr().err.split())
    opened = SnapshotStore.open(walk_store)
    TrajectoryWriter(walk_store, opened.layout).write_chunk(opened.rows(), opened.steps.tolist())
    set_conditions(walk_store, {"run-001": {"angle": 0}, "run-002": {"angle": 90}})
    assert main(command) == 0
    assert (tmp_path / "map.png").is_file()
