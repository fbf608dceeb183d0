"""A batched chat of three turns, whose answers end at different steps."""

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache.releases import cache_kwarg
from tests.support.caches import KINDS, exact_cache

pytestmark = [pytest.mark.real, pytest.mark.slow]

FIRST = ["What is the capital of France?", "Name three fruits.", "Tell me about lighthouses."]
LATER = ["And of Italy?", "Which of them is red?"], ["Thank you.", "And a vegetable?"]
TURN = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def chat(model, tokenizer, cache):
    """Answers of three turns, and how many columns the mask of the last one hides in each row."""
    chats = [[{"role": "user", "content": text}] for text in FIRST]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids, mask, found = inputs["input_ids"], inputs["attention_mask"], []
    for turn in (*LATER, None):
        before = ids.shape[1]
        ids = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **cache_kwarg(cache),
            max_new_tokens=24,
            do_sample=False,
        )
        new = ids[:, before:]
        found.append(new)
        ended = (new == tokenizer.eos_token_id).cumsum(-1)
        # Up to the token that ends the answer; what follows is padding.
        mask = torch.cat([mask, (ended - (new == tokenizer.eos_token_id).int() == 0).long()], 1)
        if turn is not None:
            texts = [TURN.format(text) for text in (*turn, "Go on.")]
            more = tokenizer(texts, padding=True, return_tensors="pt")
            ids = torch.cat([ids, more["input_ids"]], 1)
            mask = torch.cat([mask, more["attention_mask"]], 1)
    return found, (mask == 0).sum(-1)


def test_three_turns_equal_dynamic_cache(smollm2):
    model, tokenizer = smollm2
    model.set_attn_implementation("sdpa")
    try:
        expected, hidden = chat(model, tokenizer, DynamicCache(config=model.config))
    finally:
        model.set_attn_implementation("reasoncache")
    assert len(set(hidden.tolist())) == 3 and int(hidden.max()) > 24, "rows ended apart"
    assert "Rome" in tokenizer.decode(expected[1][0])
    for kind in KINDS:
        found, _ = chat(model, tokenizer, exact_cache(kind, model))
        for turn, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(got, wanted), (kind, turn)
