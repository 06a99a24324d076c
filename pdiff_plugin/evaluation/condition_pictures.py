"""Pictures of an evaluation over conditions: the metric against the condition, and the paired differences.

One number is an axis; two are a plane, with a map for each of a few rows; of anything else the conditions stand side by
side, in the order of what training there gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pdiff_plugin.evaluation.condition_findings import ConditionFindings, JudgedCondition
from pdiff_plugin.evaluation.condition_rows import GENERATED, TRAINED, spec_of
from pdiff_plugin.evaluation.condition_verdict import BEST_CHEAP
from pdiff_plugin.evaluation.kind import Quantity
from pdiff_plugin.evaluation.plots import WIDTH_IN, Array, Picture, mark_beyond, style
from pdiff_plugin.snapshots.conditions import Condition
from pdiff_plugin.snapshots.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Which of the two figures of an ensemble.
Of = Literal["loss", "score"]

_ROLES = ("trained", "generated", "control", "cheap", "ceiling", "other")
# Means of members lie on their ensembles.
_LEFT_OUT = ("trained average", "generated average")
# These set the range of the axis: a base model may be far below all that matters.
_IN_RANGE = ("trained", "generated", "cheap")
_DPI = 200


def condition_pictures(evaluation: ConditionFindings) -> list[Picture]:
    """All pictures, in the order of the report.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with style():
        found = [
            Picture(
                f"condition-{quantity.key}",
                f"{quantity.text[0].upper()}{quantity.text[1:]} against the condition",
                _caption(evaluation),
                _against_condition(evaluation, of),
            )
            for of, quantity in _quantities(evaluation).items()
        ]
        for group in evaluation.verdicts:
            found.append(
                Picture(
                    f"differences-{group}",
                    f"Generated members minus each row, {group} what was fitted",
                    "Mean of the paired differences over conditions, with two standard errors. Left of zero generated "
                    "members are better. Rows far beyond the others are told by an arrow.",
                    _differences(evaluation, group),
                )
            )
    return found


def save_picture(evaluation: ConditionFindings, path: Path) -> None:
    """Draw the score against the condition as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with style():
        figure = _against_condition(evaluation, "score")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temp:
            figure.savefig(temp, format="png", dpi=_DPI, metadata={"Software": None})


def _caption(evaluation: ConditionFindings) -> str:
    names = _numbers_of(evaluation)
    if len(names) == 2:
        return "Held-out conditions by colour; small crosses are the conditions that the generator was fitted on."
    if len(names) == 1:
        return "Ensembles at held-out conditions; the ticks below are the conditions that the generator was fitted on."
    return "Ensembles at held-out conditions, in the order of what training there gives."


def _numbers_of(evaluation: ConditionFindings) -> list[str]:
    """Names of the conditions where all of them are single numbers, one or two; else none."""
    names = list(evaluation.places[0].condition)
    values = [value for place in evaluation.places for value in place.condition.values()]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return names if are_numbers and len(names) <= 2 else []


def _against_condition(evaluation: ConditionFindings, of: Of) -> Figure:
    names, quantity = _numbers_of(evaluation), _quantities(evaluation)[of]
    if len(names) == 2:
        return _maps(evaluation, of, names)
    figure, axes = _figure(3.9)
    if names:
        places = sorted(evaluation.places, key=lambda place: _number(place.condition, names[0]))
        x = np.array([_number(place.condition, names[0]) for place in places])
        fitted = np.array([_number(condition, names[0]) for condition in evaluation.fitted])
        axes.plot(fitted, np.full(len(fitted), 0.02), "|", color="#444444", transform=axes.get_xaxis_transform())
        axes.set_xlabel(names[0])
    else:
        places = sorted(evaluation.places, key=lambda place: _value(place, TRAINED, of, quantity))
        x = np.arange(len(places), dtype=np.float64)
        axes.set_xticks(x, [_short(place.condition) for place in places], rotation=90, fontsize=6.5)
    shown = []
    for name in _shown(evaluation):
        spec = spec_of(name)
        y = np.array([_value(place, name, of, quantity) for place in places])
        axes.plot(
            x,
            y,
            color=spec.look.colour,
            marker=spec.look.marker,
            linestyle=spec.look.line if names else "none",
            markersize=8 if name == GENERATED else 4,
            linewidth=1.6 if name == GENERATED else 0.9,
            zorder=4 if name == GENERATED else 3,
            label=name,
        )
        if spec.role in _IN_RANGE:
            shown.append(y)
    _limit(axes, shown)
    axes.set_ylabel(f"{quantity.text}{_unit(quantity)}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _maps(evaluation: ConditionFindings, of: Of, names: Sequence[str]) -> Figure:
    """What training there gives, generated members, and their difference to training and to the best cheap row."""
    from matplotlib.figure import Figure

    quantity, cheap = _quantities(evaluation)[of], next(iter(evaluation.verdicts.values())).best_cheap
    x, y = (np.array([_number(place.condition, name) for place in evaluation.places]) for name in names)
    values = {
        row: np.array([_value(place, row, of, quantity) for place in evaluation.places])
        for row in (TRAINED, GENERATED, cheap)
    }
    panels = {
        TRAINED: values[TRAINED],
        GENERATED: values[GENERATED],
        f"{GENERATED} − {TRAINED}": values[GENERATED] - values[TRAINED],
        f"{GENERATED} − {cheap}": values[GENERATED] - values[cheap],
    }
    figure = Figure(figsize=(WIDTH_IN, 4.6), layout="constrained")
    fx, fy = (np.array([_number(condition, name) for condition in evaluation.fitted]) for name in names)
    both = np.concatenate([values[TRAINED], values[GENERATED]])
    for axes, (title, shown) in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, panels.items(), strict=True):
        is_difference = "−" in title
        reach = max(float(np.abs(shown).max()), 1e-12)
        low, high = (-reach, reach) if is_difference else (float(both.min()), float(both.max()))
        axes.scatter(fx, fy, s=6, marker="+", color="#777777", linewidths=0.5)
        drawn = axes.scatter(
            x, y, c=shown, s=42, vmin=low, vmax=high, cmap="PuOr" if is_difference else "viridis",
            edgecolors="#444444", linewidths=0.4,
        )  # fmt: skip
        axes.set_title(title)
        figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=7)
    figure.supxlabel(names[0], fontsize=9)
    figure.supylabel(names[1], fontsize=9)
    figure.suptitle(f"{quantity.text}{_unit(quantity)}", fontsize=9)
    return figure


def _differences(evaluation: ConditionFindings, group: str) -> Figure:
    quantity = evaluation.kind.loss
    found = [one for one in evaluation.verdicts[group].differences if one.name not in _LEFT_OUT]
    figure, axes = _figure(0.9 + 0.24 * len(found))
    cheap = [one for one in found if spec_of(one.name).role in ("cheap", "trained") or one.name == BEST_CHEAP]
    extents = [abs(one.loss) + 2 * one.loss_error for one in cheap if not math.isnan(one.loss_error)]
    # The average of all tells the scale; what is farther is told by its number.
    reach = 1.15 * max([*extents, 1e-9])
    for row, one in enumerate(found):
        look = spec_of(one.name).look
        if abs(one.loss) > reach:
            mark_beyond(axes, row, reach, f"{one.loss:+{quantity.format}}", look.colour)
            continue
        error = 0.0 if math.isnan(one.loss_error) else 2 * one.loss_error
        axes.errorbar(one.loss, row, xerr=error, color=look.colour, marker=look.marker, markersize=5, elinewidth=1)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(found)), [one.name for one in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(-reach, reach)
    axes.set_xlabel(f"{quantity.text}: generated minus the row")
    return figure


def _shown(evaluation: ConditionFindings) -> list[str]:
    return [name for name in evaluation.row_names if spec_of(name).role in _ROLES and name not in _LEFT_OUT]


def _limit(axes: Axes, shown: Sequence[Array]) -> None:
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    span = max(float(np.ptp(values)), 1e-9)
    axes.set_ylim(float(values.min()) - 0.12 * span, float(values.max()) + 0.12 * span)


def _quantities(evaluation: ConditionFindings) -> dict[Of, Quantity]:
    return {"score": evaluation.kind.score, "loss": evaluation.kind.loss}


def _value(place: JudgedCondition, row: str, of: Of, quantity: Quantity) -> float:
    if row not in place.rows:
        return math.nan
    figures = place.rows[row]
    value = figures.score if of == "score" else figures.loss
    return 100 * value if quantity.format == "%" else value


def _unit(quantity: Quantity) -> str:
    return ", %" if quantity.format == "%" else ""


def _number(condition: Condition, name: str) -> float:
    value = condition[name]
    assert isinstance(value, int | float)
    return float(value)


def _short(condition: Condition) -> str:
    text = " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in condition.values())
    return text if len(text) <= 24 else f"{text[:23]}…"


def _figure(height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()
