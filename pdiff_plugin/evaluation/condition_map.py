"""Where the conditions of a store lie: a summary of each name, and a picture of one or two numbers.

Shapes: R runs that have a condition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.evaluation.page import write_figure
from pdiff_plugin.evaluation.plots import WIDTH_IN, style
from pdiff_plugin.snapshots.conditions import Condition, kind_of

_WIDTH, _HEIGHT = 60, 12  # of the text, in characters
# Okabe and Ito's, with markers of their own.
_LOOKS = (("#000000", "o"), ("#D55E00", "^"), ("#0072B2", "s"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"))


def alike(conditions: Sequence[Condition]) -> list[Condition]:
    """Those with the names and kinds that most have: a store reports the others, and holds them all the same."""
    kinds = [tuple((name, kind_of(value)) for name, value in sorted(one.items())) for one in conditions]
    usual = Counter(kinds).most_common(1)
    return [one for one, kind in zip(conditions, kinds, strict=True) if kind == usual[0][0]]


def summary(conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Of each name: ``kind`` in words, ``num_values`` that differ, and ``low`` and ``high`` of numbers (of a list, over
    all of its places) or the ``values`` of what is none; of those conditions that are :func:`alike`.
    """
    found: list[dict[str, Any]] = []
    conditions = alike(conditions)
    for name in conditions[0] if conditions else ():
        values = [condition[name] for condition in conditions if name in condition]
        kind = kind_of(values[0]).removeprefix("a ")
        different = {tuple(value) if isinstance(value, list) else value: value for value in values}
        about: dict[str, Any] = {"name": name, "kind": kind, "num_values": len(different)}
        if kind in ("text", "true or false"):
            found.append({**about, "values": sorted(different.values(), key=str)})
        else:
            numbers = [one for value in values for one in (value if isinstance(value, list) else [float(value)])]
            found.append({**about, "low": min(numbers), "high": max(numbers)})
    return found


def axes_of(about: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names with more than one number, of :func:`summary`."""
    return [one["name"] for one in about if one["kind"] == "number" and one["num_values"] > 1]


def draw_text(conditions: Sequence[Condition], names: Sequence[str]) -> str:
    """The conditions as dots along a line, or in a box for two ``names``; a digit where several (``+``: many) meet."""
    conditions = alike(conditions)
    scales = [[float(condition[name]) for condition in conditions] for name in names]  # type: ignore[arg-type]  # numbers
    places = [_places(values, size) for values, size in zip(scales, (_WIDTH, _HEIGHT), strict=False)]
    counts = Counter(zip(places[0], places[1] if len(names) > 1 else [0] * len(conditions), strict=True))
    marks = {place: "•" if count == 1 else str(count) if count < 10 else "+" for place, count in counts.items()}
    low, high = f"{min(scales[0]):g}", f"{max(scales[0]):g}"
    if len(names) == 1:
        return f"{names[0]}  {low} [{''.join(marks.get((x, 0), ' ') for x in range(_WIDTH))}] {high}"
    labels = {_HEIGHT - 1: f"{names[1]} {max(scales[1]):g}", 0: f"{min(scales[1]):g}"}
    margin = max(map(len, labels.values()))
    lines = [
        f"{labels.get(y, ''):>{margin}} |{''.join(marks.get((x, y), ' ') for x in range(_WIDTH))}|"
        for y in reversed(range(_HEIGHT))
    ]
    return "\n".join([*lines, f"{'':{margin}}  {low} {names[0]:^{max(_WIDTH - len(low) - len(high) - 2, 1)}} {high}"])


def _places(values: Sequence[float], size: int) -> list[int]:
    """Where values are on a line of ``size`` characters."""
    low, span = min(values) / 2, max(values) / 2 - min(values) / 2  # half of each: their difference may be no float
    return [round((value / 2 - low) / (span or 1.0) * (size - 1)) for value in values]


def save_picture(conditions: Sequence[Condition], path: Path) -> None:
    """Draw the conditions into a PNG file, as dots along a line or in a plane; another look for each value of the first
    name that is text, or true or false.

    Raises:
        ConfigError: no numbers that vary, or more than two.
        MissingDependencyError: matplotlib is not installed.
    """
    conditions = alike(conditions)
    about = summary(conditions)
    names = axes_of(about)
    if len(names) not in (1, 2):
        found = f"there are {', '.join(names)}" if names else "there is none"
        raise ConfigError("picture", str(path), f"needs one or two numbers that vary among the conditions; {found}")
    group = next((one for one in about if 1 < len(one.get("values", ())) <= len(_LOOKS)), None)
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_IN, 3.6 if len(names) == 2 else 1.6), layout="constrained")
        axes = figure.subplots()
        values = group["values"] if group else [None]
        for place, (value, (colour, marker)) in enumerate(zip(values, _LOOKS, strict=False)):
            mine = [c for c in conditions if group is None or c[group["name"]] == value]
            x, y = [c[names[0]] for c in mine], [c[names[1]] if len(names) == 2 else 0 for c in mine]
            label = f"{group['name']} {value}" if group else None
            # Outlines of growing size: those at one place are all seen.
            axes.scatter(x, y, s=20 * (1 + 2 * place), facecolors="none", edgecolors=colour, marker=marker, label=label)
        axes.set_xlabel(names[0])
        if len(names) == 2:
            axes.set_ylabel(names[1])
        else:
            axes.set_yticks([])
        axes.set_title(f"conditions of {len(conditions)} runs")
        if group:
            figure.legend(loc="outside lower center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_figure(figure, path)
