"""Does a sensitivity wave of pretrained weights depend on the prompts, the text, its length?

    python -m examples.research.wave_stability

Waves of SmolLM2-135M-Instruct from halves of the calibration prompts, from pages of Python's own
documentation, and from texts of three lengths: how far they are from the shipped profile, how far
halves are from each other, and what each one gains on text that none of them has seen.
"""

from __future__ import annotations

import pydoc_data.topics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from examples.real_model.model import SENSITIVITY, load
from examples.real_model.perplexity import TOPICS, difference, texts
from examples.research.arguments import parse, real_parser
from examples.research.perplexity import COMMON, TOKENS
from examples.research.tables import publish, versions
from hf_reasoncache import BudgetProfile, ReasonAllocCache
from hf_reasoncache.calibration.estimate import Record
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.evaluation.fidelity import forwards, losses
from hf_reasoncache.profiles.distance import wave_distance

BUDGET = 128
PROMPT = 40
"""Tokens of a page that are read in one forward, as a prompt is."""

ESTIMATOR = Sensitivity(budgets=(64, 128), budget=96, eviction=Eviction(buffer=32))
"""That of the shipped profile."""

ANSWERS, LENGTHS = 256, (128, 256, 512)


def pages(tokenizer, count: int, length: int) -> list[Trace]:
    """The first pages that are long enough for every length and that `perplexity` does not read."""
    found: list[Trace] = []
    for name, page in sorted(pydoc_data.topics.topics.items()):
        ids = [] if name in TOPICS else tokenizer(page)["input_ids"]
        if len(ids) >= PROMPT + max(LENGTHS):
            found.append(Trace(tuple(ids[:PROMPT]), tuple(ids[PROMPT : PROMPT + length])))
    if len(found) < count:
        raise SystemExit(f"error: expected {count} pages long enough, got {len(found)}")
    return found[:count]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the waves, print the table, write it."""
    parser = real_parser(__doc__, "results.md", threads=1)
    parser.add_argument("--pages", type=int, default=4, help="of each length")
    given = parse(parser, arguments)
    begin = time.process_time()
    model, tokenizer = load(torch.bfloat16, given.model)
    shipped = BudgetProfile.from_pretrained(SENSITIVITY)

    # 1. Waves. Those of the answers are in the shipped profile, prompt by prompt.
    divergence = shipped.statistics["divergence"]
    answers: list[Record] = [{"divergence": each} for each in divergence]
    answered = [Trace((0,) * PROMPT, (0,) * ANSWERS)] * len(answers)
    half = len(answers) // 2
    waves = {
        "answers, first half": wave(answers[:half], answered[:half]),
        "answers, second half": wave(answers[half:], answered[half:]),
    }
    for length in LENGTHS:
        read = pages(tokenizer, given.pages, length)
        found = [ESTIMATOR.measure(model, trace) for trace in read]
        name = f"pages, {length} tokens"
        half = given.pages // 2
        waves[f"{name}, first half"] = wave(found[:half], read[:half])
        waves[f"{name}, second half"] = wave(found[half:], read[half:])
        waves[name] = wave(found, read)
        print(f"{name}: {time.process_time() - begin:.0f} s", flush=True)

    # 2. What they gain.
    ids = texts(tokenizer, TOKENS)

    def loss(profile: BudgetProfile | None) -> torch.Tensor:
        cache = ReasonAllocCache(model.config, budget=BUDGET, profile=profile, **COMMON)
        return losses(ids, forwards(model, ids, cache))

    equal = loss(None)
    rows = []
    for name, demand in {"answers (shipped)": shipped.demand, **waves}.items():
        other = waves.get(name.replace("first", "second")) if "first" in name else None
        gain = ""
        if "pages" not in name or "half" not in name:
            gain = difference(loss(replace(shipped, demand=demand, statistics={})), equal)
        rows.append(
            {
                "wave from": name,
                "distance to the shipped": f"{wave_distance(demand, shipped.demand):.4f}",
                "to the second half": ""
                if other is None
                else f"{wave_distance(demand, other):.4f}",
                "loss against equal layers": gain,
            }
        )
        print(*rows[-1].values(), sep="  ", flush=True)
    note = (
        f"SmolLM2-135M-Instruct in bfloat16; the shipped wave is of {len(answers)} answers of up "
        f"to {ANSWERS} tokens, the others of {given.pages} pages of Python's documentation. "
        f"R-KV at budget {BUDGET} on the texts of `perplexity`, "
        "which no wave has seen; mean difference of the loss in nats with its 95% interval. Only "
        "the intervals draw at random (seed 0). `python -m examples.research.wave_stability "
        f"--pages {given.pages}`, {versions()}, "
        f"{(time.process_time() - begin) / 60:.0f} minutes on one core."
    )
    publish(rows, note, "wave_stability", given.output, given.document)


def wave(records: Sequence[Record], traces: Sequence[Trace]) -> tuple[float, ...]:
    """The demand of each layer."""
    return tuple(ESTIMATOR.estimate(records, traces).demand.tolist())


if __name__ == "__main__":
    main()
