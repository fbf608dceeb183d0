"""Measured rows as a table of 80 columns, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from examples.benchmarks.machine import Machine
from examples.benchmarks.prefill_memory import PrefillMemory

MB = 1e6


@dataclass(frozen=True)
class Row:
    """One decoder in one configuration.

    Attributes
    ----------
    dtype, batch, context, decoder
        What was measured.
    kind : str
        Name of the decoder's class: the same whatever the budget.
    ms : float
        Per step of the whole batch: the median over rounds of a round's mean.
    ms_low, ms_high : float
        Of the rounds.
    ms_step : float
        Median over all single steps; evictions do not show here.
    held_bytes : int
    note : str
        Why there are no numbers, or what else is to be known.
    """

    dtype: str
    batch: int
    context: int
    decoder: str
    kind: str
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    ms_step: float | None = None
    held_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Block:
    """All decoders of one configuration."""

    rows: tuple[Row, ...]

    def ms(self, kind: str) -> float | None:
        """Milliseconds per step of a decoder; None if it has none."""
        return next((row.ms for row in self.rows if row.kind == kind), None)

    def ratio(self, slow: str, fast: str) -> float | None:
        """How many times longer a step takes with `slow` than with `fast`."""
        above, below = self.ms(slow), self.ms(fast)
        return None if above is None or below is None else above / below

    @property
    def title(self) -> str:
        """Configuration in words."""
        row = self.rows[0]
        return f"{row.dtype}, batch {row.batch}, {row.context} tokens of context"

    def table(self) -> str:
        """Format for a terminal of 80 columns."""
        lines = [
            self.title,
            f"{'':30}{'ms/step':>9}{'min - max':>17}{'speed':>8}{'/floor':>7}{'MB':>9}",
        ]
        for row in self.rows:
            if row.ms is None:
                lines += [f"{row.decoder:30}  not run:", *_wrapped(row.note)]
                continue
            spread = f"{row.ms_low:.1f} - {row.ms_high:.1f}"
            speed, floor = self.ratio("Decoder", row.kind), self.ratio(row.kind, "NoCache")
            lines.append(
                f"{row.decoder:30}{row.ms:9.2f}{spread:>17}{_times(speed):>8}{_times(floor):>7}"
                f"{(row.held_bytes or 0) / MB:9.1f}"
            )
        return "\n".join(lines)


def by_length(blocks: Sequence[Block]) -> str:
    """Speed over DynamicCache by length, as a Markdown table: from where on a cache is faster."""
    contexts = list(dict.fromkeys(block.rows[0].context for block in blocks))
    lines: dict[tuple[str, int, str], dict[int, str]] = {}
    for block in blocks:
        for row in block.rows:
            if row.ms is not None and row.kind != "Decoder":
                line = lines.setdefault((row.dtype, row.batch, row.decoder), {})
                line[row.context] = _times(block.ratio("Decoder", row.kind))
    head = ["dtype", "batch", "speed over DynamicCache", *map(str, contexts)]
    rows = [[*map(str, key), *(line[each] for each in contexts)] for key, line in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _wrapped(text: str, width: int = 74) -> list[str]:
    return ["      " + text[start : start + width] for start in range(0, len(text), width)]


def memory_table(memory: Sequence[PrefillMemory]) -> str:
    """Format for a terminal of 80 columns."""
    lines = [
        f"{memory[0].dtype}, memory of the cache while a prompt is read, MB",
        f"{'':20}{'resident':>12}{'peak held':>12}{'peak with scratch':>20}{'goal':>12}",
    ]
    for each in memory:
        bound = "-" if each.bound is None else f"<= {each.bound / MB:.1f}"
        lines.append(
            f"{each.name:20}{each.resident / MB:12.1f}{each.peak_held / MB:12.1f}"
            f"{each.peak_allocated / MB:20.1f}{bound:>12}"
        )
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[Any], machine: Machine, **columns: str | int) -> None:
    """Write dataclasses of one kind as lines that carry the machine with them; make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [each.name for each in fields(rows[0])]
    extra = columns | machine.row()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *extra])
        for row in rows:
            writer.writerow([*(getattr(row, name) for name in names), *extra.values()])


def draw(path: Path, blocks: Sequence[Block], machine: Machine, clock: str) -> None:
    """Draw time per step and bytes held, one panel per configuration."""
    decoders = [row.decoder for row in blocks[0].rows]
    colors = dict(zip(decoders, colormaps["tab10"].colors, strict=False))
    columns = min(2, len(blocks))
    lines = -(-len(blocks) // columns)
    # Without pyplot: no window system is asked for, and nothing global is left behind.
    figure = Figure(figsize=(6.4 * columns, 2.9 * lines + 0.6))
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel, block in zip(panels.flat, blocks, strict=False):
        rows = [row for row in block.rows if row.ms is not None][::-1]
        bars = panel.barh(
            [row.decoder for row in rows],
            [row.ms for row in rows],
            xerr=[
                [row.ms - row.ms_low for row in rows],
                [row.ms_high - row.ms for row in rows],
            ],
            color=[colors[row.decoder] for row in rows],
            error_kw={"elinewidth": 0.8, "ecolor": "0.35"},
        )
        labels = [f"{row.ms:.1f} ms  ({_times(block.ratio('Decoder', row.kind))})" for row in rows]
        # At the end of the whisker, so that label and whisker do not cross.
        for bar, row, label in zip(bars, rows, labels, strict=True):
            panel.annotate(
                label,
                (row.ms_high, bar.get_y() + bar.get_height() / 2),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set_xlim(0, 1.35 * max(row.ms_high for row in rows))
        panel.set_title(block.title, fontsize=10)
        panel.set_xlabel(f"ms per step ({clock} time); in brackets: speed over DynamicCache")
        panel.xaxis.label.set_size(8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels.flat[len(blocks) :]:
        panel.set_visible(False)
    figure.suptitle(str(machine), fontsize=7, color="0.35", y=0.995)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
