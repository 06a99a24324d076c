"""Pictures that tell more under the pointer: SVG with a ``<title>`` for every point, without a script.

Resting on a set, in the picture or in its legend, brings it out. In print they are pictures like the others. Drawn for
the width of a phone, as those are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.evaluation.baselines import GENERATED, SNAPSHOTS, Look, look_of
from pdiff_plugin.evaluation.choice import LAST, SHOWN_BUDGETS, Choice, passes_text
from pdiff_plugin.evaluation.kind import Quantity
from pdiff_plugin.evaluation.result import Evaluation

_WIDTH, _LEFT, _RIGHT, _TOP = 380.0, 52.0, 12.0, 10.0
_LEGEND_COLUMNS, _LEGEND_LINE = 3, 15.0
# Values beyond this many spans of the snapshots' and the generated members' are told below the picture instead.
_MARGIN = 0.3
_CHOICES = {
    f"best for {passes_text(budget)}": Look(colour, marker)
    for budget, colour, marker in zip(SHOWN_BUDGETS, ("#009E73", "#CC79A7"), ("D", "s"), strict=True)
}
_SHAPES = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "s": "M-3-3h6v6h-6z",
    "D": "M0-4L4 0L0 4L-4 0z",
    "d": "M0-4L2.5 0L0 4L-2.5 0z",
    "^": "M0-4L4 3H-4z",
    "v": "M0 4L4-3H-4z",
    "<": "M-4 0L3 4V-4z",
    ">": "M4 0L-3 4V-4z",
    "*": "M0-6L1.5-2L5.7-1.9L2.4 .8L3.5 4.9L0 2.5L-3.5 4.9L-2.4 .8L-5.7-1.9L-1.5-2z",
    "X": "M-3.5-2L-2-3.5L0-1.5L2-3.5L3.5-2L1.5 0L3.5 2L2 3.5L0 1.5L-2 3.5L-3.5 2L-1.5 0z",
    "P": "M-1.2-4h2.4v2.8H4v2.4H1.2V4h-2.4V1.2H-4v-2.4h2.8z",
    "8": "M-1.5-3.6h3L3.6-1.5v3L1.5 3.6h-3L-3.6 1.5v-3z",
}


@dataclass(frozen=True)
class Chart:
    """An ``<svg>`` element with its name, title and the sentence below it."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Series:
    """What one set has in a chart: points (x, y, what they are), joined by a line or not."""

    name: str
    look: Look
    points: list[tuple[float, float, str]]
    is_line: bool = False
    is_ring: bool = False


@dataclass(frozen=True)
class _Axis:
    """A range of values, drawn between two places."""

    low: float
    high: float
    start: float
    stop: float
    ticks: Sequence[tuple[float, str]] = field(default_factory=list)
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log2(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def charts(evaluation: Evaluation) -> list[Chart]:
    """Every chart that the evaluation has the data for: cost, groups of items, shifted data."""
    return [*_cost(evaluation), *_groups(evaluation), *_shifted(evaluation)]


def _cost(evaluation: Evaluation) -> Iterable[Chart]:
    """Loss and score of ensembles of every size against their price in forward passes."""
    kind = evaluation.kind
    curves = {name: curve for name in evaluation.sets if (curve := _cost_of(evaluation, name)) is not None}
    chosen = _chosen(evaluation)
    items = "the half of the items that chose nothing" if chosen else "all items"
    for row, (quantity, better) in enumerate([(kind.loss, "lower"), (kind.score, "higher")], start=2):
        series = [_curve(name, array, array[row].tolist(), quantity) for name, array in curves.items()]
        series += [
            _ring(name, choice, quantity, choice.loss if row == 2 else choice.score) for name, choice in chosen.items()
        ]
        if series:
            yield Chart(
                f"cost-{quantity.key}",
                f"{quantity.text[:1].upper()}{quantity.text[1:]} against cost",
                f"Single members (their mean) and ensembles of 2, 4, ... of each set, on {items}; {better} is better.",
                _xy_chart(series, f"{quantity.text} against cost", quantity),
            )


def _cost_of(evaluation: Evaluation, name: str) -> Tensor | None:
    """Sizes, passes, loss and score of a set's ensembles, (4, S); in old evaluations over all items, if at all."""
    kind, curve = evaluation.kind, evaluation.arrays.get(f"curve/{name}")
    if f"cost/{name}" in evaluation.arrays or curve is None:
        return evaluation.arrays.get(f"cost/{name}")
    if not {kind.ensemble_loss, kind.ensemble_score} <= set(kind.curves):
        return None
    sizes = curve[0].double()
    each = ((evaluation.cost.get(name, {}).get("forward_passes") or sizes[-1]) - 1) / max(float(sizes[-1]) - 1, 1)
    loss, score = (curve[1 + kind.curves.index(key)].double() for key in (kind.ensemble_loss, kind.ensemble_score))
    return torch.stack([sizes, 1 + (sizes - 1) * each, loss, score])


def _chosen(evaluation: Evaluation) -> dict[str, Choice]:
    """The choices by loss for one pass and for eight, by their names; one where they are the same."""
    found: dict[str, Choice] = {}
    for budget in SHOWN_BUDGETS if evaluation.choices else ():
        choice = evaluation.best(budget)
        if choice not in found.values():
            found[f"best for {passes_text(budget)}"] = choice
    return found


def _curve(name: str, array: Tensor, values: Sequence[float], quantity: Quantity) -> Series:
    points = []
    for size, cost, value in zip(array[0].tolist(), array[1].tolist(), values, strict=True):
        members = "one member" if size == 1 else f"{size:.0f} members"
        points.append((cost, value, f"{name}, {members}: {quantity.text} {quantity.value(value)}, {_passes(cost)}"))
    return Series(name, look_of(name), points, is_line=True)


def _ring(name: str, choice: Choice, quantity: Quantity, value: float) -> Series:
    text = f"{name}: {choice.text}, {quantity.text} {quantity.value(value)}, {_passes(choice.num_passes)}"
    return Series(name, _CHOICES[name], [(choice.num_passes, value, text)], is_ring=True)


def _passes(cost: float) -> str:
    return "one pass" if cost == 1 else f"{cost:.3g} passes"


def _groups(evaluation: Evaluation) -> Iterable[Chart]:
    """Score by group of items, on the half that chose nothing."""
    count, kind = evaluation.arrays.get("group_count"), evaluation.kind
    if count is None:
        return
    shown = {name: look_of(name) for name in (LAST, SNAPSHOTS, GENERATED)}
    shown |= {name: _CHOICES[name] for name in _chosen(evaluation)}
    rows = [(f"class {number}", int(n)) for number, n in enumerate(count.tolist()) if n]
    series = []
    for name, look in shown.items():
        found = evaluation.arrays.get(f"group_score/{name}")
        if found is not None:
            values = [value for value, n in zip(found.tolist(), count.tolist(), strict=True) if n]
            series.append(replace(_dots(name, look, values, rows, kind.score), is_ring=name in _CHOICES))
    yield Chart(
        "groups",
        f"{kind.score.text[:1].upper()}{kind.score.text[1:]} by class",
        "On the half of the items that chose nothing. Snapshots and generated members as ensembles of all of them.",
        _row_chart(series, [label for label, _ in rows], "score by class", kind.score),
    )


def _shifted(evaluation: Evaluation) -> Iterable[Chart]:
    """Ensemble score on the held-out data and on each shifted set of data."""
    kind, key = evaluation.kind, evaluation.kind.ensemble_score
    first: Mapping[str, Any] = next(iter(evaluation.sets.values()), {})
    data = [name.partition("/")[2] for name in first if name.startswith("shifted/")]
    if not data:
        return
    labels = ["held-out data", *data]
    rows = [("held-out data", int(evaluation.details.get("num_items", 0))), *((label, 0) for label in data)]
    series = []
    for name, figures in evaluation.sets.items():
        values = [figures[key], *(figures[f"shifted/{label}"][key] for label in data)]
        series.append(_dots(name, look_of(name), values, rows, kind.score))
    yield Chart(
        "shifted",
        "On shifted data",
        f"{kind.score.text[:1].upper()}{kind.score.text[1:]} of the ensembles of all members of each set.",
        _row_chart(series, labels, "score on shifted data", kind.score),
    )


def _dots(
    name: str, look: Look, values: Sequence[float], rows: Sequence[tuple[str, int]], quantity: Quantity
) -> Series:
    points = [
        (value, float(place), f"{name}, {label}{f' ({n} items)' if n else ''}: {quantity.text} {quantity.value(value)}")
        for place, (value, (label, n)) in enumerate(zip(values, rows, strict=True))
    ]
    return Series(name, look, points)


def _xy_chart(series: Sequence[Series], label: str, quantity: Quantity) -> str:
    """Lines over a logarithmic axis of passes."""
    shown, beyond, (low, high) = _in_range(series, quantity)
    bottom = 215.0
    furthest = max(x for one in series for x, _, _ in one.points)
    powers = [2**i for i in range(math.ceil(math.log2(max(furthest, 2))) + 1)]
    x = _Axis(0.93, powers[-1] * 1.08, _LEFT, _WIDTH - _RIGHT, [(p, f"{p}") for p in powers], is_log=True)
    y = _Axis(low, high, bottom, _TOP, _ticks(low, high, quantity))
    note = [f"off the scale: {', '.join(beyond)}"] if beyond else []
    return _svg(shown, x, y, label, "forward passes of the model", note)


def _row_chart(series: Sequence[Series], labels: Sequence[str], label: str, quantity: Quantity) -> str:
    """Dots along one line for each label."""
    shown, beyond, (low, high) = _in_range(series, quantity, axis=0)
    shown = [replace(one, points=[point for point in one.points if low <= point[0] <= high]) for one in shown]
    names = [text if len(text) <= 26 else f"{text[:25]}…" for text in labels]
    left = _LEFT + 5.0 * max(max(map(len, names)) - 8, 0)
    x = _Axis(low, high, left, _WIDTH - _RIGHT, _ticks(low, high, quantity))
    bottom = _TOP + 18.0 * len(labels)
    y = _Axis(-0.6, len(labels) - 0.4, _TOP, bottom, [(float(i), text) for i, text in enumerate(names)])
    note = [f"off the scale: {', '.join(beyond)}"] if beyond else []
    return _svg(shown, x, y, label, quantity.text + (", %" if quantity.format == "%" else ""), note)


def _in_range(
    series: Sequence[Series], quantity: Quantity, axis: int = 1
) -> tuple[list[Series], list[str], tuple[float, float]]:
    """The series that have something near the snapshots and the generated members, the others, and the limits."""
    near = [one for one in series if one.name in (SNAPSHOTS, GENERATED, LAST) or one.is_ring] or list(series)
    if axis == 1:  # the last snapshot of a run may be far from what is made of it
        near = [one for one in near if one.name != LAST] or near
    values = [float(point[axis]) for one in near for point in one.points if math.isfinite(float(point[axis]))]
    span = max(max(values) - min(values), 1e-3 * abs(max(values)), 1e-9)
    low, high = min(values) - _MARGIN * span, max(values) + _MARGIN * span
    if min(values) >= 0:
        low = max(low, 0.0)
    if quantity.format == "%":
        high = min(high, 1.0 + 0.02 * span)
    shown, beyond = [], []
    for one in series:
        if any(low <= float(point[axis]) <= high for point in one.points):
            shown.append(one)
        else:
            # A value keeps its unit where lines are broken.
            beyond.append(
                f"{one.name} {quantity.value(float(one.points[-1][axis]))}".replace(" %", "\N{NO-BREAK SPACE}%")
            )
    return shown, beyond, (low, high)


def _ticks(low: float, high: float, quantity: Quantity) -> list[tuple[float, str]]:
    """About five round values, in percent where these are."""
    factor = 100 if quantity.format == "%" else 1
    low, high = low * factor, high * factor
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    digits = max(0, -math.floor(math.log10(step)))
    count = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(i * step / factor, f"{i * step:.{digits}f}") for i in count]


def _svg(series: Sequence[Series], x: _Axis, y: _Axis, label: str, x_label: str, notes: Sequence[str]) -> str:
    top, bottom = min(y.start, y.stop), max(y.start, y.stop)
    parts = [_grid(x, y, top, bottom)]
    place = bottom + 30
    parts.append(f'<text x="{(x.start + x.stop) / 2:.0f}" y="{place}" text-anchor="middle">{x_label}</text>')
    for line in _wrapped(notes):
        place += 13
        parts.append(f'<text class="small" x="8" y="{place}">{escape(line)}</text>')
    place += 20
    for number, one in enumerate(series):
        down, across = divmod(number, _LEGEND_COLUMNS)
        legend = 14 + across * (_WIDTH - 10) / _LEGEND_COLUMNS, place + down * _LEGEND_LINE
        parts.append(_series(one, x, y, (top, bottom), legend))
    height = place + _LEGEND_LINE * (-(-len(series) // _LEGEND_COLUMNS)) - 4
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _grid(x: _Axis, y: _Axis, top: float, bottom: float) -> str:
    parts = []
    for value, text in x.ticks:
        at = x.place(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{text}</text>')
    for value, text in y.ticks:
        at = y.place(value)
        parts.append(f'<path class="grid" d="M{x.start} {at:.1f}H{x.stop}"/>')
        parts.append(f'<text x="{x.start - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')
    return "".join(parts)


def _series(one: Series, x: _Axis, y: _Axis, limits: tuple[float, float], legend: tuple[float, float]) -> str:
    """Line, points and entry in the legend of one set, as a group that the pointer brings out."""
    colour, shape = paint(one.look.colour), _SHAPES.get(str(one.look.marker), _SHAPES["o"])
    scale = 'transform="scale(1.8)" ' if one.is_ring else ""
    style = f'fill="none" stroke="{colour}" stroke-width="1.2"' if one.is_ring else f'fill="{colour}"'
    parts = []
    places = [(x.place(a), y.place(b), text) for a, b, text in one.points if math.isfinite(b)]
    if one.is_line:
        inside = [f"{a:.1f},{min(max(b, limits[0]), limits[1]):.1f}" for a, b, _ in places]
        parts.append(f'<polyline points="{" ".join(inside)}" stroke="{colour}"{_dashes(one.look.line)}/>')
    for a, b, text in places:
        if limits[0] - 1 <= b <= limits[1] + 1:
            parts.append(
                f'<g transform="translate({a:.1f} {b:.1f})"><title>{escape(text)}</title>'
                f'<circle class="touch" r="7"/><path d="{shape}" {scale}{style}/></g>'
            )
    a, b = legend
    parts.append(f'<path d="{shape}" transform="translate({a:.0f} {b - 3.5:.1f})" {style}/>')
    parts.append(f'<text x="{a + 10:.0f}" y="{b:.0f}">{escape(one.name)}</text>')
    return f'<g class="series" tabindex="0">{"".join(parts)}</g>'


def paint(colour: str) -> str:
    """A colour of :class:`Look` as the page's variable, which is another one on a dark screen."""
    return f"var(--c{colour.removeprefix('#').lower()})"


def _dashes(line: Any) -> str:
    pattern = {"-": (), "--": (4, 2), "-.": (6, 2, 1, 2)}.get(line) if isinstance(line, str) else line[1]
    return f' stroke-dasharray="{" ".join(str(1.4 * length) for length in pattern)}"' if pattern else ""


def _wrapped(texts: Sequence[str], width: int = 68) -> list[str]:
    lines = []
    for text in texts:
        line = ""
        for word in text.split(" "):
            if line and len(line) + len(word) > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        lines.append(line)
    return lines
