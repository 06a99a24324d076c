from __future__ import annotations

import builtins
import dataclasses
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pdiff_plugin.config import DiffusionConfig, FitConfig
from pdiff_plugin.errors import ConfigError, EvaluationNotFoundError, FormatVersionError, MissingDependencyError
from pdiff_plugin.evaluation.baselines import LOOKS
from pdiff_plugin.evaluation.evaluate import evaluate
from pdiff_plugin.evaluation.page import render_html, write_report
from pdiff_plugin.evaluation.plots import density, pictures
from pdiff_plugin.evaluation.result import Evaluation
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.store import SnapshotStore

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NAMES = ["accuracy-novelty", "paired-differences", "plane", "reliability", "overlap", "densities"]
CHARTS = ["cost-nll", "cost-accuracy", "groups"]


@pytest.fixture(scope="module")
def result(three_runs: tuple[Task, SnapshotStore]) -> Evaluation:
    task, store = three_runs
    generator = fit(store.path, FitConfig(diffusion=DiffusionConfig(max_steps=200, width=32)))
    return evaluate(task, store, generator, num_members=9)


@pytest.fixture(scope="module")
def folder(result: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    result.save(folder)
    write_report(folder)
    return folder


class Page(HTMLParser):
    """Collects what a page would load, its ids and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "href", "data", "xlink:href") and v]
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_the_report_needs_nothing_but_itself(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert "@import" not in html
    assert all(target.startswith(("#", "data:")) for target in page.loads)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_every_id_is_used_once_and_every_reference_is_met(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert wanted <= set(page.ids)


def test_the_report_tells_the_verdict_and_every_set(result: Evaluation, folder: Path) -> None:
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert result.verdict.sentence in text
    assert result.verdict.outcome in text
    assert all(name in text for name in result.sets)
    assert "digits, three runs" in text
    assert "diffusion.max steps" in text  # the generator's configuration


def test_the_report_tells_of_a_store_that_has_changed_since_the_fit(result: Evaluation) -> None:
    assert result.details["changed_since_fit"] is None
    grown = dataclasses.replace(result, details=result.details | {"changed_since_fit": "fitted on 59; fit again"})
    assert "fitted on 59; fit again, seed 0." in Page(render_html(grown, [])).text


def test_every_picture_is_in_the_page_and_a_png(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    svgs = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(svgs) == len(NAMES) + len(CHARTS)
    assert re.findall(r'<figure id="([^"]+)"', html) == CHARTS + NAMES
    for svg in svgs:
        ElementTree.fromstring(svg)
    assert sorted(path.stem for path in (folder / "report-figures").iterdir()) == sorted(NAMES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "report-figures").iterdir())


def test_the_page_tells_the_choices_and_every_point_of_a_chart(result: Evaluation, folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    for _, choice in result.shown_choices():
        assert choice.text in text
    size, passes, loss, _ = result.arrays["cost/generated"][:, -1].tolist()
    assert passes == pytest.approx(result.cost["generated"]["forward_passes"])
    assert f"<title>generated, {size:.0f} members: NLL {loss:.4f}, {passes:.3g} passes</title>" in html
    one = float(result.arrays["cost/gaussian-per-run"][3, 0])
    assert f"<title>gaussian-per-run, one member: accuracy {100 * one:.2f} %, one pass</title>" in html
    assert html.count("<title>snapshots, class 7 (") == 1


def test_charts_of_shifted_data_hold_every_set(result: Evaluation) -> None:
    figures = {name: {**found, "shifted/blurred <1>": found} for name, found in result.sets.items()}
    html = render_html(dataclasses.replace(result, sets=figures), [])
    found = next(iter(figures.values()))["ensemble_accuracy"]
    assert f"<title>snapshots, blurred &lt;1&gt;: accuracy {100 * found:.2f} %</title>" in html
    drawn = {n for n in result.sets if f"<title>{n}, held-out data ({result.details['num_items']} items): acc" in html}
    told = re.sub(
        "<[^>]*>", " ", html.partition('id="shifted"')[2].partition("off the scale: ")[2].partition("</svg>")[0]
    )
    assert {"snapshots", "generated", "last"} <= drawn
    assert all(f"{name} " in told for name in set(result.sets) - drawn)


def test_every_colour_is_a_variable_of_the_page_with_another_value_on_a_dark_screen(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--c[0-9a-f]{6})\)", html))
    light, _, rest = html.partition("prefers-color-scheme: dark")
    dark = rest.partition("</style>")[0]
    assert used <= set(re.findall(r"(--c[0-9a-f]{6}): #", light))
    assert {"--cffffff", "--c000000", "--c444444"} <= set(re.findall(r"(--c[0-9a-f]{6}): #", dark))
    assert not re.search(r"(fill|stroke): #(000000|ffffff|dddddd)", html)


def test_the_same_evaluation_gives_the_same_page(folder: Path) -> None:
    assert render_html(Evaluation.load(folder)) == (folder / "report.html").read_text(encoding="utf-8")


def test_an_evaluation_is_read_back_as_it_was_saved(result: Evaluation, folder: Path) -> None:
    loaded = Evaluation.load(folder)
    assert loaded.to_json() == result.to_json()
    assert loaded.table() == result.table()
    assert set(loaded.arrays) == set(result.arrays)
    assert all(
        torch.equal(loaded.arrays[name].nan_to_num(), result.arrays[name].nan_to_num()) for name in result.arrays
    )


def test_sets_of_a_single_member_with_unknown_errors_are_saved_and_drawn(
    one_run: tuple[Task, SnapshotStore], tmp_path: Path
) -> None:
    task, store = one_run
    weights = WeightSet({name: tensor[None] for name, tensor in store.state_dict(30).items()})
    result = evaluate(task, store, weights=weights, num_members=1, sets="core")
    assert [c.loss_error for c in result.comparisons] == [math.inf] * 4
    assert Evaluation.load(result.save(tmp_path)).comparisons == result.comparisons
    assert 'id="paired-differences"' in write_report(tmp_path).read_text()


def test_an_evaluation_of_format_version_1_is_still_read(tmp_path: Path) -> None:
    stored = Path(__file__).parents[1] / "data" / "evaluation-v1"
    evaluation = Evaluation.load(stored)
    assert evaluation.sets["generated"]["members"] == 4
    assert evaluation.choices == []
    html = write_report(stored, tmp_path).read_text(encoding="utf-8")
    assert evaluation.verdict.sentence in html
    assert "Best for" not in html
    assert re.findall(r'<figure id="([^"]+)"', html) == [*CHARTS[:2], *NAMES]
    with pytest.raises(ConfigError, match="evaluate again"):
        evaluation.best()
    assert sorted(path.stem for path in (tmp_path / "report-figures").iterdir()) == sorted(NAMES)


def test_without_its_arrays_the_report_has_table_and_differences(
    result: Evaluation, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "evaluation.json").write_bytes((folder / "evaluation.json").read_bytes())
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert result.verdict.sentence in html
    assert [path.stem for path in (tmp_path / "report-figures").iterdir()] == ["paired-differences"]


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationNotFoundError, match=r"holds no evaluation.json. Give the --out folder"):
        write_report(tmp_path)


def test_an_evaluation_of_a_newer_release_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "evaluation.json").read_text(encoding="utf-8")
    (tmp_path / "evaluation.json").write_text(text.replace('"format_version": 1', '"format_version": 9', 1))
    with pytest.raises(FormatVersionError, match="has format version 9; this release reads versions up to 1"):
        write_report(tmp_path)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_the_install_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=rf"{package} is not installed.*pdiff-plugin\[report\]"):
        write_report(folder)


def test_a_page_of_hostile_names_stays_text(result: Evaluation, tmp_path: Path) -> None:
    details = {**result.details, "task": "<script>alert(1)</script>"}
    hostile = Evaluation(result.sets, result.verdict, result.comparisons, result.seconds, details=details)
    assert "<script>" not in write_report(hostile, tmp_path).read_text(encoding="utf-8")


def test_sets_differ_in_colour_or_marker_and_line() -> None:
    looks = [(look.colour, str(look.marker)) for look in LOOKS.values()]
    assert len(looks) == len(set(looks))


def test_drawing_leaves_a_users_settings_alone(result: Evaluation) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures(result)
    assert dict(matplotlib.rcParams) == before


def test_density_of_normal_values_is_the_normal_density() -> None:
    places = np.linspace(-3, 3, 61)
    values = np.random.default_rng(0).normal(size=20_000)
    found = density(values, places)
    np.testing.assert_allclose(found, np.exp(-(places**2) / 2) / np.sqrt(2 * np.pi), atol=0.02)


def test_density_of_equal_values_is_a_spike_of_area_one() -> None:
    places = np.linspace(-1, 1, 2001)
    found = density(np.zeros(5), places)
    assert float(found.sum() * 0.001) == pytest.approx(1.0, abs=1e-6)
