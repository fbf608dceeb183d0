"""A scorer of your own: which tokens a head keeps. The first thing that it must beat is chance.

python -m examples.custom_scorer
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import MODELS, check, make_problems
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.scorers import Random, Scorer
from hf_reasoncache.scorers.base import HeldTokens


@dataclass(frozen=True)
class MeanAttention(Scorer):
    """The attention that a token has received, on average over the queries since it came."""

    needs_cumulative_attention: ClassVar[bool] = (
        True  # the layer sums attention up: a pass over the keys per step
    )

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Return float32 `[rows, heads, tokens]`; the higher, the longer a token is kept."""
        age = held.length[:, None, None] - held.positions
        return held.cumulative_attention / age


def main() -> None:
    name = MODELS["llama"]
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="reasoncache")
    problems = make_problems("walk", 12, seed=1500, family="llama")
    inputs = tokenizer([each.prompt for each in problems], padding=True, return_tensors="pt")

    for scorer in (MeanAttention(), Random()):
        cache = ReasonAllocCache(
            model.config, budget=96, buffer=16, window=16, protect=False, scorer=scorer
        )
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=512)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
        right = sum(check(*pair).correct for pair in zip(problems, texts, strict=True))
        print(f"{scorer}: {right} of {len(problems)} right")


if __name__ == "__main__":
    main()
