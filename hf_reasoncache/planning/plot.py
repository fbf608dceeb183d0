"""A plan as a picture: bytes of a row over its length, ceilings of speed over the batch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_reasoncache.planning.plan import CachePlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow: told apart in grey and by most colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP*"
_POINTS = 48


def plan_png(plans: Sequence[CachePlan]) -> bytes:
    """Draw plans of one setting, as a PNG file.

    Parameters
    ----------
    plans : sequence of CachePlan
        At least one.

    Raises
    ------
    ValueError
        If there is none.
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    if not plans:
        raise ValueError("a picture: expected at least one plan, got none.")
    figure, setting = _new_figure(), plans[0].setting
    figure.set_size_inches(9, 4.6)
    left, right = figure.subplots(1, 2)
    for number, plan in enumerate(plans):
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": "--" if plan.row.shared else "-",
            "linewidth": 1.5,
        }
        _draw_bytes(left, plan, style)
        _draw_speed(right, plan, style, _MARKERS[number % len(_MARKERS)])
    left.set(xlabel="tokens of the context", ylabel="GB per row", yscale="log")
    left.set_xlim(0, setting.context)
    right.set(xlabel="rows in the batch", ylabel="tokens/s, all rows", xscale="log", yscale="log")
    right.set_title("marker: the most rows that fit", fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    figure.suptitle(
        f"{setting.size.name} on {setting.device.name}, {setting.prompt:,} + {setting.answer:,} "
        "tokens: computed ceilings, not measurements",
        fontsize="medium",
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(3, len(labels)),
        frameon=False,
        fontsize="small",
    )
    picture = io.BytesIO()
    # The same plan gives the same bytes: no version of matplotlib in the file.
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def _draw_bytes(axes: Axes, plan: CachePlan, style: dict[str, Any]) -> None:
    last = plan.setting.answer - 1
    at = sorted({round(last * point / (_POINTS - 1)) for point in range(_POINTS)})
    rows = [plan.row_at(generated).held(plan.branches) / plan.branches for generated in at]
    tokens = [plan.setting.prompt + generated for generated in at]
    axes.plot(tokens, [each / 1e9 for each in rows], label=plan.name, **style)


def _draw_speed(axes: Axes, plan: CachePlan, style: dict[str, Any], marker: str) -> None:
    if not plan.prompts:
        return
    # Each point is a whole number of prompts, evenly spaced on a logarithmic axis.
    prompts = {round(plan.prompts ** (point / (_POINTS - 1))) for point in range(_POINTS)}
    rows = [plan.branches * count for count in sorted(prompts)]
    speeds = [plan.tokens_per_second(count) or 0.0 for count in rows]
    axes.plot(rows, speeds, marker=marker, markevery=[-1], markersize=6, **style)


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing a plan: expected matplotlib, got no such module; pip install "
            "'hf-reasoncache[plot]'.",
            name="matplotlib",
        ) from error
    # Without pyplot: no global state, no window, works in any thread.
    return Figure(layout="constrained")
