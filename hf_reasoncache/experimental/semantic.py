"""RKSC's ASKS: prompts that mean nearly the same share the keys and values of one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_reasoncache.arguments import require_int, require_share
from hf_reasoncache.caches.shared_branch import SharedBranchCache
from hf_reasoncache.releases import cache_kwarg


def layer_weights(layers: int) -> torch.Tensor:
    """Weights `exp(1.5 l / L)` of layers 1 to L, scaled to sum 1: Tensor[L]."""
    return torch.softmax(1.5 * torch.arange(1, layers + 1) / layers, 0)


def semantic_similarity(states: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Weighted cosine of hidden states over layers.

    Parameters
    ----------
    states : Tensor[B, L, D]
    root : Tensor[L, D]

    Returns
    -------
    Tensor[B]
        From -1 to 1.
    """
    cosines = torch.nn.functional.cosine_similarity(states.float(), root.float(), dim=-1)
    return cosines @ layer_weights(states.shape[1]).to(cosines)


@dataclass
class SharingGate:
    """Turns sharing off where it is not faster, for every 64 tokens of prompt length anew.

    Attributes
    ----------
    bucket : int
        Tokens of prompt length that share a verdict.
    clock : Callable[[], float]
        Seconds.
    """

    bucket: int = 64
    clock: Callable[[], float] = time.perf_counter
    _pays: dict[int, bool] = field(default_factory=dict, repr=False)

    def verdict(self, tokens: int) -> bool | None:
        """Whether sharing pays at a length; None if it was never timed."""
        return self._pays.get(tokens // self.bucket)

    def note(self, tokens: int, shared: float, recomputed: float) -> None:
        """Record the seconds that a prompt took with sharing, and without."""
        self._pays[tokens // self.bucket] = shared < recomputed


@dataclass(frozen=True, eq=False)
class SemanticPrefill:
    """Prompts read with one prefix.

    Attributes
    ----------
    similarity : Tensor[B]
        Of every row to the first one, its root; 1 for itself.
    shared : BoolTensor[B]
        Rows that may use the root's prefix; the root is one of them.
    cache : SharedBranchCache or None
        Holds all but the last token of the shared rows, in their order; for `generate` with their
        full ids. None if the gate found that sharing does not pay, and then `shared` is all False.
    divergence : Tensor[B] or None
        If measured: divergence of the shared rows' next-token distribution from the exact one, in
        nats, 0 for the root; NaN for the other rows.
    changed : Tensor[B] or None
        If measured: whether the likeliest next token is another one.
    """

    similarity: torch.Tensor
    shared: torch.Tensor
    cache: SharedBranchCache | None
    divergence: torch.Tensor | None = None
    changed: torch.Tensor | None = None


@torch.no_grad()
def semantic_prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    tau: float = 0.82,
    probe: int = 8,
    measure: bool = True,
    gate: SharingGate | None = None,
) -> SemanticPrefill:
    """Read the first prompt, and of the others only the end where that will do.

    Approximate: a row that shares reads another row's prompt in place of its own, all
    but its last `probe` tokens. Exact sharing of equal prompts is what `branch_generate` does.

    Parameters
    ----------
    model : PreTrainedModel
        With `attn_implementation="reasoncache"`.
    input_ids : LongTensor[B, T]
        Prompts of equal length without padding; the first is the root.
    tau : float
        Least similarity; the paper's 0.80 to 0.82.
    probe : int
        Last tokens, before the newest, that every row reads by itself, behind the root's prefix.
    measure : bool
        Also read the shared rows in full and compare; costs what sharing saves.
    gate : SharingGate, optional
        A prompt length that it has not seen is read both ways and timed.

    Raises
    ------
    ValueError
        If an argument is out of range, or the model is not supported.

    Notes
    -----
    From RKSC (arXiv 2606.09937): the weighted layer cosine, tau, and the timing probe per 64
    tokens. The paper compares hidden states of the branch, which take a prefill to have, and its
    code sets the similarity to 1. Ours: states of the last `probe` tokens, read behind the root's
    prefix, so that a decision costs `probe` tokens; and the error, measured.
    """
    require_share("tau", tau, low=-1.0)
    require_int("probe", probe, low=1)
    if input_ids.ndim != 2 or input_ids.shape[1] < probe + 2:
        raise ValueError(
            f"input_ids: expected [rows, tokens] with at least {probe + 2} tokens, got "
            f"{list(input_ids.shape)}; use a smaller probe."
        )
    rows, tokens = input_ids.shape
    nobody = torch.zeros(rows, dtype=torch.bool)
    if gate is not None and gate.verdict(tokens) is False:
        return SemanticPrefill(torch.full((rows,), float("nan")), nobody, None)
    clock = time.perf_counter if gate is None else gate.clock
    begin = clock()
    cache = SharedBranchCache(model.config)
    prefix = tokens - 1 - probe
    _read(model, input_ids[:1, :prefix], cache)
    cache.batch_repeat_interleave(rows)
    out = _read(model, input_ids[:, prefix:-1], cache, output_hidden_states=True)
    # The embedding's output is no layer's; the mean over the probe stands for it.
    states = torch.stack([hidden.float().mean(1) for hidden in out.hidden_states[1:]], 1)
    similarity = semantic_similarity(states, states[0]).cpu()
    shared = similarity >= tau
    shared[0] = True
    seconds = clock() - begin
    if gate is not None and gate.verdict(tokens) is None:
        begin = clock()
        _read(model, input_ids[:, :-1], SharedBranchCache(model.config))
        gate.note(tokens, seconds, clock() - begin)
        if not gate.verdict(tokens):
            return SemanticPrefill(similarity, nobody, None)
    divergence, changed = _compare(model, input_ids, out, shared) if measure else (None, None)
    cache.batch_select_indices(shared.nonzero()[:, 0])
    return SemanticPrefill(similarity, shared, cache, divergence, changed)


def _compare(
    model: PreTrainedModel, input_ids: torch.Tensor, out: Any, shared: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence and change of the token after the probe, against a full prefill."""
    exact = _read(model, input_ids[:, :-1], SharedBranchCache(model.config)).logits[:, -1]
    ours = out.logits[:, -1].float().log_softmax(-1)
    exact = exact.float().log_softmax(-1)
    divergence = (exact.exp() * (exact - ours)).sum(-1).clamp_min(0).cpu()
    changed = (exact.argmax(-1) != ours.argmax(-1)).cpu()
    return divergence.where(shared, float("nan")), changed & shared


def _read(
    model: PreTrainedModel, ids: torch.Tensor, cache: SharedBranchCache, **arguments: Any
) -> Any:
    return model(ids, **cache_kwarg(cache), use_cache=True, logits_to_keep=1, **arguments)
