"""What eviction does to a model's output: the error of many budgets at once.

Every row of a batch reads the same trace, and every row has its own budget in each layer and head.
The first row keeps everything; the others are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.replay import replay
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.budget import BudgetPolicy


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenBudgets(BudgetPolicy):
    """Every head of every row has a budget of its own.

    Attributes
    ----------
    heads : LongTensor[B, H_kv]
        Tokens that each head of each row keeps; `budget` is not used.
    """

    heads: torch.Tensor

    def tokens_per_head(self, protected: torch.Tensor, heads: int) -> torch.Tensor:
        """See `BudgetPolicy.tokens_per_head`."""
        floor = protected + self.window
        if bool((self.heads < floor[:, None]).any()):
            raise ValueError(
                f"heads: expected budgets >= {int(floor.max())} (protected prompt and window "
                f"of {self.window}), got {int(self.heads.min())}; raise the smallest budget or "
                "do not protect the prompt."
            )
        return self.heads


def output_error(
    model: PreTrainedModel, trace: Trace, policy: BudgetPolicy, budgets: torch.Tensor
) -> torch.Tensor:
    """Divergence of the next-token distribution from the full cache, for many budgets at once.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention.
    trace : Trace
    policy : BudgetPolicy
        How a layer evicts; its budget and demand are not used.
    budgets : LongTensor[R, L, H_kv]
        Tokens each head keeps in each of `R` settings; the trace's length or more keeps all.

    Returns
    -------
    Tensor[R]
        `KL(full || evicted)` in nats, averaged over the predictions after the first generated
        token, which the prompt's exact attention makes; float64.
    """
    # What keeps everything never evicts; more room than the trace would only cost memory.
    kept = budgets.clamp(max=trace.length)
    kept = torch.cat([torch.full_like(kept[:1], trace.length), kept])

    def make_layer(index: int, rank: int, layers: int) -> CacheLayer:
        heads = kept[:, rank]
        return CacheLayer(index, GivenBudgets(**(vars(policy) | {"heads": heads})))

    cache = ReasonCache(model.config, make_layer)
    edges = eviction_columns(trace, kept, policy.buffer)
    total = torch.zeros(len(budgets), dtype=torch.float64)
    with torch.inference_mode():
        for logits in replay(model, cache, trace, rows=len(kept), edges=sorted(edges)):
            total += _divergence(logits)
    return total / max(len(trace.completion) - 1, 1)


def eviction_columns(trace: Trace, budgets: torch.Tensor, buffer: int) -> set[int]:
    """Columns before which some row evicts; chunks that end there need no second pass."""
    begin = len(trace.prompt)
    edges: set[int] = set()
    for budget in budgets.unique().tolist():
        # A prompt beyond the capacity is cut at once, a shorter one when the buffer is full.
        edges |= set(range(max(begin, budget + buffer), trace.length, buffer))
    return edges


def _divergence(logits: torch.Tensor) -> torch.Tensor:
    """Sum over `T` of KL(row 0 || row r) for logits `[1 + R, T, V]`: Tensor `[R]`, float64."""
    full = logits[0].float().log_softmax(-1)

    def each() -> Iterator[torch.Tensor]:
        # Row by row: the probabilities of a large vocabulary are the largest tensors here.
        for row in logits[1:]:
            other = row.float().log_softmax(-1)
            yield (full.exp() * (full - other)).sum().cpu().double()

    return torch.stack(list(each()))
