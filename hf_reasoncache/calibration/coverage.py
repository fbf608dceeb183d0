"""The paper's estimator: how many tokens a layer's attention needs.

Streaming: a layer keeps sums, and of the attention only the rows of the last few queries, one
layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.estimate import Estimate, Record
from hf_reasoncache.calibration.replay import replay
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.observers import Observed, Observer
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.storage.new_tokens import NewTokens
from triton_ops.redundancy import redundancy

RECENCY_BINS = 20
"""Bin `k` holds the distances `2**k - 1` to `2**(k + 1) - 2`: the token itself, the two before,
the four before those, ... and the last bin all that is left."""


@dataclass(frozen=True)
class Coverage:
    """Demand by attention: the tokens that hold 93% of it (arXiv 2606.11164).

    The paper's: the share, the demand as a count of tokens. Ours, since the paper leaves it open:
    every `interval` generated tokens take the newest `queries`; average the attention over the
    query heads of a group; count tokens; average over queries, heads, steps and prompts. The other
    statistics are ours.

    Attributes
    ----------
    interval : int
        Generated tokens between two measurements.
    queries : int
        Queries of each measurement: the newest.
    mass : float
        Share of the attention that the demand must cover (rho).
    shares : tuple of float
        Further shares for which the tokens are counted.
    sinks : int
        First tokens of a text whose attention counts as sink mass.
    """

    interval: int = 128
    queries: int = 8
    mass: float = 0.93
    shares: tuple[float, ...] = (0.5, 0.8, 0.99)
    sinks: int = 4

    name: ClassVar[str] = "coverage"

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.interval:
            raise ValueError(
                "coverage: expected 1 <= queries <= interval, got "
                f"queries = {self.queries} and interval = {self.interval}."
            )
        if not all(0 < share < 1 for share in self.all_shares):
            raise ValueError(
                f"coverage: expected shares of the attention between 0 and 1, got "
                f"{self.all_shares}; the paper uses 0.93."
            )
        if self.sinks < 0:
            raise ValueError(f"sinks: expected at least 0, got {self.sinks}.")

    @property
    def all_shares(self) -> tuple[float, ...]:
        """The share of the demand, then the further ones."""
        return (self.mass, *self.shares)

    def expect(self, prompts: Sequence[int], most: int) -> None:
        """See `Estimator.expect`."""
        self._expect_enough(len(prompts) if most > self.interval else 0, len(prompts))

    def _expect_enough(self, long: int, total: int) -> None:
        if long < 2:
            raise ValueError(
                f"coverage: expected at least 2 completions of more than {self.interval} tokens, "
                f"got {long} of {total}; use more prompts, generate more tokens (max_new_tokens) "
                "or measure more often (interval)."
            )

    def resolve(self, traces: Sequence[Trace]) -> Coverage:
        """See `Estimator.resolve`."""
        return self

    def bound(self, prompts: Sequence[int], most: int, geometry: Geometry) -> int:
        """See `Estimator.bound`."""
        return sum(prompt + most - 1 for prompt in prompts)

    def cost(self, traces: Sequence[Trace], geometry: Geometry) -> int:
        """See `Estimator.cost`."""
        # The last token of a completion is not read: nothing follows it.
        return sum(trace.length - 1 for trace in traces)

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel, trace: Trace) -> Record:
        """See `Estimator.measure`.

        Returns
        -------
        dict[str, Tensor]
            ``count`` `[L]`, the queries measured (0 if the completion is not longer than the
            interval), and for each of the `statistics` ``<name>.mean`` and ``<name>.variance`` over
            them, `[L, H_kv, ...]`, float64.
        """
        layers: list[CoverageSums] = []

        def make_layer(index: int, rank: int, count: int) -> CacheLayer:
            layers.append(CoverageSums(self))
            return CacheLayer(index, observers=layers[-1:])

        cache = ReasonCache(model.config, make_layer)
        edges = range(len(trace.prompt), trace.length, self.interval)
        for _ in replay(model, cache, trace, edges=edges, longest=self.interval):
            pass
        record = {"count": torch.tensor([layer.count for layer in layers])}
        heads = Geometry.of(model.config).kv_heads
        shapes = {"tokens": (len(self.all_shares),), "recency": (RECENCY_BINS,)}
        for name in ("tokens", "entropy", "sink", "recency", "redundancy"):
            nothing = torch.zeros(heads, *shapes.get(name, ()), dtype=torch.float64)
            total = torch.stack([layer.sums.get(name, nothing) for layer in layers])
            squares = torch.stack([layer.squares.get(name, nothing) for layer in layers])
            count = max(layers[0].count, 1)
            record[f"{name}.mean"] = total / count
            spread = (squares - total.square() / count).clamp(min=0)
            record[f"{name}.variance"] = spread / max(count - 1, 1)
        return record

    def estimate(self, records: Sequence[Record], traces: Sequence[Trace]) -> Estimate:
        """See `Estimator.estimate`; completions not longer than the interval do not count.

        The standard error is that of the mean over the prompts.
        """
        measured = [r["tokens.mean"][..., 0] for r in records if bool(r["count"].all())]
        self._expect_enough(len(measured), len(records))
        by_head = torch.stack(measured)
        by_layer = by_head.mean(-1)
        error = by_layer.std(0) / len(by_layer) ** 0.5
        return Estimate(by_layer.mean(0), error, BudgetRule(), by_head.mean(0))


class CoverageSums(Observer):
    """Looks at the attention of an exact layer at the end of every full chunk.

    Parameters
    ----------
    settings : Coverage

    Attributes
    ----------
    sums, squares : dict[str, Tensor[H_kv, ...]]
        Of each statistic over the queries measured, float64 on the CPU.
    count : int
        Queries measured.
    """

    def __init__(self, settings: Coverage) -> None:
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """See `Observer.reset`."""
        self.sums: dict[str, torch.Tensor] = {}
        self.squares: dict[str, torch.Tensor] = {}
        self.count = 0

    def attended(self, layer: Observed, new: NewTokens) -> None:
        """See `Observer.attended`; the prompt, which is the first forward, is not measured."""
        if new.q_len != self.settings.interval or layer.seen == new.q_len:
            return
        queries = new.query[:, :, -self.settings.queries :]
        held = _as_asked(layer, queries, new.settings["scaling"])
        mass = attention_mass(held, new.settings["softcap"], new.settings["s_aux"])
        found = statistics(held, mass, self.settings)
        self.count += queries.shape[0] * queries.shape[2]
        for name, each in found.items():
            exact = each.cpu().double()
            for target, values in ((self.sums, exact), (self.squares, exact.square())):
                target[name] = target.get(name, 0.0) + values.sum((0, 2))


def _as_asked(layer: Observed, queries: torch.Tensor, scaling: float) -> HeldTokens:
    """All tokens that a layer holds, beside the newest queries `[B, H_q, A, D]`."""
    tokens = layer.store.read(torch.arange(len(queries), device="cpu"))
    first = layer.store.first.to(queries.device)
    columns = torch.arange(layer.seen - queries.shape[2], layer.seen, device=queries.device)
    asked = columns - first[:, None]
    return HeldTokens(
        keys=tokens.field("keys"),
        positions=tokens.positions(first),
        valid=tokens.valid,
        length=layer.seen - first,
        scaling=scaling,
        layer=layer.index,
        load_values=lambda: tokens.field("values"),
        queries=queries.unflatten(1, (tokens.columns.shape[1], -1)),
        query_positions=asked.clamp_min(-1),
    )


def attention_mass(
    held: HeldTokens, softcap: float | None, s_aux: torch.Tensor | None
) -> torch.Tensor:
    """Attention probability of every held token, averaged over the query group.

    Parameters
    ----------
    held : HeldTokens
        With queries.
    softcap : float or None
        As in `triton_ops.decode_attention`.
    s_aux : Tensor[H_q] or None
        Learned sink logits, which take their part of the mass away.

    Returns
    -------
    Tensor[R, H_kv, A, N]
        float32.
    """
    queries, at = held.window(2**31)
    logits = queries.float() @ held.keys.float().mT.unsqueeze(2) * held.scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    later = held.positions[:, :, None, :] > at[:, None, :, None]
    hidden = (later | ~held.valid[:, :, None, :]).unsqueeze(2)
    logits = logits.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sink = s_aux.float().view(1, logits.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], -1).softmax(-1)[..., :-1].mean(2)
    return logits.softmax(-1).mean(2)


def statistics(held: HeldTokens, mass: torch.Tensor, settings: Coverage) -> dict[str, torch.Tensor]:
    """What one measurement says.

    Parameters
    ----------
    held : HeldTokens
    mass : Tensor[R, H_kv, A, N]
        See `attention_mass`.
    settings : Coverage

    Returns
    -------
    dict[str, Tensor[R, H_kv, A, ...]]
        ``tokens`` `[..., shares]`: fewest tokens that hold each share of the mass. ``entropy`` in
        nats. ``sink``: mass on the first tokens of the text. ``recency`` `[..., bins]`: mass by
        distance, see `RECENCY_BINS`. ``redundancy``: mean redundancy of the keys held.
    """
    total = mass.sum(-1, keepdim=True)
    covered = mass.sort(-1, descending=True).values.cumsum(-1)
    wanted = mass.new_tensor(settings.all_shares) * total
    # The last sum may fall short of the total by a rounding error.
    fewest = torch.searchsorted(covered, wanted).clamp(max=covered.shape[-1] - 1) + 1
    _, at = held.window(mass.shape[2])
    distance = (at[:, None, :, None] - held.positions[:, :, None, :]).clamp(min=0)
    # The exponent is floor(log2) without rounding.
    bins = (torch.frexp((distance + 1).float()).exponent - 1).clamp(max=RECENCY_BINS - 1)
    recency = mass.new_zeros(*mass.shape[:-1], RECENCY_BINS).scatter_add_(-1, bins.long(), mass)
    first = (held.positions < settings.sinks) & held.valid
    each_key, _ = redundancy(held.keys, held.valid)
    repeated = each_key.sum(-1) / held.count
    return {
        "tokens": fewest,
        "entropy": torch.special.entr(mass).sum(-1),
        "sink": mass.masked_fill(~first[:, :, None, :], 0.0).sum(-1),
        "recency": recency,
        "redundancy": repeated[..., None].expand(mass.shape[:3]),
    }
