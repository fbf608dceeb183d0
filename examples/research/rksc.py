"""RKSC's semantic sharing and logit-lens exit on a reasoner: what they get wrong.

    python -m examples.research.rksc --reasoner llama

Semantic sharing, on the tiny reasoners: every problem is a root, and two kinds of prompts of the
same length ask to share its prefix: the same facts in another order, which mean the same, and
another problem, which does not. Logit lens: how many tokens a layer before the last would decide,
how many of them otherwise, and what becomes of the answers if generation goes on with them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.arguments import parse, reasoner_parser
from examples.research.reasoners import REASONERS, Reasoner, TinyReasoner, encode, mixed
from examples.research.tables import publish, versions
from examples.tiny_reasoner import TASKS, TEST_SEEDS, check, make_problems
from examples.tiny_reasoner.tasks import Problem
from hf_reasoncache.evaluation import Share
from hf_reasoncache.experimental import LensExit, LogitLens, semantic_prefill
from hf_reasoncache.releases import cache_kwarg

TAU = 0.82
POOL = 60
"""Problems per problem asked for, to find others of the same length among."""

LENSES = {"entropy 0.5, change 0.1": LensExit(), "entropy 0.05, change 0.01": LensExit(0.05, 0.01)}


def reordered(problem: Problem, rng: random.Random) -> str:
    """Shuffle the facts of a prompt, which end with full stops; the question stays at the end."""
    head, *facts, question = problem.prompt.split(" . ")
    first = head.split()
    # A walk's prompt begins with RULE, which stays in front.
    start = first[:2] if first[1] == "RULE" else first[:1]
    facts = [" ".join(first[len(start) :]), *facts]
    rng.shuffle(facts)
    return " ".join([*start, " . ".join([*facts, question])])


def groups(count: int, family: str) -> Iterator[tuple[str, Problem, str]]:
    """Yield kind, the problem that a prompt states, and the root's prompt, of equal length."""
    rng = random.Random(0)
    for task in TASKS:
        pool = make_problems(task, count * POOL // len(TASKS), TEST_SEEDS[0], family)
        for index, root in enumerate(pool[: count // len(TASKS)]):
            length = len(root.prompt.split())
            others = [
                other
                for other in pool[index + 1 :]
                if len(other.prompt.split()) == length and other.answer != root.answer
            ]
            yield "same facts, other order", root, reordered(root, rng)
            if others:
                yield "another problem", others[0], root.prompt


@torch.inference_mode()
def semantic(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, family: str
) -> list[dict[str, str]]:
    """Measure semantic sharing, one line per kind of prompt."""
    model.set_attn_implementation("reasoncache")
    found: dict[str, list[tuple[float, bool, bool, float, bool]]] = {}
    for kind, problem, root in tqdm(list(groups(count, family)), unit="pair"):
        ids = tokenizer([root, problem.prompt], return_tensors="pt")["input_ids"]
        # Every row reads its own question; the facts before it are the root's.
        probe = len(problem.prompt.rsplit(" . ", 1)[1].split()) - 1
        everything = semantic_prefill(model, ids, tau=-1.0, probe=probe)
        similarity = float(everything.similarity[1])
        out = model.generate(
            ids,
            **cache_kwarg(everything.cache),
            do_sample=False,
            max_new_tokens=problem.max_new_tokens,
        )
        text = tokenizer.decode(out[1, ids.shape[1] :])
        found.setdefault(kind, []).append(
            (
                similarity,
                similarity >= TAU,
                bool(everything.changed[1]),
                float(everything.divergence[1]),
                check(problem, text).correct,
            )
        )
    rows = []
    for kind, pairs in found.items():
        similarities, shares, changed, nats, right = zip(*pairs, strict=True)
        low, high = min(similarities), max(similarities)
        rows.append(
            {
                "prompt beside the root": kind,
                "pairs": str(len(pairs)),
                "similarity, least to most": f"{low:.3f} to {high:.3f}",
                f"share at {TAU:g}": Share.of(list(shares)).percent,
                "next token changed": Share.of(list(changed)).percent,
                "nats": f"{sum(nats) / len(nats):.3f}",
                "right answers when shared": Share.of(list(right)).percent,
            }
        )
    return rows


@torch.inference_mode()
def lenses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, reasoner: Reasoner
) -> list[dict[str, str]]:
    """Measure the logit lens, one line per threshold."""
    model.set_attn_implementation("sdpa")
    rows = []
    for name, exit in LENSES.items():
        right: dict[bool, list[bool]] = {False: [], True: []}
        looked = LogitLens(model, exit)
        for some in tqdm(mixed(reasoner, count, TEST_SEEDS[0]).values(), desc=name):
            inputs = encode(reasoner, tokenizer, some)
            for act, lens in ((False, looked), (True, LogitLens(model, exit))):
                with lens:
                    out = model.generate(
                        **inputs,
                        do_sample=False,
                        max_new_tokens=reasoner.max_new_tokens,
                        logits_processor=[lens.processor] if act else [],
                    )
                texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
                answers = map(reasoner.read_answer, texts)
                right[act] += list(map(reasoner.is_right, some, answers))
        report = looked.report()
        rows.append(
            {
                "lens": name,
                "tokens": str(report.tokens),
                "decided early": f"{100 * report.exited / report.tokens:.1f}",
                "of these otherwise": f"{100 * report.error:.2f}",
                "layers": f"{report.depth:.2f} of {report.layers}",
                "right without": Share.of(right[False]).percent,
                "right with exits": Share.of(right[True]).percent,
            }
        )
    return rows


def main() -> None:
    """Measure both and write the tables."""
    arguments = parse(reasoner_parser(__doc__, "votes.md", problems=100))
    reasoner, count = REASONERS[arguments.reasoner], arguments.problems
    model, tokenizer = reasoner.load()
    note = (
        f"{reasoner.title}, {count} fresh problems of all tasks (seed {TEST_SEEDS[0]}), greedy. "
        f"Percent, Wilson 95% intervals. {versions()}."
    )
    tables = {"lens": lenses(model, tokenizer, count, reasoner)}
    if isinstance(reasoner, TinyReasoner):
        tables["semantic"] = semantic(model, tokenizer, count, reasoner.name)
    for name, rows in tables.items():
        table = f"{name}-{reasoner.name}"
        publish(rows, note, table, arguments.output, arguments.document)


if __name__ == "__main__":
    main()
