"""Accuracy against the distance up to which similar steps share blocks: a table of the docs.

    python -m examples.research.similar_steps --family llama
    python -m examples.research.similar_steps --family llama --branches 8

Answers of fresh problems with `StepShareCache`, which shares values alone, or keys as well,
moved to their new position or left where they were. Every finished line is written at once; a run
that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from examples.research.arguments import parse, parser
from examples.research.branch_recordings import mixed
from examples.research.tables import markdown, publish, read_csv, write_csv
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TEST_SEEDS, check
from examples.tiny_reasoner.evaluate import encode, load
from examples.tiny_reasoner.tasks import Problem
from hf_reasoncache.evaluation import Share
from hf_reasoncache.experimental import Boundaries, StepShareCache
from hf_reasoncache.releases import cache_kwarg

SENTENCES = Boundaries((r"\.",), look_back=1)
"""A step of the tiny reasoners ends with a full stop, which is a word of its own."""

MODES: dict[str, dict[str, Any]] = {
    "values": {"share": "values"},
    "keys and values": {"share": "keys_values"},
    "keys and values, old position": {"share": "keys_values", "rerotate": False},
}


@dataclass
class Tally:
    """Sums over batches."""

    right: list[bool]
    steps: int = 0
    matched: int = 0
    saved: int = 0
    bytes: int = 0
    divergence: float = 0.0
    tokens: int = 0


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    settings: dict[str, Any],
    branches: int,
    tally: Tally,
) -> None:
    """Answer some problems, greedily or by several sampled branches, and add to the sums."""
    problems = [problem for problem in problems for _ in range(branches)]
    inputs = encode(tokenizer, problems)
    cache = StepShareCache(model, tokenizer, boundaries=SENTENCES, branches=branches, **settings)
    torch.manual_seed(0)
    sampling = {"do_sample": True, "top_k": 0} if branches > 1 else {"do_sample": False}
    out = model.generate(
        **inputs,
        **cache_kwarg(cache),
        stopping_criteria=[cache.watcher],
        **sampling,
        max_new_tokens=problems[0].max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    prompt = inputs["input_ids"].shape[1]
    completions = tokenizer.batch_decode(out.sequences[:, prompt:])
    outcomes = [check(*pair) for pair in zip(problems, completions, strict=True)]
    tally.right += [outcome.correct for outcome in outcomes]
    found = cache.report()
    tally.steps += found.steps
    tally.matched += found.matched
    tally.saved += found.saved_bytes
    tally.bytes += found.saved_bytes + found.held_bytes
    # What the model would have said to the same text with the full cache.
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out.sequences[:, prompt:])], -1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    exact = model(
        out.sequences[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        **cache_kwarg(DynamicCache(config=model.config)),
        logits_to_keep=len(out.logits),
    ).logits.log_softmax(-1)
    shared = torch.stack(out.logits, 1).log_softmax(-1)
    divergence = (exact.exp() * (exact - shared)).sum(-1)
    for row, outcome in enumerate(outcomes):
        tally.divergence += float(divergence[row, : outcome.length].sum())
        tally.tokens += outcome.length


def main() -> None:
    """Run what is missing, then write the table."""
    made = parser(__doc__, "self_consistency.md", problems=60, of="of all tasks together")
    made.add_argument("--distances", type=float, nargs="+", default=[0.1, 0.3, 0.6, 1.0])
    made.add_argument("--branches", type=int, default=1, help="sampled ones of each problem")
    made.add_argument("--development", action="store_true", help="other problems, no document")
    made.add_argument("--batch", type=int, default=20)
    arguments = parse(made)
    seed = DEVELOPMENT_SEEDS[800] if arguments.development else TEST_SEEDS[0]
    name = f"similar_steps-{arguments.family}"
    if arguments.branches > 1:
        name += f"-{arguments.branches}"
    path = arguments.output / f"{name}.csv"
    rows = read_csv(path)
    done = {(row["share"], row["distance"]) for row in rows}
    todo = [("nothing", 0.0), *((mode, d) for mode in MODES for d in arguments.distances)]
    missing = [(mode, d) for mode, d in todo if (mode, f"{d:g}") not in done]
    model, tokenizer = load(MODELS[arguments.family])
    model.set_attn_implementation("reasoncache")
    problems = mixed(arguments.problems, seed, arguments.family)
    with tqdm(total=len(missing) * arguments.problems, unit="problem") as progress:
        for mode, distance in missing:
            tally = Tally([])
            for some in problems.values():
                for start in range(0, len(some), arguments.batch):
                    batch = some[start : start + arguments.batch]
                    settings = MODES.get(mode, {}) | {"distance": distance}
                    run(model, tokenizer, batch, settings, arguments.branches, tally)
                    progress.update(len(batch))
            rows.append(
                {
                    "share": mode,
                    "distance": f"{distance:g}",
                    "right": Share.of(tally.right).percent,
                    "steps that share": f"{100 * tally.matched / tally.steps:.1f}",
                    "bytes saved": f"{100 * tally.saved / tally.bytes:.1f}",
                    "nats per token": f"{max(0.0, tally.divergence / tally.tokens):.4f}",
                }
            )
            write_csv(path, rows)
    way = f"{arguments.branches} branches sampled" if arguments.branches > 1 else "greedy"
    note = (
        f"{arguments.family} model, {arguments.problems} "
        f"{'development' if arguments.development else 'fresh'} problems of all tasks (seed "
        f"{seed}), {way}, float32, torch {torch.__version__}. Percent, Wilson 95% intervals; "
        "nats: divergence of the next-token distribution from the full cache's on the same text."
    )
    if arguments.development:
        print(markdown(rows, note))
    else:
        publish(rows, note, name, arguments.output, arguments.document)


if __name__ == "__main__":
    main()
