"""Pictures of rates over budgets, with their intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_reasoncache.evaluation.statistics import Share
from hf_reasoncache.evaluation.table import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow: told apart in grey and by most colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP*"
_COLUMNS = 3


@dataclass(frozen=True)
class Line:
    """Rates of one thing over the budgets, and its rate with the full cache."""

    label: str
    places: Sequence[float]
    shares: Sequence[Share]
    reference: float | None = None


@dataclass(frozen=True)
class Panel:
    """Lines over each other."""

    title: str
    lines: Sequence[Line]


def results_png(rows: Sequence[Row]) -> bytes:
    """Draw the share of right answers over the budget, a panel for each task, as a PNG file."""
    panels = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        full = next((row.correct.value for row in mine if row.budget is None), None)
        lines = []
        for cache in dict.fromkeys(row.cache for row in mine if row.budget is not None):
            points = sorted(
                (row.budget, row.correct)
                for row in mine
                if row.cache == cache and row.budget is not None
            )
            places, shares = zip(*points, strict=True)
            lines.append(Line(cache, places, shares, full))
        panels.append(Panel(task, lines))
    return panels_png(panels, "budget", "correct")


def panels_png(panels: Sequence[Panel], x_label: str, y_label: str) -> bytes:
    """Draw panels side by side, as a PNG file.

    Parameters
    ----------
    panels : sequence of Panel
    x_label, y_label : str

    Raises
    ------
    ValueError
        If there is no panel with a line.
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    if not any(panel.lines for panel in panels):
        raise ValueError("a picture: expected results of a compressed cache, got none.")
    figure = _new_figure()
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure.set_size_inches(1.2 + 3.2 * columns, 0.8 + 2.6 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid.flat, strict=False):
        for number, line in enumerate(panel.lines):
            colour = _COLOURS[number % len(_COLOURS)]
            values = [share.value for share in line.shares]
            bounds = [share.interval for share in line.shares]
            axes.errorbar(
                line.places,
                values,
                # Rounding may put a bound on the wrong side of its value.
                [
                    [max(0.0, v - low) for v, (low, _) in zip(values, bounds, strict=True)],
                    [max(0.0, high - v) for v, (_, high) in zip(values, bounds, strict=True)],
                ],
                label=line.label,
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                capsize=2,
                linewidth=1.2,
            )
            if line.reference is not None:
                axes.axhline(line.reference, color=colour, linewidth=0.8, linestyle=":")
        axes.set_title(panel.title, fontsize="medium")
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=True)
    figure.supxlabel(x_label + "; dotted: full cache", fontsize="medium")
    figure.supylabel(y_label, fontsize="medium")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        # A line of the legend: its mark, and a fourteenth of an inch per letter.
        ncols=max(1, int(figure.get_figwidth() / (0.6 + max(map(len, labels)) / 14))),
        frameon=False,
        fontsize="small",
    )
    picture = io.BytesIO()
    # The same results give the same bytes: no version of matplotlib in the file.
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing results: expected matplotlib, got no such module; pip install "
            "'hf-reasoncache[plot]'.",
            name="matplotlib",
        ) from error
    # Without pyplot: no global state, no window, works in any thread.
    return Figure(layout="constrained")
