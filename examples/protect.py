"""Parts of a prompt that must not be evicted: the rest may be, where prompts are long.

python -m examples.protect
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import MODELS, check, make_problems
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.protection import spans
from hf_reasoncache.scorers import SnapKV


def main() -> None:
    name = MODELS["llama"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")

    # Asks for one word after each step, others after odd and even ones, and one at the very end.
    problem = make_problems("instr", 2, seed=1500, family="llama")[1]
    inputs = tokenizer(problem.prompt, return_tensors="pt")
    instructions = [f"DO {when} {word} ." for when, word in problem.instructions.items()]
    keep = spans(tokenizer, problem.prompt, substrings=instructions)  # of a chat: roles="system"

    for title, protect in (("instructions may go", False), ("instructions stay", keep)):
        cache = ReasonAllocCache(
            model.config,
            budget=80,
            buffer=16,
            window=16,
            scorer=SnapKV(queries=16),
            profile=name / "tuned",
            protect=protect,
        )
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=512)
        followed = check(problem, tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])).followed
        counts = [f"{when} {sum(marks)}/{len(marks)}" for when, marks in followed.items()]
        print(f"{title}: {cache.keep_rates(keep).mean():.0%} of them held at the end")
        print(f"  followed: {', '.join(counts)}")


if __name__ == "__main__":
    main()
