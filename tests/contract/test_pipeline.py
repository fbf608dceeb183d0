"""`pipeline`: every prompt is answered by itself, whatever was asked before."""

import pytest
import torch
import transformers
from transformers import DynamicCache, TextStreamer

import hf_reasoncache
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import build
from tests.support.tokenizers import make_tokenizer

QUESTIONS = ["the key", "never reveal the secret key to the user", "to the user"]
CHATS = [[{"role": "user", "content": text}] for text in QUESTIONS]
GREEDY = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
BUDGET = ReasonAllocCache.policy(budget=16, buffer=4, window=4, protect=False)


@pytest.fixture(scope="module")
def model():
    built = build("llama")
    built.resize_token_embeddings(320)
    return built


def ask(model, cache, inputs, **settings):
    pipe = hf_reasoncache.pipeline(model, make_tokenizer(), cache=cache)
    return [answer[0]["generated_text"] for answer in pipe(inputs, **GREEDY, **settings)]


def test_every_prompt_has_a_cache_of_its_own(model):
    alone = [ask(model, BUDGET, [chat])[0] for chat in CHATS]
    assert len(set(alone)) == len(alone)
    assert ask(model, BUDGET, CHATS) == alone
    assert ask(model, BUDGET, CHATS, batch_size=3) == alone


@pytest.mark.parametrize("inputs", [CHATS, QUESTIONS], ids=["chats", "texts"])
def test_without_a_budget_it_answers_as_the_pipeline_of_transformers(model, inputs):
    stock = transformers.pipeline("text-generation", model=model, tokenizer=make_tokenizer())
    expected = [answer[0]["generated_text"] for answer in stock(inputs, **GREEDY)]
    assert ask(model, ReasonAllocCache.policy(budget=None), inputs) == expected
    assert ask(model, lambda config: DynamicCache(config=config), inputs) == expected


def test_it_streams_and_keeps_the_last_cache(model):
    written = []

    class Kept(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            written.append(text)

    tokenizer = make_tokenizer()
    pipe = hf_reasoncache.pipeline(model, tokenizer, cache=BUDGET)
    assert pipe.cache is None
    streamer = Kept(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = pipe(CHATS[1], streamer=streamer, **GREEDY)
    assert "".join(written) == answer[0]["generated_text"]
    report = pipe.cache.report()
    assert report.evicted > 0
    assert report.mean_held <= 20


def test_a_model_by_its_directory_is_loaded_with_our_attention(model, tmp_path):
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    pipe = hf_reasoncache.pipeline(str(tmp_path), cache=BUDGET, dtype=torch.float32)
    assert pipe.model.config._attn_implementation == "reasoncache"
    answers = [answer[0]["generated_text"] for answer in pipe(CHATS, **GREEDY)]
    assert answers == ask(model, BUDGET, CHATS)


@pytest.mark.parametrize(("own", "ours"), [("sdpa", "reasoncache"), ("eager", "reasoncache_eager")])
def test_the_attention_of_a_model_is_extended(own, ours):
    model = build("llama", own)
    hf_reasoncache.pipeline(model, make_tokenizer(), cache=BUDGET)
    assert model.config._attn_implementation == ours


def test_what_it_does_not_take(model):
    tokenizer, used = make_tokenizer(), BUDGET(model.config)
    with pytest.raises(ValueError, match=r"cache: expected what makes a new cache.*got ReasonAl"):
        hf_reasoncache.pipeline(model, tokenizer, cache=used)
    pipe = hf_reasoncache.pipeline(model, tokenizer, cache=BUDGET)
    with pytest.raises(ValueError, match="every batch gets a new one"):
        pipe(CHATS[0], **cache_kwarg(used), **GREEDY)
    flex = build("llama", "flex_attention")
    with pytest.raises(ValueError, match=r"expected an attention implementation of.*flex_att"):
        hf_reasoncache.pipeline(flex, tokenizer, cache=BUDGET)
