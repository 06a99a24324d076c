"""Every block of code in README.md and on the site runs, or says why it does not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from pdiff_plugin import Task

from .blocks import Block, blocks_of, run
from .conftest import Problem

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/[!_]*.md"))]
NAMES = {str(page.relative_to(ROOT)): list(blocks_of(page)) for page in PAGES}
# Whose Python tests/integrations/test_snippets.py runs, with the trainers.
OF_TRAINERS = {
    str(page.relative_to(ROOT)) for page in (DOCS / "trainers").glob("*.md") if page.stem not in ("index", "timm")
}
REASONS = {
    "demo command",  # tests/test_demo.py runs it
    "test command",  # .ci/run runs it
    "installs",
    "needs a cluster",
    "needs an account; tests/test_hub.py runs it against a stand-in",
    "starts a Ray for half a minute; tests/cluster runs it",
    "needs Optuna; tests/integrations/test_optuna.py runs it",
}
KNOWN = {"docs/reference/evaluation.md": {"Task": Task, "torch": torch}}  # each of its snippets is one line of a script
FROM_NOTHING = "docs/start.md"


def is_run(name: str, block: Block) -> bool:
    return block.reason is None and not (name in OF_TRAINERS and block.language == "python")


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("name", [name for name, blocks in NAMES.items() if any(is_run(name, one) for one in blocks)])
def test_the_blocks_of_a_page_run_one_after_the_other(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    if name != FROM_NOTHING:
        shutil.copytree(home, tmp_path, dirs_exist_ok=True)
        problem = Problem(home / "model.pt")
        names |= problem.names() | KNOWN.get(name, {})
        monkeypatch.setitem(sys.modules, "my_module", problem.module())
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for block in NAMES[name]:
            if is_run(name, block):
                run(block, names)
    finally:
        for made in {"my_module", "train"} & (set(sys.modules) - before):
            del sys.modules[made]


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    blocks = [(name, block) for name, of_page in NAMES.items() for block in of_page]
    not_run = [block for _, block in blocks if block.reason is not None]
    assert len(blocks) > 70
    assert len(not_run) <= 22
    assert {block.reason for block in not_run} <= REASONS
