"""Accuracy against the distance up to which similar steps share blocks: a table of the docs.

    python -m examples.research.similar_steps --reasoner smollm2-short
    python -m examples.research.similar_steps --reasoner llama --branches 8

Answers of fresh problems with `StepShareCache`, which shares values alone, or keys as well,
moved to their new position or left where they were. Every finished batch is written at once; a run
that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from examples.research.arguments import parse
from examples.research.reasoner_batches import (
    Key,
    answer_batches,
    batches_parser,
    seed_of,
    table_name,
)
from examples.research.reasoners import REASONERS, Reasoner, encode
from examples.research.tables import show, versions
from hf_reasoncache.evaluation import Paired, Share
from hf_reasoncache.experimental import StepShareCache
from hf_reasoncache.releases import cache_kwarg

NOTHING = "nothing"
MODES: dict[str, dict[str, Any]] = {
    "values": {"share": "values"},
    "keys and values": {"share": "keys_values"},
    "keys and values, old position": {"share": "keys_values", "rerotate": False},
}


@dataclass(frozen=True)
class Tally:
    """What became of a batch.

    Attributes
    ----------
    share : str
        `NOTHING` or one of `MODES`.
    distance : float
    task : str
    start : int
        The first problem of the batch.
    right : list of bool
        Branches of a problem beside each other.
    steps, matched, saved, bytes : int
        Of `StepShareReport`; `bytes` would be held without sharing.
    divergence : float
        Nats, over all tokens.
    tokens : int
    """

    share: str
    distance: float
    task: str
    start: int
    right: list[bool]
    steps: int
    matched: int
    saved: int
    bytes: int
    divergence: float
    tokens: int

    @property
    def key(self) -> tuple[str, float, str, int]:
        """See `Journal`."""
        return self.share, self.distance, self.task, self.start


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reasoner: Reasoner,
    problems: Sequence[Any],
    settings: dict[str, Any],
    branches: int,
) -> dict[str, Any]:
    """Answer some problems, greedily or by several sampled branches; return what a `Tally` has."""
    problems = [problem for problem in problems for _ in range(branches)]
    inputs = encode(reasoner, tokenizer, problems)
    cache = StepShareCache(
        model, tokenizer, boundaries=reasoner.boundaries, branches=branches, **settings
    )
    torch.manual_seed(0)
    sampling = {"do_sample": True, "top_k": 0} if branches > 1 else {"do_sample": False}
    out = model.generate(
        **inputs,
        **cache_kwarg(cache),
        stopping_criteria=[cache.watcher],
        **sampling,
        max_new_tokens=reasoner.max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    answers = map(reasoner.read_answer, tokenizer.batch_decode(generated))
    right = list(map(reasoner.is_right, problems, answers))
    found = cache.report()
    # What the model would have said to the same text with the full cache.
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(generated)], -1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    exact = model(
        out.sequences[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        **cache_kwarg(DynamicCache(config=model.config)),
        logits_to_keep=len(out.logits),
    ).logits
    ended = (generated == tokenizer.eos_token_id).cumsum(-1)
    divergence, tokens = 0.0, 0
    # Row by row: logits of all rows and a large vocabulary in float32 would take gigabytes.
    for row, length in enumerate((ended == 0).sum(-1).tolist()):
        mine = torch.stack([step[row] for step in out.logits[:length]]).float().log_softmax(-1)
        true = exact[row, :length].float().log_softmax(-1)
        divergence += float((true.exp() * (true - mine)).sum())
        tokens += length
    return {
        "right": right,
        "steps": found.steps,
        "matched": found.matched,
        "saved": found.saved_bytes,
        "bytes": found.saved_bytes + found.held_bytes,
        "divergence": divergence,
        "tokens": tokens,
    }


def table(tallies: Sequence[Tally]) -> list[dict[str, str]]:
    """One row for each way to share and distance, in the order in which they were run."""
    groups: dict[tuple[str, float], list[Tally]] = {}
    for each in tallies:
        groups.setdefault((each.share, each.distance), []).append(each)
    marks = {key: [mark for each in some for mark in each.right] for key, some in groups.items()}
    rows = []
    for (mode, distance), some in groups.items():
        right = marks[mode, distance]
        paired = Paired.of(marks[NOTHING, 0.0], right)
        saved, whole = sum(each.saved for each in some), sum(each.bytes for each in some)
        nats = sum(each.divergence for each in some) / sum(each.tokens for each in some)
        rows.append(
            {
                "share": mode,
                "distance": f"{distance:g}",
                "right": Share.of(right).percent,
                "lost, gained (p)": f"{paired.lost}, {paired.gained} ({paired.p_value:.2g})",
                "steps that share": _percent(
                    sum(each.matched for each in some), sum(each.steps for each in some)
                ),
                "bytes saved": _percent(saved, whole),
                "nats per token": f"{max(0.0, nats):.4f}",
            }
        )
    return rows


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}"


def main() -> None:
    """Run what is missing, then write the table."""
    made = batches_parser(__doc__, "votes.md", batch=20, branches="sampled ones of each problem")
    made.add_argument("--distances", type=float, nargs="+", default=[0.3, 1.0])
    made.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    arguments = parse(made)
    seed, name = seed_of(arguments, 800), table_name(arguments, "similar_steps")
    reasoner = REASONERS[arguments.reasoner]
    ways = [(mode, distance) for distance in arguments.distances for mode in arguments.modes]

    def make(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, key: Key, some: Sequence[Any]
    ) -> Tally:
        how = MODES.get(key[0], {}) | {"distance": key[1]}
        return Tally(*key, **run(model, tokenizer, reasoner, some, how, arguments.branches))

    rows = table(answer_batches(arguments, name, seed, [(NOTHING, 0.0), *ways], Tally, {}, make))
    way = f"{arguments.branches} branches sampled" if arguments.branches > 1 else "greedy"
    note = (
        f"{reasoner.title}, {arguments.problems} "
        f"{'development' if arguments.development else 'fresh'} problems of all tasks (seed "
        f"{seed}), {way}. Percent, Wilson 95% intervals; lost, gained: against sharing nothing, "
        "with McNemar's p; nats: divergence of the next-token distribution from the full cache's "
        f"on the same text. {versions()}."
    )
    show(rows, note, name, arguments)


if __name__ == "__main__":
    main()
