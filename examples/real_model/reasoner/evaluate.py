"""Measure the reasoner with the full cache on fresh problems, by greedy decoding.

    python -m examples.real_model.reasoner.evaluate

One forward over a problem and its chain says how far greedy decoding agrees with the chain; from
the first token that it chooses otherwise, it goes on alone. So what is measured is what `generate`
writes, at the price of a prefill where that is the chain to the letter.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model import model as real_model
from hf_reasoncache.evaluation.generation import answer_batch
from hf_reasoncache.evaluation.statistics import Share

from . import adapter, attention
from .problems import (
    CITIES,
    GOODS,
    MAX_NEW_TOKENS,
    NAMES,
    NUMBERS,
    TASKS,
    TEST_SEEDS,
    WORDS,
    Problem,
    check,
    first_difference,
    make_problems,
)
from .train import encode, group, predict

LISTS = {
    "NAME": NAMES,
    "GOODS": GOODS,
    "CITY": CITIES,
    "WORD": WORDS,
    "NUMBER": NUMBERS,
    "LABEL": ascii_uppercase,
}
AT_ONCE = 8
"""Problems in one forward."""
KINDS = {word: kind for kind, words in LISTS.items() for word in words}


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: Tokenizer, problems: Sequence[Problem], batch_size: int = 32
) -> list[str]:
    """Return what greedy decoding writes, without the token that ends it.

    Parameters
    ----------
    model : PreTrainedModel
        With the adapter merged.
    tokenizer : Tokenizer
        Of the model.
    problems : Sequence of Problem
        What is asked.
    batch_size : int
        Rows that go on alone together.
    """
    examples = [encode(tokenizer, problem) for problem in problems]
    agreed: dict[int, list[int]] = {}
    model.set_attn_implementation(attention.NAME)
    for some in group(examples, most=AT_ONCE):
        logits, targets = predict(model, some)
        lengths = [len(each.ids) - each.start for each in some]
        parts = zip(some, logits.argmax(-1).split(lengths), targets.split(lengths), strict=True)
        agreed |= {id(each): _agreed(chosen, true) for each, chosen, true in parts}
    replies = [agreed[id(each)] for each in examples]

    model.set_attn_implementation("sdpa")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    alone = [
        place
        for place, reply in enumerate(replies)
        if reply[-1] != end and len(reply) < MAX_NEW_TOKENS
    ]
    for first in range(0, len(alone), batch_size):
        places = alone[first : first + batch_size]
        rows = [examples[place].ids[: examples[place].start] + replies[place] for place in places]
        shortest = min(len(replies[place]) for place in places)
        cache = DynamicCache(config=model.config)
        found = answer_batch(model, rows, cache, max_new_tokens=MAX_NEW_TOKENS - shortest)
        for place, answer in zip(places, found.answers, strict=True):
            replies[place] += answer.tokens
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in replies]


def _agreed(chosen: torch.Tensor, true: torch.Tensor) -> list[int]:
    """Return the choices up to the first one that differs, which is the last of them."""
    wrong = (chosen != true).nonzero()[:, 0].tolist()
    return chosen[: wrong[0] + 1 if wrong else None].tolist()


def describe(problems: Sequence[Problem], replies: Sequence[str]) -> list[str]:
    """Return lines on the replies to the problems of a task."""
    pairs = list(zip(problems, replies, strict=True))
    outcomes = [check(*pair) for pair in pairs]
    correct = [bool(outcome.correct) for outcome in outcomes]
    followed = [outcome.followed["word"] for outcome in outcomes]
    same = [reply == problem.chain for problem, reply in pairs]
    lines = [
        f"  {name:24s} {sum(marks)}/{len(marks)} = {Share.of(marks)}"
        for name, marks in (
            ("exact answers", correct),
            ("word where it was asked", followed),
            ("chains to the letter", same),
        )
    ]
    places = Counter[str]()
    for pair in pairs:
        difference = first_difference(*pair)
        if difference is not None:
            places[kind_of(difference[0])] += 1
    return lines + [f"  first wrong sentence: {kind} ({n})" for kind, n in places.most_common()]


def kind_of(sentence: str) -> str:
    """Return a sentence with the kinds of its words, like "NAME has GOODS."."""
    return re.sub(r"\w+", lambda found: KINDS.get(found[0], found[0]), sentence)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure the reasoner with the full cache.")
    parser.add_argument("--folder", type=Path, default=real_model.FOLDER, help="of the model")
    parser.add_argument("--adapter", type=Path, default=adapter.HERE, help="folder of the adapter")
    parser.add_argument("--dtype", default="float32", help="of the merged weights")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--count", type=int, default=200, help="problems of each task")
    parser.add_argument(
        "--seed",
        type=int,
        default=TEST_SEEDS[0],
        help="of the problems; 1000 to 1999 are for choices, 2000 and above for reports",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--show", type=int, default=0, help="wrong sentences to print of each task")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = real_model.load(torch.float32, arguments.folder)
    model = adapter.merged(model, arguments.adapter).to(getattr(torch, arguments.dtype))
    for task in arguments.tasks:
        began = time.process_time()
        problems = make_problems(task, arguments.count, arguments.seed)
        replies = answers(model, tokenizer, problems, arguments.batch_size)
        print(f"{task}, seed {arguments.seed}, {time.process_time() - began:.0f} s of CPU")
        print("\n".join(describe(problems, replies)), flush=True)
        differences = [first_difference(*pair) for pair in zip(problems, replies, strict=True)]
        for wanted, found in [each for each in differences if each is not None][: arguments.show]:
            print(f"    {found!r} for {wanted!r}")


if __name__ == "__main__":
    main()
