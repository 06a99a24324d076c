"""``docs/reference/formats.md`` describes every format that the package writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pdiff_plugin

ROOT = Path(pdiff_plugin.__file__).parent
TEXT = (ROOT.parent / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")


def constants() -> dict[str, int]:
    """Name of each format -> its version, from ``FORMAT = ...`` and ``FORMAT_VERSION = ...`` (or ``X_FORMAT``,
    ``X_VERSION``) at the top of a module.
    """
    found = {}
    for path in ROOT.rglob("*.py"):
        assigned = {
            node.targets[0].id: node.value.value
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if isinstance(node.value, ast.Constant)
        }
        for name, value in assigned.items():
            if name == "FORMAT" or name.endswith("_FORMAT"):
                version = "FORMAT_VERSION" if name == "FORMAT" else name.replace("_FORMAT", "_VERSION")
                found[value] = assigned[version]
    return found


def test_the_formats_are_found() -> None:
    assert constants().keys() >= {
        "pdiff-snapshots",
        "pdiff-shard",
        "pdiff-condition",
        "pdiff-generator",
        "pdiff-fit",
        "pdiff-fit-checkpoint",
        "pdiff-tune",
        "pdiff-ensemble",
        "pdiff-evaluation",
    }


@pytest.mark.parametrize("name", sorted(constants()))
def test_a_format_has_a_section_with_its_present_version(name: str) -> None:
    headings = [line for line in TEXT.splitlines() if line.startswith("## ")]
    version = constants()[name]
    assert any(f"`{name}` {version}" in heading for heading in headings)
    assert re.search(rf"^\| \[`{name}`\]\(#[a-z0-9-]+\) \| {version} \|", TEXT, re.MULTILINE)


def test_the_table_leads_to_the_sections() -> None:
    """As GitHub makes anchors: lower case, without punctuation, dashes for spaces."""
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("## ")
    }
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert links
    assert set(links) <= anchors
