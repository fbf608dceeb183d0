"""A chat continues its cache where the template lets it, and is right where it does not."""

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.generation import Conversation
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import build
from tests.support.tokenizers import TEMPLATE, make_tokenizer

TURNS = ["the key", "never reveal the secret key", "to the user"]
WITHOUT_ANSWERS = TEMPLATE.replace("in messages", "in messages if m['role'] != 'assistant'")
"""Leaves out what was answered before, as templates of reasoning models leave out thoughts."""

GREEDY = {"max_new_tokens": 20, "do_sample": False}


def full(config):
    return DynamicCache(config=config)


def exact(config):
    return ReasonAllocCache(config, budget=None)


@pytest.fixture(scope="module")
def model():
    built = build("llama")
    built.resize_token_embeddings(320)
    return built


def answers(model, new_cache, template=TEMPLATE):
    talk = Conversation(model, make_tokenizer(template), new_cache, system="reveal the key")
    caches = []
    for text in TURNS:
        talk.answer(text, **GREEDY)
        caches.append(talk.cache)
    return talk, caches


def alone(model, messages, template):
    """The answer to a chat, read by a new cache."""
    tokenizer = make_tokenizer(template)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, **cache_kwarg(full(model.config)), **GREEDY)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("new_cache", [full, exact], ids=["DynamicCache", "ours"])
@pytest.mark.parametrize("template", [TEMPLATE, WITHOUT_ANSWERS], ids=["all", "without answers"])
def test_every_answer_is_that_to_the_whole_chat(model, new_cache, template):
    talk, _ = answers(model, new_cache, template)
    assert [each["role"] for each in talk.messages] == ["system"] + ["user", "assistant"] * 3
    for place in range(2, len(talk.messages), 2):
        said = alone(model, talk.messages[:place], template)
        assert talk.messages[place]["content"] == said


def test_turns_continue_one_cache_if_the_chat_begins_with_what_it_has_seen(model):
    class Echo(Conversation):
        """Its text is what it has seen, whatever the model has written."""

        def _continues(self, ids):
            seen.append(self._fed.shape[1])
            return super()._continues(ids)

    seen = []
    tokenizer = make_tokenizer("{{ messages[-1]['content'] }}")
    talk = Echo(model, tokenizer, exact)
    talk.answer("the key", **GREEDY)
    first = talk.cache
    text = tokenizer.decode(talk._fed[0])
    again = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert torch.equal(again[:, : talk._fed.shape[1]], talk._fed)
    talk.answer(text + " to the user", **GREEDY)
    assert talk.cache is first
    talk.answer("to the user", **GREEDY)
    assert talk.cache is not first
    assert seen[0] > 0 and len(seen) == 2


def test_an_interrupted_turn_is_forgotten(model):
    class Interrupted:
        def put(self, value):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def end(self):
            pass

    talk = Conversation(model, make_tokenizer(), exact)
    talk.answer(TURNS[0], **GREEDY)
    before = list(talk.messages)
    streamer = Interrupted()
    streamer.left = 4
    with pytest.raises(KeyboardInterrupt):
        talk.answer(TURNS[1], streamer=streamer, **GREEDY)
    assert talk.messages == before
    said = talk.answer(TURNS[1], **GREEDY)
    assert said == alone(model, talk.messages[:-1], TEMPLATE)


def test_it_starts_anew(model):
    talk, _ = answers(model, exact)
    first = talk.messages[:3]
    talk.restart()
    assert talk.messages == first[:1] and talk.cache is None
    talk.answer(TURNS[0], **GREEDY)
    assert talk.messages == first


def test_a_tokenizer_without_a_chat_template(model):
    with pytest.raises(ValueError, match="expected one with a chat template, got none"):
        Conversation(model, make_tokenizer(None), exact)
