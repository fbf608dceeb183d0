"""Measure a tiny reasoner with the full cache on the 200 fresh problems of each task.

    python -m examples.tiny_reasoner.evaluate --model llama
    python -m examples.tiny_reasoner.evaluate --model llama --samples 8 --temperature 1.0 --count 50

Plain `generate` of transformers: greedy, or sampled where ``--samples`` asks for several answers
and their majority. Intervals are Wilson's, at 95%. Needs scipy.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_reasoncache.evaluation.statistics import Share

from . import DEFAULT_FAMILY, MODELS
from .families import FAMILIES, TASKS
from .tasks import TEST_SEEDS, Outcome, Problem, check, make_problems, read_answer


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a tiny reasoner in float32 (bfloat16 is slower on most CPUs)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def encode(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> BatchEncoding:
    """Turn the prompts of some problems into one batch, padded on the left."""
    return tokenizer(
        [problem.prompt for problem in problems],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batch_size: int = 50,
    samples: int = 1,
    temperature: float = 0.0,
) -> list[list[str]]:
    """Return `samples` completions of every problem, special words included.

    Parameters
    ----------
    model, tokenizer
        As loaded by the Auto classes.
    problems
        Problems of one family.
    batch_size
        Sequences generated together, padded on the left.
    samples
        Completions of each problem.
    temperature
        Zero is greedy.
    """
    repeated = [problem for problem in problems for _ in range(samples)]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    completions: list[str] = []
    for start in tqdm(range(0, len(repeated), batch_size), leave=False, desc="batches"):
        batch = repeated[start : start + batch_size]
        inputs = encode(tokenizer, batch).to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=max(problem.max_new_tokens for problem in batch),
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        completions += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [completions[first : first + samples] for first in range(0, len(completions), samples)]


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer, the earliest of equals; missing answers do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def describe(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Return what to report of one completion per problem, as pairs of a name and a value."""
    lines = [
        ("exact answers", str(Share.of([outcome.correct for outcome in outcomes]))),
        ("finished", str(Share.of([outcome.finished for outcome in outcomes]))),
        ("mean length", f"{statistics.mean(outcome.length for outcome in outcomes):.0f} words"),
    ]
    directives = dict.fromkeys(name for outcome in outcomes for name in outcome.followed)
    lines += [
        (f"follows {name}", str(Share.of([mark for o in outcomes for mark in o.followed[name]])))
        for name in directives
    ]
    if directives:
        whole = [all(all(marks) for marks in outcome.followed.values()) for outcome in outcomes]
        lines.append(("follows all of them", str(Share.of(whole))))
    return lines


def describe_votes(
    problems: Sequence[Problem], completions: Sequence[Sequence[str]]
) -> list[tuple[str, str]]:
    """Return what to report of several sampled completions per problem."""
    pairs = list(zip(problems, completions, strict=True))
    single = [check(problem, text).correct for problem, texts in pairs for text in texts]
    answers = [[read_answer(text) for text in texts] for texts in completions]
    voted = [
        majority(row) == problem.answer for problem, row in zip(problems, answers, strict=True)
    ]
    distinct = statistics.mean(len(set(row)) for row in answers)
    chains = statistics.mean(len(set(texts)) for texts in completions)
    return [
        # The samples of a problem are alike, so an interval over all of them would be too narrow.
        ("single answer", f"{statistics.mean(single):.3f}"),
        (f"majority of {len(completions[0])}", str(Share.of(voted))),
        ("distinct answers per problem", f"{distinct:.2f}"),
        ("distinct chains per problem", f"{chains:.2f}"),
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure a tiny reasoner with the full cache.")
    parser.add_argument(
        "--model",
        default=DEFAULT_FAMILY,
        help=f"one of {', '.join(MODELS)}, or a directory (then name its --family)",
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: the model's name")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--count", type=int, default=200, help="problems of each task")
    parser.add_argument(
        "--seed",
        type=int,
        default=TEST_SEEDS[0],
        help="of the problems; 1000 to 1999 are for choices, 2000 and above for reports",
    )
    parser.add_argument("--samples", type=int, default=1, help="sampled answers per problem")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    family = arguments.family or arguments.model
    if family not in FAMILIES:
        parser.error("a model given as a directory needs --family")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    path: Path = MODELS.get(arguments.model, Path(arguments.model))
    model, tokenizer = load(path)
    print(f"{arguments.model}: {arguments.count} problems of each task, seed {arguments.seed}")
    for task in arguments.tasks:
        problems = make_problems(task, arguments.count, arguments.seed, family)
        several = arguments.samples > 1
        completions = generate(
            model,
            tokenizer,
            problems,
            arguments.batch_size,
            arguments.samples,
            arguments.temperature if several else 0.0,
        )
        if several:
            lines = describe_votes(problems, completions)
        else:
            pairs = zip(problems, completions, strict=True)
            lines = describe([check(problem, texts[0]) for problem, texts in pairs])
        print(task)
        for name, value in lines:
            print(f"  {name:30s} {value}", flush=True)


if __name__ == "__main__":
    main()
