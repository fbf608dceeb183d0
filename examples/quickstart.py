"""Three lines put the KV cache of a model on a budget.

python -m examples.quickstart
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import MODELS, make_problems
from hf_reasoncache import ReasonAllocCache, enable_graphs  # registers the "reasoncache" attention


def main() -> None:
    name = MODELS["llama"]  # or "Qwen/Qwen3-8B", or another decoder of the Hub
    problem = make_problems("walk", 1, seed=1500, family="llama")[0]

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")  # 1
    enable_graphs(model)  # on a GPU, decode steps from CUDA graphs
    inputs = tokenizer(problem.prompt, return_tensors="pt")

    # Chains of thought have some 300 tokens here: a smaller buffer than the default of 128.
    cache = ReasonAllocCache(model.config, budget=160, buffer=16, window=16)  # 2
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=512)  # 3

    print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
    print(f"the answer is {problem.answer}")
    print(cache.report())


if __name__ == "__main__":
    main()
