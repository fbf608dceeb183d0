"""Prompts of several lengths in one batch: each row evicts when its own buffer is full.

python -m examples.batch

`hf-reasoncache generate` answers whole files of prompts, in batches that fit into memory.
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import MODELS, check, make_problems
from hf_reasoncache import ReasonAllocCache


def main() -> None:
    name = MODELS["llama"]
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")

    tasks = ("chain", "walk", "instr")
    problems = [make_problems(task, 1, seed=1500, family="llama")[0] for task in tasks]
    inputs = tokenizer([each.prompt for each in problems], padding=True, return_tensors="pt")

    # A profile gives more of the budget to the layers that need it: docs/calibration.md.
    cache = ReasonAllocCache(
        model.config, budget=112, buffer=16, window=16, protect=False, profile=name / "tuned"
    )
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=512)

    report = cache.report()
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
    for row, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
        outcome = check(problem, answer)
        held = [sum(layer.held[row]) / len(layer.held[row]) for layer in report.layers]
        print(
            f"{problem.task:5}  prompt {int(inputs['attention_mask'][row].sum()):3}, answer "
            f"{outcome.length}, {'right' if outcome.correct else 'wrong'}; held per head, "
            f"by layer: {' '.join(f'{number:.0f}' for number in held)}"
        )
    print(report)


if __name__ == "__main__":
    main()
