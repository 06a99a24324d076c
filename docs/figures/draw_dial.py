"""Draw dial.svg from the tables of rotations in guides/dial.md and benchmarks.md: NLL against the gap between stops.

python docs/figures/draw_dial.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1]
GAPS = (30, 45, 60)
# Name in the picture -> column of its table, colour, where its label stands: NLL at the right end, moved to be legible.
REFINED = {
    "trained there": (1, "#444444", 1.735),
    "refined by the task": (4, "#1b7837", 1.7485),
    "the same map, no recordings": (5, "#5aae61", 1.7625),
}
FITTED = {
    "generated": (2, "#2166ac", 1.8565),
    "best row from recorded weights": (3, "#b2711b", 1.8425),
    "nearest run": (4, "#b2182b", 1.8725),
}


def rows(page: Path, pattern: str) -> list[list[str]]:
    """Cells of the rows of a page's tables whose first cell matches, by rising gap."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and (match := re.search(pattern, cells[0])):
            found[int(match[1])] = cells
    return [found[gap] for gap in GAPS]


def nll(cell: str) -> float:
    """The second figure of `37.5 / 1.768`, whatever else stands in the cell."""
    return float(re.search(r"\d+\.\d / (\d\.\d+)", cell)[1])


def main() -> None:
    mpl.rcParams |= {"font.size": 10, "svg.hashsalt": "dial", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    refined = rows(DOCS / "guides" / "dial.md", r"gaps of (\d+)°")
    fitted = rows(DOCS / "benchmarks.md", r"gaps of (\d+)°")
    for lines, table in ((REFINED, refined), (FITTED, fitted)):
        for name, (column, colour, label_at) in lines.items():
            style = "--" if name in ("trained there", "the same map, no recordings") else "-"
            axes.plot(GAPS, [nll(row[column]) for row in table], style, marker="o", markersize=4, color=colour)
            axes.annotate(name, (60.8, label_at), color=colour, va="center")
    axes.set(
        xlim=(29, 78),
        xticks=GAPS,
        xlabel="degrees between recorded angles",
        ylabel="NLL at angles between them\n(lower is better)",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("A dial of rotations: an MLP on CIFAR-10, three seeds", loc="left", fontsize=10)
    figure.savefig(Path(__file__).parent / "dial.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
