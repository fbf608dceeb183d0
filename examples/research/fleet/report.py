"""What simulations say, as lines of a table and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from examples.research.fleet.search import Outcome

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def lines_of(outcomes: Mapping[tuple[str, str], Sequence[Outcome]]) -> list[dict[str, str]]:
    """One line for each server, mode and load; the last outcome of each is its sustained rate."""
    return [
        {
            "cache": name,
            "batches": mode,
            "sustained/s": f"{runs[-1].rate:.3g}",
            "load": f"{run.rate / runs[-1].rate:.0%}",
            "rate/s": f"{run.rate:.3g}",
            "p50 s": f"{run.latency(0.5):.3g}",
            "p99 s": f"{run.latency(0.99):.3g}",
        }
        for (name, mode), runs in outcomes.items()
        for run in runs
    ]


def fleet_png(outcomes: Mapping[tuple[str, str], Sequence[Outcome]], note: str) -> bytes:
    """Draw median and 99th percentile of the latency over the rate, a panel for each mode."""
    modes = list(dict.fromkeys(mode for _, mode in outcomes))
    names = list(dict.fromkeys(name for name, _ in outcomes))
    figure = Figure(figsize=(1.5 + 4 * len(modes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        for number, name in enumerate(names):
            runs = outcomes[name, mode]
            rates = [run.rate for run in runs]
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.5}
            axes.plot(rates, [run.latency(0.5) for run in runs], label=name, **style)
            slow = [run.latency(0.99) for run in runs]
            axes.plot(rates, slow, linestyle=":", marker="o", markevery=[-1], **style)
        axes.set_title(f"{mode} batches", fontsize="medium")
        axes.set(xscale="log", yscale="log", xlabel="requests per second")
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds from arrival to end")
    figure.suptitle(f"solid: median, dotted: 99%, dot: most that is sustained; {note}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
