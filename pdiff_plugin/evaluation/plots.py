"""The report's pictures, each a function from an evaluation to a matplotlib figure (None where data are missing).

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; every set also has a marker or a line
style of its own. Figures are drawn small, so that their text stays readable at the width of a phone.

Shapes: M members of a set, N snapshots, P coordinates, S ensemble sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pdiff_plugin.errors import MissingDependencyError
from pdiff_plugin.evaluation.baselines import BASELINES, GENERATED, LOOKS, SNAPSHOTS, look_of
from pdiff_plugin.evaluation.kind import Quantity, TaskKind
from pdiff_plugin.evaluation.result import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

WIDTH_IN = 4.7
_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "pdiff",  # the same picture gives the same text
}


@dataclass(frozen=True)
class Picture:
    """A figure with its name (of the PNG file), title and the sentence below it."""

    name: str
    title: str
    caption: str
    figure: Figure


def pictures(evaluation: Evaluation) -> list[Picture]:
    """Every picture that the evaluation has the data for, in the order of the report.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    drawn = []
    with style():
        for name, title, caption, draw in _PICTURES:
            figure = draw(evaluation)
            if figure is not None:
                title, caption = (text.format(**_words(evaluation.kind)) for text in (title, caption))
                drawn.append(Picture(name, title[0].upper() + title[1:], caption, figure))
    return drawn


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for drawing and for saving; a user's own are left alone."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report") from error
    with matplotlib.rc_context(matplotlib.rcParamsDefault | _RC):
        yield


def density(values: Array, places: Array) -> Array:
    """Normal kernel density of ``values`` (M,) at ``places``, with Scott's bandwidth.

    Values that are all equal get a bandwidth of a hundredth of the span of ``places``, so that they show as a spike.
    """
    width = max(values.std() * len(values) ** -0.2, 0.01 * float(np.ptp(places)), 1e-12)
    z = (places[:, None] - values[None, :]) / width
    return np.asarray(np.exp(-0.5 * z**2).sum(axis=1) / (len(values) * width * np.sqrt(2 * np.pi)))


def accuracy_against_novelty(evaluation: Evaluation) -> Figure | None:
    """Each member, and each set's mean with the spread of its members."""
    score, arrays = evaluation.kind.score, evaluation.arrays
    # Evaluations saved by the first releases have it under another name.
    closest = "likest" if any(key.startswith("likest/") for key in arrays) else "closest"
    names = [n for n in evaluation.sets if f"{closest}/{n}" in arrays]
    if not names:
        return None
    figure, axes = _figure(3.9)
    points = {
        n: (1 - _array(evaluation, f"{closest}/{n}"), _scaled(score, _array(evaluation, f"{score.key}/{n}")))
        for n in names
    }
    fixed = [n for n in names if n == GENERATED or (n in BASELINES and not BASELINES[n].is_random)]
    low, high = _range_of([points[n][1] for n in fixed or names])
    below = []
    for name in names:
        novelty, accuracy = points[name]
        keep = ~np.isnan(novelty)
        if not keep.any():
            continue
        if accuracy[keep].mean() < low:
            below.append(f"{name} {_short(accuracy[keep].mean(), 1)}{_unit(score)}")
            continue
        look = look_of(name)
        axes.scatter(novelty[keep], accuracy[keep], s=7, color=look.colour, alpha=0.25, linewidths=0)
        axes.errorbar(
            novelty[keep].mean(),
            accuracy[keep].mean(),
            xerr=novelty[keep].std(),
            yerr=accuracy[keep].std(),
            color=look.colour,
            marker=look.marker,
            markersize=11 if name == GENERATED else 7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=0.9,
            zorder=4 if name == GENERATED else 3,
        )
        size = 10 if name == GENERATED else 7
        axes.plot([], [], color=look.colour, marker=look.marker, markersize=size, linestyle="none", label=name)
    axes.set_ylim(low, high)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_xlabel(_novelty(evaluation.kind))
    axes.set_ylabel(f"{score.text} of a member{_unit(score).replace(' ', ', ')}")
    if below:
        axes.set_title("below the axis: " + _wrapped(below), fontsize=8, loc="left", color="#444444")
    _legend_below(figure, axes)
    return figure


def accuracy_novelty_curves(kind: TaskKind, points: Sequence[Mapping[str, Any]]) -> Figure:
    """What :func:`~pdiff_plugin.evaluation.sweep.sweep` found: one line for each way of making members.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with style():
        figure, axes = _figure(3.9)
        places = [(1 - p[kind.closest], _scaled(kind.score, p[kind.mean_score])) for p in points]
        sets = [point["set"] for point in points]
        curves = {
            name: np.array([place for place, own in zip(places, sets, strict=True) if own == name])
            for name in dict.fromkeys(sets)
        }
        low, high = _range_of([curves[n][:, 1] for n in curves if n in (SNAPSHOTS, GENERATED)], share=0.15)
        for name, curve in curves.items():
            look = look_of(name)
            size = 8 if name == GENERATED else 4.5
            axes.plot(*curve.T, color=look.colour, marker=look.marker, linestyle=look.line, markersize=size, label=name)
        for point, place in zip(points, places, strict=True):
            if point["set"] == GENERATED:
                axes.annotate(f"{point['setting']:g}", place, xytext=(4, 5), textcoords="offset points", fontsize=7.5)
        axes.set_ylim(low, high)
        axes.set_xlabel(_novelty(kind))
        axes.set_ylabel(f"mean {kind.score.text} of members{_unit(kind.score).replace(' ', ', ')}")
        _legend_below(figure, axes)
    return figure


def paired_differences(evaluation: Evaluation) -> Figure | None:
    """Ensemble loss of the generated set minus that of each baseline, with two standard errors."""
    comparisons = evaluation.comparisons
    if not comparisons:
        return None
    figure, axes = _figure(0.9 + 0.24 * len(comparisons))
    # A gain that counts is one per cent of the baseline's own loss, much the same for all that are in play.
    gain = min(c.needed for c in comparisons)
    # Collapsed baselines are off by tens of gains; the axis is for the others.
    in_play = [abs(c.loss) + 2 * c.loss_error for c in comparisons if abs(c.loss) <= 6 * gain]
    reach = max([3 * gain, *(1.15 * extent for extent in in_play if math.isfinite(extent))])
    for row, c in enumerate(comparisons):
        look = look_of(c.name)
        if abs(c.loss) > reach:
            mark_beyond(axes, row, reach, f"{'' if c.loss < 0 else '+'}{_short(c.loss)}", look.colour)
            continue
        axes.errorbar(
            c.loss,
            row,
            xerr=min(2 * c.loss_error, 3 * reach),  # that of a single member is infinite
            color=look.colour,
            marker=look.marker,
            markersize=6,
            capsize=2,
        )
    axes.axvline(0, color="black", linewidth=0.9)
    axes.axvline(-gain, color="#D55E00", linewidth=0.9, linestyle=":")
    axes.set_xlim(-reach, reach)
    axes.set_yticks(range(len(comparisons)), [c.name for c in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.set_xlabel(
        f"{evaluation.kind.loss.text} of generated minus baseline\n← generated is better        baseline is better →"
    )
    axes.locator_params(axis="x", nbins=5)
    return figure


def plane_of_snapshots(evaluation: Evaluation) -> Figure | None:
    """Snapshots, members and one denoising path in the two leading principal directions of the snapshots."""
    arrays = evaluation.arrays
    if "snapshots_plane" not in arrays:
        return None
    figure, axes = _figure(3.9)
    snapshots, runs = _array(evaluation, "snapshots_plane"), arrays["snapshots_run"].numpy()
    for run in np.unique(runs):
        mine = snapshots[runs == run]
        axes.plot(*mine.T, color="#000000", linewidth=0.5, alpha=0.35, zorder=1)
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            s=9,
            color="#000000",
            linewidths=0,
            alpha=0.6,
            label=SNAPSHOTS if run == 0 else None,
        )
    for name in _shown(evaluation, "plane", "plane"):
        look = look_of(name)
        members = _array(evaluation, f"plane/{name}")
        axes.scatter(
            members[:, 0],
            members[:, 1],
            s=42 if name == GENERATED else 18,
            color=look.colour,
            marker=look.marker,
            linewidths=0.4,
            edgecolors="white",
            label=name,
            zorder=3.5 if name == GENERATED else 3,
        )
    if "path" in arrays:
        path = _array(evaluation, "path")
        axes.plot(
            *path.T, color="#CC79A7", linewidth=1.3, marker=".", markersize=4, label="one denoising path", zorder=4
        )
        axes.scatter(
            path[-1:, 0], path[-1:, 1], s=70, facecolors="none", edgecolors="#CC79A7", linewidths=1.4, zorder=5
        )
    share = 100 * _array(evaluation, "plane_share")
    axes.set_xlabel(f"direction 1 ({share[0]:.0f} % of the variance)")
    axes.set_ylabel(f"direction 2 ({share[1]:.0f} %)" if len(share) > 1 else "direction 2")
    axes.locator_params(nbins=6)
    _legend_below(figure, axes)
    return figure


def value_densities(evaluation: Evaluation) -> Figure | None:
    """Densities of single coordinates over the snapshots and over members."""
    if "snapshots_values" not in evaluation.arrays:
        return None
    names = list(evaluation.details["parameters"])
    from matplotlib.figure import Figure

    rows = -(-len(names) // 2)
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 1.25 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    sets = {SNAPSHOTS: _array(evaluation, "snapshots_values")}
    sets |= {n: _array(evaluation, f"values/{n}") for n in _shown(evaluation, "densities", "values")}
    for index, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
        own = np.concatenate([sets[n][:, index] for n in sets if n in (SNAPSHOTS, GENERATED)])
        margin = 0.15 * max(float(np.ptp(own)), 1e-9)
        places = np.linspace(own.min() - margin, own.max() + margin, 160)
        for set_name, values in sets.items():
            look = look_of(set_name)
            axes.plot(
                places,
                density(values[:, index], places),
                color=look.colour,
                linestyle=look.line,
                linewidth=1.8 if set_name == GENERATED else 1.2,
                label=set_name if index == 0 else None,
            )
        axes.set_title(_shortened(name), fontsize=7.5)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=3)
        axes.tick_params(labelsize=7.5)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def reliability_diagram(evaluation: Evaluation) -> Figure | None:
    """Accuracy against confidence, and how many items each bin holds."""
    names = _shown(evaluation, "reliability", "reliability")
    if not names:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="#777777", linewidth=0.9, linestyle=":", label="perfect")
    for name in names:
        count, confidence, accuracy = _array(evaluation, f"reliability/{name}")
        look = look_of(name)
        filled = count > 0
        style = {
            "color": look.colour,
            "marker": look.marker,
            "linestyle": look.line,
            "markersize": 4.5,
            "linewidth": 1.2,
        }
        top.plot(confidence[filled], accuracy[filled], label=name, **style)
        bottom.plot(confidence[filled], count[filled], **style)
    top.set_ylabel("accuracy")
    top.set_ylim(0, 1.02)
    bottom.set_yscale("log")
    bottom.set_ylabel(evaluation.kind.likeness.unit)
    bottom.set_xlabel("confidence of the ensemble")
    bottom.set_xlim(0, 1.02)
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def overlap_map(evaluation: Evaluation) -> Figure | None:
    """Errors in common for all pairs of snapshots and generated members."""
    if "overlap" not in evaluation.arrays:
        return None
    figure, axes = _figure(4.1)
    matrix = _array(evaluation, "overlap")
    axes.grid(visible=False)
    image = axes.imshow(matrix, cmap="cividis", vmin=float(matrix.min()), vmax=1.0, interpolation="nearest")
    drawn = evaluation.arrays.get(f"plane/{SNAPSHOTS}")
    num_snapshots = 0 if drawn is None else len(drawn)
    sizes = [(SNAPSHOTS, num_snapshots), (GENERATED, len(matrix) - num_snapshots)]
    ticks, labels, start = [], [], 0
    for name, size in sizes:
        if size:
            ticks.append(start + (size - 1) / 2)
            labels.append(name)
            if start:
                axes.axhline(start - 0.5, color="white", linewidth=1.4)
                axes.axvline(start - 0.5, color="white", linewidth=1.4)
            start += size
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels, rotation=90, va="center")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.85, label=evaluation.kind.likeness.text)
    return figure


_PICTURES: Sequence[tuple[str, str, str, Callable[[Evaluation], Any]]] = (
    (
        "accuracy-novelty",
        "{score} against novelty",
        "Up and to the right is better: accurate, and not a copy. Dots are members, large markers the means of the "
        "sets with the spread of their members. Snapshots are compared with those outside their own block of time.",
        accuracy_against_novelty,
    ),
    (
        "paired-differences",
        "Generated against each baseline",
        "Difference in the ensembles' loss on the same items, with two standard errors. To be worth it, every bar has "
        "to end left of zero, and every marker to lie left of the dotted line, {gain}.",
        paired_differences,
    ),
    (
        "plane",
        "Where the weights lie",
        "The two leading principal directions of the snapshots; the members had no part in choosing them. The line is "
        "one sample on its way from noise: at each step, where the denoiser expects it to end.",
        plane_of_snapshots,
    ),
    (
        "reliability",
        "Reliability",
        "On the dotted line, a confidence of 80 % is right 80 % of the time. Below: {unit} with such confidence.",
        reliability_diagram,
    ),
    (
        "overlap",
        "Who makes the same mistakes",
        "{likeness} Snapshots are in order of time.",
        overlap_map,
    ),
    (
        "densities",
        "Values of a few parameters",
        "Densities over the snapshots and over the members of three sets.",
        value_densities,
    ),
)


def _words(kind: TaskKind) -> dict[str, str]:
    """What titles and captions say of a kind of task."""
    first, second = (kind.metric(key) for key in kind.curves[:2])
    both = f"{first.better.capitalize()} is better in both."
    either = f"{first.better.capitalize()} is better above, {second.better} below."
    return {
        "score": kind.score.text,
        "gain": "a gain of 1 %" if kind.gain is None else "a gain that counts",
        "better": both if first.better == second.better else either,
        "likeness": kind.likeness.help,
        "unit": kind.likeness.unit,
    }


def _figure(height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()


def _array(evaluation: Evaluation, name: str) -> Array:
    return np.asarray(evaluation.arrays[name].double().numpy())


def _shown(evaluation: Evaluation, picture: str, kind: str) -> list[str]:
    """The sets that a picture has room for, of those with an array of its kind."""
    return [n for n, look in LOOKS.items() if picture in look.pictures and f"{kind}/{n}" in evaluation.arrays]


def _scaled(quantity: Quantity, values: Any) -> Any:
    return 100 * values if quantity.format == "%" else values


def _unit(quantity: Quantity) -> str:
    return " %" if quantity.format == "%" else ""


def _novelty(kind: TaskKind) -> str:
    return f"novelty: 1 − {kind.likeness.text}\nwith the closest snapshot"


def _range_of(parts: Sequence[Array], share: float = 0.35) -> tuple[float, float]:
    """Limits that hold all values with a margin: a share of their span on each side."""
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    span = max(float(np.ptp(values)), 1e-3 * float(np.abs(values).max()), 1e-9)
    return float(values.min()) - share * span, float(values.max()) + share * span


def _legend_below(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def mark_beyond(axes: Axes, row: int, reach: float, text: str, colour: str) -> None:
    """Tell a difference that lies beyond the axis, -reach to reach, by its number; ``text`` with its sign."""
    is_left = text.startswith("-")
    axes.annotate(
        f"  ← {text}" if is_left else f"{text} →  ",
        (-reach if is_left else reach, row),
        ha="left" if is_left else "right",
        va="center",
        fontsize=8,
        color=colour,
    )


def _short(value: float, digits: int = 2) -> str:
    """With so many decimals, or so many digits where that would leave nothing of it."""
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.{digits}g}"


def _wrapped(words: Sequence[str], per_line: int = 3) -> str:
    lines = [", ".join(words[i : i + per_line]) for i in range(0, len(words), per_line)]
    return ",\n".join(lines)


def _shortened(name: str, length: int = 30) -> str:
    return name if len(name) <= length else f"…{name[-length + 1 :]}"
