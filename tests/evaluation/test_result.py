"""What is read as an evaluation: documents of this and of newer releases, and none that is something else."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdiff_plugin import Evaluation
from pdiff_plugin.errors import ConfigError, FormatError
from pdiff_plugin.evaluation.page import render_html, write_report

STORED = Path(__file__).parents[1] / "data" / "evaluation-v1"
DOCUMENT: dict[str, Any] = json.loads((STORED / "evaluation.json").read_text())
CHOICE: dict[str, Any] = {
    "set": "snapshots",
    "members": [0],
    "text": "the first snapshot",
    "num_passes": 1.0,
    "loss": 0.5,
    "score": 0.9,
    "num_items": 10,
    "kind": "classification",
    "budget": 1.0,
    "by": "loss",
    "beside": {"last": dict.fromkeys(("loss", "score", "loss_difference", "loss_error"), 0.1)}
    | {"generated": dict.fromkeys(("loss", "score", "loss_difference", "loss_error"), 0.1)},
}
for other in CHOICE["beside"].values():
    other |= {"score_difference": 0.1, "score_error": 0.1}


def folder_of(folder: Path, **changes: Any) -> Path:
    """The stored evaluation with other entries."""
    shutil.copytree(STORED, folder, dirs_exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(DOCUMENT | changes))
    return folder


def figures(**changes: Any) -> dict[str, Any]:
    return {"sets": DOCUMENT["sets"] | {"average": DOCUMENT["sets"]["average"] | changes}}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sets": []}, "AttributeError"),
        (figures(accuracy_mean="high"), "accuracy_mean that is no number"),
        (figures(members=1.5), "Unknown format code 'd'"),
        (figures(members=2**80), "members that is no number"),
        (figures(**{"shifted/noise": 3}), "AttributeError"),
        (figures(accuracy_mean={"a": 1}), "accuracy_mean that is no number"),
        ({"verdict": 3}, "a verdict that is no text"),
        ({"verdict_outcome": None}, "a verdict that is no text"),
        ({"verdict_numbers": {"a": "b"}}, "deciding numbers that are none"),
        ({"comparisons": [{"name": "average"}]}, "missing 5 required positional arguments"),
        ({"comparisons": [DOCUMENT["comparisons"][0] | {"nll": "low"}]}, "loss of a comparison that is 'low'"),
        ({"seconds": {"score": "long"}}, "score that is no number"),
        ({"cost": {"average": 3}}, "AttributeError"),
        ({"cost": {"average": {"forward_passes": math.inf}}}, "forward_passes that is no number"),
        ({"details": 3}, "AttributeError"),
        ({"details": DOCUMENT["details"] | {"num_items": "many"}}, "num_items that is no int"),
        ({"details": DOCUMENT["details"] | {"trajectories": 3}}, "trajectories that is no list"),
        ({"details": DOCUMENT["details"] | {"generator": {"report": []}}}, "report of the generator that is no dict"),
        ({"details": DOCUMENT["details"] | {"kind": "cake"}}, "KeyError: 'cake'"),
        ({"choices": [CHOICE | {"members": []}]}, "a choice of other members than numbers from 0"),
        ({"choices": [CHOICE | {"text": 3}]}, "text of a choice that is no text"),
        ({"choices": [CHOICE | {"by": "luck"}]}, "a choice of kind 'classification' by 'luck'"),
        ({"choices": [CHOICE | {"num_passes": "one"}]}, "num_passes of a choice that is no number"),
        ({"choices": [CHOICE | {"beside": {"last": {"loss": 1}}}]}, "KeyError: 'score'"),
        ({"choices": [CHOICE | {"budget": 3.0}]}, "none by loss"),
    ],
)
def test_a_document_of_something_else_is_refused_by_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    folder = folder_of(tmp_path, **changes)
    with pytest.raises(FormatError) as caught:
        Evaluation.load(folder)
    assert str(caught.value).startswith(f"{folder / 'evaluation.json'}: found ")
    assert text in str(caught.value)


def test_what_a_newer_release_has_added_is_left_out(tmp_path: Path) -> None:
    comparisons = [DOCUMENT["comparisons"][0] | {"mood": "good"}]
    choices = [CHOICE | {"by": by, "mood": "good"} for by in ("loss", "score")]
    found = Evaluation.load(folder_of(tmp_path, comparisons=comparisons, choices=choices))
    assert found.best().text == "the first snapshot"
    assert len(found.comparisons) == 1


def test_a_choice_for_which_there_is_none_is_asked_for_in_vain(tmp_path: Path) -> None:
    choices = [CHOICE | {"by": by} for by in ("loss", "score")]
    found = Evaluation.load(folder_of(tmp_path, choices=choices))
    found.choices.pop()
    with pytest.raises(ConfigError, match="choices = 'none by score'"):
        found.best(by="score")


def test_an_outcome_of_a_newer_release_is_drawn_plainly(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    found = Evaluation.load(folder_of(tmp_path, verdict_outcome="too good to be true"))
    html = render_html(found, [])
    assert "too good to be true" in html


def test_control_characters_and_markup_in_names_are_text_in_the_page(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    details = DOCUMENT["details"] | {"task": "a\x1b[2J\u202eb<script>alert(1)</script>"}
    html = render_html(Evaluation.load(folder_of(tmp_path, details=details)), [])
    assert "a\\x1b[2J\\u202eb&lt;script&gt;" in html
    assert not {"\x1b", "\u202e"} & set(html)
    assert "<script>" not in html


@pytest.mark.parametrize(
    ("name", "tensor"), [("curve/snapshots", torch.zeros(0, 4)), ("plane/average", torch.zeros(4, 1))]
)
def test_arrays_that_cannot_be_drawn_are_refused_by_their_file(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    path = folder_of(tmp_path) / "evaluation.safetensors"
    save_file(load_file(path) | {name: tensor}, path, {"format": "pdiff-evaluation", "format_version": "1"})
    with pytest.raises(
        FormatError, match=r"evaluation\.safetensors: found .*expected arrays of the sets in evaluation"
    ):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
