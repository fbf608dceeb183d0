"""Compress each window of new tokens once, instead of evicting whenever a budget is full.

python -m examples.sliding_window
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import MODELS, check, make_problems
from hf_reasoncache import SlidingWindowCompressCache


def main() -> None:
    name = MODELS["llama"]
    problem = make_problems("walk", 1, seed=1500, family="llama")[0]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")
    inputs = tokenizer(problem.prompt, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]

    print("ratio  tokens held of all  answer")
    for ratio in (0.3, 0.6, 1.0):
        # The newest 16 tokens are always held; of every 32 before them, and after the prompt, a
        # share of `ratio` stays.
        cache = SlidingWindowCompressCache(
            model.config, ratio=ratio, window=32, recent=16, profile=name / "sensitivity"
        )
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=512)
        correct = check(problem, tokenizer.decode(out[0, prompt:])).correct
        report = cache.report()
        held = f"{report.mean_held:.0f} of {report.seen}"
        print(f"{ratio:5}  {held:>18}  {'right' if correct else 'wrong'}")
    print(report)


if __name__ == "__main__":
    main()
