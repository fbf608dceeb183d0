"""Pictures of profiles: waves with their errors, and what single heads need."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_reasoncache.profiles.profile import BudgetProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow: told apart in grey and by most colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP*"


def wave_png(profiles: Mapping[str, BudgetProfile]) -> bytes:
    """Return `wave_figure` as a PNG file."""
    picture = io.BytesIO()
    # The same profiles give the same bytes: no version of matplotlib in the file.
    wave_figure(profiles).savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def wave_figure(profiles: Mapping[str, BudgetProfile]) -> Figure:
    """Draw waves over each other, and below the wave of a single profile, its heads.

    Demand is divided by its mean over the layers, so that profiles in different units compare;
    bars are one standard error either way. Models whose full-attention layers differ share an axis
    from the first of them to the last.

    Parameters
    ----------
    profiles : Mapping of str to BudgetProfile
        By the label to show, in the order of drawing.

    Raises
    ------
    ValueError
        If there is no profile.
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    if not profiles:
        raise ValueError("wave_figure expects at least one profile, got none.")
    figure = _new_figure()
    first = next(iter(profiles.values()))
    by_head = first.head_demand if len(profiles) == 1 else None
    if by_head is None:
        figure.set_size_inches(8, 4)
        _draw_waves(figure.subplots(), profiles)
    else:
        figure.set_size_inches(8, 7)
        waves, heads = figure.subplots(2, 1, height_ratios=(3, 2))
        _draw_waves(waves, profiles)
        _draw_heads(figure, heads, by_head, first.geometry.full_attention_layers)
    return figure


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing a profile: expected matplotlib, got no such module; pip install "
            "'hf-reasoncache[plot]'.",
            name="matplotlib",
        ) from error
    # Without pyplot: no global state, no window, works in any thread.
    return Figure(layout="constrained")


def _draw_waves(axes: Axes, profiles: Mapping[str, BudgetProfile]) -> None:
    layers = {profile.geometry.full_attention_layers for profile in profiles.values()}
    for number, (label, profile) in enumerate(profiles.items()):
        count = len(profile.demand)
        mean = sum(profile.demand) / count
        places: list[float] = list(range(count))
        if len(layers) > 1:
            places = [(rank + 0.5) / count for rank in places]
        axes.errorbar(
            places,
            [demand / mean for demand in profile.demand],
            [error / mean for error in profile.standard_error],
            label=label,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4 if count <= 64 else 2,
            capsize=2,
            linewidth=1.5,
        )
    axes.axhline(1.0, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("demand / mean demand")
    if len(layers) > 1:
        axes.set_xlabel("depth, from the first full-attention layer to the last")
        axes.set_xlim(0, 1)
    else:
        _layer_axis(axes, layers.pop())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def _draw_heads(
    figure: Figure,
    axes: Axes,
    by_head: tuple[tuple[float, ...], ...],
    layers: tuple[int, ...],
) -> None:
    # Transposed: layers run to the right, under the wave.
    table = [list(column) for column in zip(*by_head, strict=True)]
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    _layer_axis(axes, layers)
    axes.set_yticks(range(0, len(table), -(-len(table) // 8)))
    axes.set_ylabel("KV head")
    # Below, so that the columns stand under the points of the wave.
    figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.5, aspect=40, label="demand of the head"
    )


def _layer_axis(axes: Axes, layers: tuple[int, ...]) -> None:
    step = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer")
