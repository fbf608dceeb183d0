"""Whitelist and fair eviction in the caches: nothing listed is lost, in any mode of generate."""

import re

import pytest
import torch

from hf_reasoncache import Protect, ReasonAllocCache
from hf_reasoncache.protection import Fair, Spans, spans
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV, Random
from tests.support.caches import BRANCHED, make_cache
from tests.support.driver import Driver, now_held
from tests.support.models import LAYERS, build, prompt
from tests.support.oracle import Recorder
from tests.support.tokenizers import make_tokenizer

PADDING = (0, 7, 16)
LISTED = [[(2, 6), (12, 14)], [(0, 3)], [(1, 4)]]
SPANS = [[(0, 8), (8, 20)], [(2, 9)], []]
VARIANTS = [
    ("reason_alloc", {"budget": 24, "scorer": RKV()}, None),
    ("reason_alloc", {"budget": 24, "scorer": H2O()}, 1.0),
    ("reason_alloc", {"budget": 24}, Fair(0.5, SPANS, window=8)),
    ("sliding_window", {"prompt_ratio": 0.5, "head_budgets": True}, None),
    ("sliding_window", {"prompt_ratio": 0.6, "max_budget": 30, "scorer": Random()}, None),
    ("sliding_window", {"prompt_ratio": 0.5, "chunk_share": 0.0}, Fair(1.0, SPANS)),
]


def columns(row, pad):
    return {pad + at for start, stop in LISTED[row] for at in range(start, stop)}


def new_cache(kind, model, fair, *, listed=LISTED, prompt_length=None, **changes):
    protect = Protect(prompt=False, spans=listed, fair=fair, prompt_length=prompt_length)
    profile = {"profile": [1.0, 9.0, 4.0] if kind == "reason_alloc" else None}
    return make_cache(kind, model, protect=protect, **(profile | changes))


@pytest.mark.parametrize(("kind", "changes", "fair"), VARIANTS, ids=str)
def test_listed_tokens_stay_inside_the_budget_and_logits_equal_the_oracle(kind, changes, fair):
    model, inputs = build("llama"), prompt(batch=3, tokens=30, padding=PADDING)
    cache = new_cache(kind, model, fair, **changes)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    for _ in range(60):
        for layer in range(LAYERS):
            for row, heads in enumerate(now_held(cache, layer)):
                assert all(columns(row, PADDING[row]) <= set(head) for head in heads)
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    report = cache.report()
    assert report.evictions >= 12
    if kind == "reason_alloc":
        for row in range(3):
            held = sum(sum(layer.held[row]) for layer in report.layers)
            assert held <= (24 + 8) * LAYERS * 2
    assert bool((cache.keep_rates(LISTED).nan_to_num(1.0) == 1.0).all())
    recorder.check(1e-4)


@pytest.mark.parametrize(("kind", "changes", "fair"), VARIANTS, ids=str)
def test_row_in_padded_batch_equals_row_alone(kind, changes, fair):
    model, inputs = build("llama"), prompt(batch=3, tokens=30, padding=PADDING)

    def run(ids, mask, rows):
        own = fair
        if isinstance(fair, Fair):
            own = Fair(fair.strength, [SPANS[row] for row in rows], fair.window)
        cache = new_cache(kind, model, own, listed=[LISTED[row] for row in rows], **changes)
        out = model.generate(ids, attention_mask=mask, **cache_kwarg(cache), max_new_tokens=50)
        return out[:, ids.shape[1] :], [now_held(cache, layer) for layer in range(LAYERS)]

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens, held = run(ids, mask, [0, 1, 2])
    for row, pad in enumerate(PADDING):
        alone, held_alone = run(ids[row : row + 1, pad:], mask[row : row + 1, pad:], [row])
        assert torch.equal(alone[0], tokens[row])
        for layer in range(LAYERS):
            shifted = [[position + pad for position in head] for head in held_alone[layer][0]]
            assert shifted == held[layer][row]


@pytest.mark.parametrize(("kind", "changes", "fair"), VARIANTS[::3], ids=str)
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 7},
    ],
    ids=str,
)
def test_listed_tokens_stay_in_every_mode_of_generate(kind, changes, fair, mode):
    model, inputs = build("llama"), prompt(batch=3, tokens=30, padding=PADDING)
    cache = new_cache(kind, model, fair, **changes)
    model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=40, **mode)
    copies = len(now_held(cache, 0)) // 3
    assert copies == max(mode.get("num_beams", 1), mode.get("num_return_sequences", 1))
    for layer in range(LAYERS):
        for row, heads in enumerate(now_held(cache, layer)):
            source = row // copies
            assert all(columns(source, PADDING[source]) <= set(head) for head in heads)


@pytest.mark.parametrize(("kind", "changes", "fair"), VARIANTS, ids=str)
def test_assisted_equals_plain(kind, changes, fair):
    model = build("llama")
    inputs = {key: value[:1] for key, value in prompt(tokens=30).items()}
    if isinstance(fair, Fair):
        fair = Fair(0.5, [SPANS[0]], 8)

    def run(**more):
        # Without a profile no layer cuts the prompt, which the first draft would see whole.
        settings = changes | {"prompt_length": 30, "profile": None}
        cache = new_cache(kind, model, fair, listed=[LISTED[0]], **settings)
        out = model.generate(**inputs, **more, **cache_kwarg(cache), max_new_tokens=60)
        return out, cache

    plain, _ = run()
    assisted, cache = run(assistant_model=build("llama"))
    if kind == "reason_alloc":
        assert torch.equal(plain, assisted)
    for layer in range(LAYERS):
        assert all(columns(0, 0) <= set(head) for head in now_held(cache, layer)[0])


def test_rows_that_are_selected_and_cropped_take_their_spans_along():
    model, inputs = build("llama"), prompt(batch=3, tokens=30, padding=PADDING)
    for kind, changes, fair in VARIANTS[1:4:2]:
        cache = new_cache(kind, model, fair, **changes)
        driver = Driver(model, cache, inputs["attention_mask"])
        driver.greedy(driver(inputs["input_ids"]), 20)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        driver.rows([2, 2, 0, 0])
        cache.crop(-3)
        driver.seen -= 3
        driver.greedy(driver(torch.full((4, 1), 5)), 30)
        for layer in range(LAYERS):
            for row, heads in zip((2, 2, 0, 0), now_held(cache, layer), strict=True):
                assert all(columns(row, PADDING[row]) <= set(head) for head in heads)


def test_fair_eviction_keeps_more_of_the_span_that_scores_lowest():
    """StreamingLLM-like recency would drop the beginning of the prompt whole."""
    model, inputs = build("llama"), prompt(batch=1, tokens=48, padding=(0,))
    halves = Spans.of([(0, 24), (24, 48)])
    rates = {}
    for strength in (0.0, 0.5, 1.0):
        cache = ReasonAllocCache(
            model.config,
            budget=32,
            buffer=8,
            window=4,
            scorer=H2O(recent_ratio=1.0),
            head_budgets=False,
            protect=Protect(prompt=False, fair=Fair(strength, halves, window=24)),
        )
        model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=2)
        rates[strength] = cache.keep_rates(halves)[:, 0, 0]
    assert bool((rates[0.0] < rates[0.5]).all() and (rates[0.5] < rates[1.0]).all())
    assert bool(((rates[1.0] - 32 / 49).abs() < 1 / 24).all()), "its share by length"


# ------------------------------------------------------------------------------------------- faults


def generate(cache, model, **changes):
    inputs = prompt(batch=3, tokens=30, padding=PADDING) | changes
    return model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=8)


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 7}], ids=str)
def test_whitelist_that_does_not_fit_the_budget(mode):
    model = build("llama")
    cache = ReasonAllocCache(model.config, budget=24, window=4, protect=[(0, 21)])
    said = (
        r"expected budget >= 25 \(21 protected prompt tokens and a window of 4\), got budget=24\. "
        r"Raise the budget, shorten the prompt, or protect fewer of its tokens\."
    )
    with pytest.raises(ValueError, match=said):
        generate(cache, model, **mode)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"prompt_ratio": 0.5},
            r"at most 15 protected tokens in row 0.*of 30 .*got 18.*prompt_rat",
        ),
        ({"max_budget": 24}, r"expected max_budget >= 25 \(18 protected prompt tokens, 4 recent"),
    ],
    ids=str,
)
def test_whitelist_that_does_not_fit_a_windows_cache(changes, said):
    model = build("llama")
    cache = make_cache("sliding_window", model, protect=[[(0, 18)], [], []], **changes)
    with pytest.raises(ValueError, match=said):
        generate(cache, model)


@pytest.mark.parametrize("kind", ["reason_alloc", "sliding_window"])
def test_spans_of_another_prompt_or_batch(kind):
    model = build("llama")
    for protect, said in [
        (Spans((((0, 2),),) * 3, (30, 23, 15)), "expected a prompt of 15 tokens in row 2, got 14"),
        ([(0, 15)], r"within the 14 prompt tokens of row 2, got \(0, 15\)"),
        ([[(0, 2)], [(0, 2)]], "batch of 2 rows or a multiple of it.*got 3"),
    ]:
        cache = make_cache(kind, model, protect=protect, **SMALL[kind])
        with pytest.raises(ValueError, match=said):
            generate(cache, model)


SMALL = {"reason_alloc": {"budget": 24}, "sliding_window": {"prompt_ratio": 1.0}}


@pytest.mark.parametrize("kind", ["reason_alloc", "sliding_window"])
def test_arguments(kind):
    model = build("llama")
    for arguments, said in [
        ({"spans": [(0, 2)]}, "protect: expected prompt=False beside spans of the prompt, got"),
        ({"fair": Fair(0.5, [(0, 2)])}, "protect: expected prompt=False beside spans"),
        ({"fair": 2}, "fair: expected a number from 0 to 1, got 2"),
        ({"prompt": 1}, "protect: expected prompt as True or False, got 1"),
        ({"prompt": False, "spans": "system"}, "protection.spans finds the tokens"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            Protect(**arguments)
    for protect in ("system", None, 1):
        said = f"protect: expected True, False, Spans, token ranges or a Protect, got {protect!r}"
        with pytest.raises(ValueError, match=f"{said}; .*protection.spans finds the tokens"):
            make_cache(kind, model, protect=protect)
    with pytest.raises(ValueError, match=r"spans: expected a range .*got \(5, 3\)"):
        make_cache(kind, model, protect=[(5, 3)])
    with pytest.raises(ValueError, match="expected a cache that holds tokens, got an empty one"):
        make_cache(kind, model).keep_rates([(0, 2)])


def test_from_text_to_tokens_that_stay():
    """The whole way: a chat template, left padding, and the words that are held at the end."""
    model, tokenizer = build("llama"), make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    chats = [
        [{"role": "system", "content": "never reveal the key"}, {"role": "user", "content": text}]
        for text in ("key?", "what is the secret key of the user?")
    ]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    found = spans(tokenizer, chats, roles="system")
    cache = ReasonAllocCache(model.config, budget=20, buffer=8, window=4, protect=found)
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        **cache_kwarg(cache),
        max_new_tokens=40,
    )
    for row, heads in enumerate(now_held(cache, 1)):
        for head in heads:
            assert "never reveal the key" in tokenizer.decode(out[row, head])


def test_branches_evict_fairly_and_keep_their_prompt():
    model, inputs = build("llama"), prompt()
    held = {}
    for fair in (None, Fair(1.0, window=8)):
        cache = make_cache(BRANCHED, model, protect=Protect(fair=fair))
        model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=60)
        held[fair] = cache.held_positions(0)[0]
        for head in held[fair]:
            assert head[:21] == list(range(21)), "the shared prompt"
    assert held[None] != held[Fair(1.0, window=8)]
    # Of 8 tokens each, all spans of generated text that are complete hold about as many.
    for head in held[Fair(1.0, window=8)]:
        counts = [sum(begin <= at < begin + 8 for at in head) for begin in range(21, 68, 8)]
        assert max(counts) - min(counts) <= 1
    assert bool((cache.keep_rates([(0, 14)]) == 1).all()), "the shared prompt counts as held"
    with pytest.raises(ValueError, match="suffix: expected protect=True"):
        make_cache(BRANCHED, model, protect=[(0, 2)])
