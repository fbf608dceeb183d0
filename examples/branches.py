"""Sixteen sampled branches of one prompt, which is held once; the vote stops when it is settled.

python -m examples.branches
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import MODELS, make_problems, read_answer
from hf_reasoncache import ConfidentExit, SharedBranchCache, branch_generate


def main() -> None:
    name = MODELS["llama"]
    problem = make_problems("walk", 1, seed=1500, family="llama")[0]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")
    inputs = tokenizer(problem.prompt, return_tensors="pt")

    # Ends all branches as soon as those that go on cannot change the vote.
    exit = ConfidentExit(read_answer, branches=16, tokenizer=tokenizer)
    cache = SharedBranchCache(model.config)
    torch.manual_seed(0)
    branch_generate(
        model,
        inputs,
        num_branches=16,
        past_key_values=cache,
        do_sample=True,
        max_new_tokens=512,
        stopping_criteria=[exit],
        logits_processor=[exit.recorder],
    )
    print(exit.results()[0])
    print(f"the answer is {problem.answer}")
    print(cache.report())


if __name__ == "__main__":
    main()
