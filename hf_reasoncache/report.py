"""What a cache holds, as numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from textwrap import wrap
from typing import Any

import torch

from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.report_html import Text, page
from hf_reasoncache.risk import RiskLog
from hf_reasoncache.sliding import SlidingLayer
from hf_reasoncache.storage.pool_store import distinct_bytes
from hf_reasoncache.storage.tables import tensors_of
from triton_ops.backend import describe


@dataclass(frozen=True)
class LayerReport:
    """One full-attention layer.

    Attributes
    ----------
    index : int
        Index in the model.
    held : list[list[int]]
        Tokens held, per row and KV head.
    capacity : list[list[int]]
        Slots allocated in the pool, per row and KV head; what branches share lies elsewhere.
    kv_bytes : int
        Bytes of the key and value storages.
    other_bytes : int
        Bytes of positions, statistics, masks, and queries kept for scoring: what tokens bring.
    table_bytes : int
        Bytes of all else: where heads lie, what they hold and may hold, and what evictions did (the
        risk log). Mostly CPU memory.
    evictions : int
        Compactions, each row counted.
    evicted : int
        Tokens evicted, each row and head counted.
    backend : str or None
        What attends to the pool now, see `triton_ops.backend`; None without tokens.
    may_evict : bool
        Whether the layer evicts as soon as it holds more than it was told to.
    ratio : float or None
        Share of the tokens seen that the model's layers are to keep on average; None for a number
        of tokens, or all.
    risk : RiskLog or None
        What each eviction did to the output of the heads, if that was measured.
    probes : RiskLog or None
        How far heads with a shadow were from attention to all tokens, if there are any.
    shadow_bytes : int
        CPU memory of the shadow, its log included, in no other number.
    token_bytes : int
        Bytes of the key and value of one token in one head; 0 without a pool.
    holding : IntTensor[B, T] or None
        How many KV heads hold each column seen, -1 for padding, on the CPU; None unless asked for.
    latents : bool
        Whether all heads read one latent per token (multi-head latent attention).
    head_budgets : bool
        Whether heads were to share a budget, which they cannot where there is one for all.
    """

    index: int
    held: list[list[int]]
    capacity: list[list[int]]
    kv_bytes: int
    other_bytes: int
    evictions: int
    evicted: int
    backend: str | None = None
    may_evict: bool = False
    ratio: float | None = None
    risk: RiskLog | None = None
    probes: RiskLog | None = None
    shadow_bytes: int = 0
    table_bytes: int = 0
    token_bytes: int = 0
    holding: torch.Tensor | None = None
    latents: bool = False
    head_budgets: bool = False

    @staticmethod
    def of(index: int, layer: CacheLayer, *, positions: bool = False) -> LayerReport:
        """Describe a layer as it is now, with the positions that it holds if they are asked for."""
        pool, kv_bytes = layer.store.pool, distinct_bytes(layer.kv_tensors())
        logs = [observer.log for observer in layer.observers if observer.log is not None]
        measured = layer.policy is not None and layer.policy.risk is not None
        return LayerReport(
            index=index,
            held=layer.held().tolist(),
            capacity=[] if pool is None else pool.capacity.tolist(),
            kv_bytes=kv_bytes,
            other_bytes=layer.nbytes - kv_bytes,
            evictions=layer.evictions,
            evicted=layer.evicted,
            backend=None if pool is None else describe(layer.device, layer.dtype),
            may_evict=layer.may_evict,
            ratio=None if layer.policy is None else layer.policy.ratio,
            risk=layer.risk if measured else None,
            probes=logs[0] if logs else None,
            shadow_bytes=sum(observer.nbytes for observer in layer.observers),
            table_bytes=distinct_bytes(tensors_of(layer)) - layer.nbytes,
            token_bytes=0
            if pool is None
            else sum(_bytes_of_one(field) for field in pool.held_fields.values()),
            holding=_holding(layer) if positions else None,
            latents=layer.rank > 0,
            head_budgets=layer.policy is not None and layer.policy.head_budgets,
        )

    def numbers(self) -> str:
        """Format the layer without its index, for a terminal of 80 columns."""
        counts = [count for row in self.held for count in row] or [0]
        return (
            f"{min(counts):18d} {sum(counts) / len(counts):5.0f} "
            f"{max(counts):5d} {self.kv_bytes:12,}"
            + (f"{float(self.risk.error.quantile(0.9)):10.1%}" if self.risk else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what can be written as JSON; of errors some quantiles."""
        plain = {name: value for name, value in vars(self).items() if name != "holding"}
        return plain | {name: _quantiles(getattr(self, name)) for name in ("risk", "probes")}


_DERIVED = (
    *("kv_bytes", "table_bytes", "total_bytes", "dynamic_bytes", "mean_held"),
    *("evictions", "evicted", "backend", "nothing_evicted", "saves_nothing"),
)
"""What `CacheReport.to_dict` writes besides the attributes."""


@dataclass(frozen=True)
class BranchReport:
    """What branches share.

    Attributes
    ----------
    rows : int
        Branches in the batch.
    parked : int
        Branches put aside.
    segments : int
        Pieces of text that are stored apart because more than one branch may read them, per layer.
    unshared_bytes : int
        Keys and values if every branch had its own copy of all that it reads.
    parked_bytes : int
        Keys and values that only parked branches need.
    max_bytes : int or None
        The bound on keys and values, parked ones included.
    blocks_evicted : int
        Blocks of parked branches that the bound has cost.
    steps_over : int
        Forwards before which live branches alone needed more than the bound.
    """

    rows: int
    parked: int
    segments: int
    unshared_bytes: int
    parked_bytes: int
    max_bytes: int | None
    blocks_evicted: int
    steps_over: int

    def lines(self) -> list[str]:
        """Format for a terminal of 80 columns."""
        lines = [
            f"branches: {self.rows} in the batch, {self.parked} parked; unshared "
            f"{self.unshared_bytes:,} bytes"
        ]
        if self.max_bytes is not None:
            lines.append(
                f"bound {self.max_bytes:,} bytes: {self.blocks_evicted} blocks evicted, "
                f"exceeded in {self.steps_over} steps"
            )
        return lines


@dataclass(frozen=True)
class CacheReport:
    """All layers of a cache; `print` it for a table.

    Attributes
    ----------
    seen : int
        Tokens seen, padding included.
    layers : tuple of LayerReport
        The full-attention layers.
    other_bytes : int
        Bytes held by layers that are transformers' own (sliding windows and the like).
    branches : BranchReport or None
        Of a `SharedBranchCache`.
    shard : tuple of int or None
        First KV head that is reported on, number of such heads, and KV heads of a layer, where this
        process has only some of them (tensor parallelism). Bytes and tokens are those of this
        process.
    graphs : str or None
        What became of the decode steps: how many came from a CUDA graph, or why none did. None
        before the first forward.
    """

    seen: int
    layers: tuple[LayerReport, ...]
    other_bytes: int
    branches: BranchReport | None = None
    shard: tuple[int, int, int] | None = None
    graphs: str | None = None

    @property
    def ratio(self) -> float | None:
        """Share of the tokens seen that the cache is told to keep; None for a number, or all."""
        return next((each.ratio for each in self.layers if each.ratio is not None), None)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in the full-attention layers."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def table_bytes(self) -> int:
        """Bytes of tables and logs in the full-attention layers; see `LayerReport`."""
        return sum(layer.table_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of everything the cache holds, shadows apart."""
        parked = 0 if self.branches is None else self.branches.parked_bytes
        ours = self.kv_bytes + parked + sum(layer.other_bytes for layer in self.layers)
        return ours + self.table_bytes + self.other_bytes

    @property
    def dynamic_bytes(self) -> int:
        """Keys and values that `DynamicCache` would hold in the full-attention layers, padding too.

        0 where no layer has a pool.
        """
        column = sum(sum(map(len, layer.held)) * layer.token_bytes for layer in self.layers)
        return self.seen * column

    @property
    def saves_nothing(self) -> bool:
        """Whether the cache has evicted and its full-attention layers hold more than all tokens."""
        held = sum(layer.kv_bytes + layer.other_bytes for layer in self.layers)
        return self.branches is None and self.evicted > 0 and held > self.dynamic_bytes

    @property
    def evictions(self) -> int:
        """Compactions over all layers and rows."""
        return sum(layer.evictions for layer in self.layers)

    @property
    def evicted(self) -> int:
        """Tokens evicted over all layers, rows and heads."""
        return sum(layer.evicted for layer in self.layers)

    @property
    def backend(self) -> str:
        """What attends to the pools, "triton" or "torch"; several if layers differ."""
        return ", ".join(sorted({layer.backend for layer in self.layers if layer.backend})) or "-"

    @property
    def mean_held(self) -> float:
        """Tokens held per KV head, on average."""
        counts = [count for layer in self.layers for row in layer.held for count in row]
        return sum(counts) / len(counts) if counts else 0.0

    @property
    def nothing_evicted(self) -> bool:
        """Whether the cache may evict, has seen tokens, and still holds all of them.

        Then whatever equals the full cache does so because the budget is too large, and says
        nothing about the method.
        """
        may_evict = any(layer.may_evict for layer in self.layers)
        return may_evict and self.seen > 0 and self.evicted == 0

    @property
    def errors(self) -> torch.Tensor | None:
        """Relative output errors of all evictions, rows, heads and layers; None if not measured.

        Each is about one head's output under the queries known then, not about the answer.
        """
        logs = [layer.risk for layer in self.layers if layer.risk is not None]
        return RiskLog.join(logs) if logs else None

    @property
    def probe_errors(self) -> torch.Tensor | None:
        """Relative output errors at all probes, rows and layers; None without a shadow.

        Each is about one head's output at one step, against attention to all tokens so far.
        """
        logs = [layer.probes for layer in self.layers if layer.probes is not None]
        return RiskLog.join(logs) if logs else None

    def _lines_of_shard(self) -> list[str]:
        if self.shard is None:
            return []
        first, heads, total = self.shard
        last = first + heads - 1
        return [f"of this process only: KV heads {first} to {last} of {total} in each layer"]

    def _lines_of_latents(self) -> list[str]:
        latents = [layer for layer in self.layers if layer.latents]
        if not latents:
            return []
        moot = any(layer.head_budgets for layer in latents)
        return ["one latent per token for all heads" + "; head_budgets does nothing" * moot]

    def _lines_of_probes(self) -> list[str]:
        errors = self.probe_errors
        if errors is None or not errors.numel():
            return []
        middle, most = errors.quantile(torch.tensor([0.5, 0.9], device="cpu")).tolist()
        kept = sum(layer.shadow_bytes for layer in self.layers)
        return [
            f"probes: outputs of heads differed from those of all tokens by {middle:.1%} (median),",
            f"      {most:.1%} (90%), at {errors.numel()} probes; shadows hold {kept:,} bytes",
        ]

    def _lines_of_risk(self) -> list[str]:
        errors = self.errors
        if errors is None:
            return []
        if not errors.numel():
            return ["risk: no eviction was measured yet"]
        layer = max((each for each in self.layers if each.risk), key=_worst)
        head = int(layer.risk.error.amax(0).argmax()) if layer.risk else 0
        middle, most = errors.quantile(torch.tensor([0.5, 0.9], device="cpu")).tolist()
        return [
            f"risk: an eviction moved a head's output by {middle:.1%} (median), {most:.1%} (90%),",
            f"      {float(errors.max()):.1%} (worst: layer {layer.index}, head {head}) for the "
            "newest queries then;",
            "      this certifies single outputs of heads, not the quality of the answer",
        ]

    def __str__(self) -> str:
        """Format for a terminal of 80 columns."""
        lines = [
            f"seen {self.seen} tokens, hold {self.mean_held:.1f} per KV head on average"
            + ("" if self.ratio is None else f" ({self.ratio:.0%} wanted)"),
            f"keys and values {self.kv_bytes:,} bytes, all storages {self.total_bytes:,} bytes",
            f"attention to the pools by {self.backend}",
            *(() if self.graphs is None else wrap(f"graphs: {self.graphs}", 80)),
            *self._lines_of_shard(),
            *self._lines_of_latents(),
            f"{self.evictions} compactions evicted {self.evicted} tokens (rows and heads counted)",
            *(() if self.branches is None else self.branches.lines()),
        ]
        if self.nothing_evicted:
            lines += [
                "WARNING: nothing was evicted, since the budget exceeds the text: an output like",
                "         that of a full cache says nothing about this compression",
            ]
        if self.saves_nothing:
            lines += [
                f"WARNING: that is more than the {self.dynamic_bytes:,} bytes of a DynamicCache;",
                "         the text is too short for these windows, buffers and counters to pay",
            ]
        lines += self._lines_of_risk() + self._lines_of_probes()
        risk = self.errors is not None
        lines.append(" layer  held per head: min  mean   max     KV bytes" + "  risk 90%" * risk)
        for numbers, alike in groupby(self.layers, LayerReport.numbers):
            indices = [layer.index for layer in alike]
            lines.append(f"{_range(indices):>7} {numbers}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return what can be written as JSON: the attributes, and what follows from them.

        Without the positions held, for which there is `to_html`.
        """
        return {
            "seen": self.seen,
            **{name: getattr(self, name) for name in _DERIVED},
            "other_bytes": self.other_bytes,
            "graphs": self.graphs,
            "shard": self.shard,
            "branches": None if self.branches is None else asdict(self.branches),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_html(self, ids: torch.Tensor, tokenizer: Any) -> str:
        """Show which tokens of a text are held, and by how many heads, as a page for a browser.

        Parameters
        ----------
        ids : LongTensor[B, T]
            The text as `generate` returned it, padding and prompt included. The newest tokens may
            be more than the cache has seen: the last one was never fed.
        tokenizer
            Turns ids into text.

        Returns
        -------
        str
            HTML that needs no other file: every token, the darker the more heads hold it, in one
            layer or on average over all, row by row.

        Raises
        ------
        ValueError
            If the report was made without positions, or the text has other rows than the cache or
            fewer tokens than it has seen.
        """
        holding = [layer.holding for layer in self.layers if layer.holding is not None]
        if not holding:
            raise ValueError(
                "to_html: expected a report with positions of a cache that has seen tokens, got "
                "none; make it by cache.report(positions=True)."
            )
        rows = len(holding[0])
        if ids.dim() != 2 or len(ids) != rows or ids.shape[1] < self.seen:
            raise ValueError(
                f"ids: expected {rows} rows of {self.seen} tokens or more, as the cache has seen, "
                f"got shape {list(ids.shape)}."
            )
        heads = [len(layer.held[0]) for layer in self.layers]
        texts = []
        for row, line in enumerate(ids.tolist()):
            first = int((holding[0][row] >= 0).int().argmax())
            words = [tokenizer.decode([token]) for token in line[first:]]
            shares = [each[row, first:] / count for each, count in zip(holding, heads, strict=True)]
            texts.append(Text(words, torch.stack(shares), first))
        return page(texts, [layer.index for layer in self.layers], str(self))


def _holding(layer: CacheLayer) -> torch.Tensor | None:
    """`LayerReport.holding`; None before the first forward."""
    if layer.rows is None:
        return None
    counts = torch.zeros(layer.rows, layer.seen, dtype=torch.int32, device="cpu")
    for row, heads in enumerate(layer.held_now()):
        for held in heads:
            counts[row, held] += 1
    columns = torch.arange(layer.seen, device="cpu")
    return counts.masked_fill(columns < layer.store.first[:, None], -1)


def _quantiles(log: RiskLog | None) -> dict[str, float] | None:
    """What is written of a log; None if there is none, or nothing in it."""
    if log is None or not log.error.numel():
        return None
    levels = torch.tensor([0.5, 0.9, 1.0], device="cpu")
    found = log.error.float().flatten().quantile(levels).tolist()
    return dict(zip(("median", "quantile_90", "most"), found, strict=True))


def _range(indices: Sequence[int]) -> str:
    """Name layers that follow each other."""
    return str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"


def _bytes_of_one(storage: torch.Tensor) -> int:
    return storage.shape[1:].numel() * storage.element_size()


def _worst(layer: LayerReport) -> float:
    return float(layer.risk.error.max()) if layer.risk else 0.0


def storage_bytes(layer: Any) -> int:
    """Bytes of the keys and values that a layer of transformers holds."""
    if isinstance(layer, SlidingLayer):
        held: list[Any] = list(layer.tensors())
    else:
        held = [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(x.untyped_storage().nbytes() for x in held if isinstance(x, torch.Tensor))
