"""What pages, notebooks and pictures are made of is what they show."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import jupytext
import pytest
import torch

import pdiff_plugin
from pdiff_plugin import Evaluation, cli

ROOT = Path(__file__).parents[2]
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "examples" / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))


@pytest.mark.usefixtures("brief")
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    num_threads = torch.get_num_threads()
    try:
        runpy.run_path(str(script))
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_stored_notebook_has_the_cells_of_its_script_and_their_output(script: Path) -> None:
    stored = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    made = jupytext.read(script)
    advice = "python docs/make_notebooks.py makes it anew"
    assert [(c["cell_type"], "".join(c["source"])) for c in stored["cells"]] == [
        (c.cell_type, c.source) for c in made.cells
    ], advice
    assert any(cell.get("outputs") for cell in stored["cells"]), advice


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference" / "api").glob("[!i]*.rst"))
    documented = set(re.findall(r"^\.\. auto(?:class|function):: pdiff_plugin\.(\w+)$", pages, re.MULTILINE))
    # PDiffError stands on the page of all errors.
    assert documented == set(pdiff_plugin.__all__) - {"PDiffError"}


def test_every_command_and_flag_is_in_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    from commands import _section

    for name in cli.COMMANDS:
        text = "\n".join(_section(name))
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        flags = set(re.findall(r"^[│|]? +(--[a-z][a-z-.]+)", capsys.readouterr().out, re.MULTILINE))
        assert flags, name
        assert flags <= set(re.findall(r"--[a-z-.]+", text)), name


def test_the_table_of_the_demo_has_the_columns_that_are_printed() -> None:
    page = (DOCS / "guides" / "verdict.md").read_text(encoding="utf-8")
    header = re.search(r"<!-- demo table -->.*?^ (set .*?)$", page, re.MULTILINE | re.DOTALL)
    assert header is not None
    headers, _ = Evaluation.load(ROOT / "tests" / "data" / "evaluation-v1").table()
    assert header[1].split() == " ".join(headers).split()


def test_the_picture_of_the_dial_is_drawn_from_the_tables_on_the_pages() -> None:
    drawing = runpy.run_path(str(DOCS / "figures" / "draw_dial.py"))
    fitted = drawing["rows"](DOCS / "benchmarks.md", r"gaps of (\d+)°")
    refined = drawing["rows"](DOCS / "guides" / "dial.md", r"gaps of (\d+)°")
    assert [drawing["nll"](row[1]) for row in fitted] == [drawing["nll"](row[1]) for row in refined]  # trained there
    assert [drawing["nll"](row[2]) for row in fitted] == [drawing["nll"](row[2]) for row in refined]  # generated


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "examples/README.md", "integrations/README.md"])
def test_links_outside_the_site_lead_to_files(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"(?:\]\(|src=\")(?!https?:)([^)#\"]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
