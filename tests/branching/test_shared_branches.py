"""Branches of shared prompts: tokens against DynamicCache, compressed ones against the oracle,
memory against its ideal, and what is refused.
"""

import functools

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from hf_reasoncache import (
    ReasonAllocCache,
    SharedBranchCache,
    SlidingWindowCompressCache,
    branch_generate,
    prefill_once,
)
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV, SnapKV
from tests.support.caches import make_cache, make_policy
from tests.support.models import HEAD_SIZE, HEADS, LAYERS, VOCABULARY, build, prompt
from tests.support.oracle import Recorder
from tests.support.pairs import in_turn

TOKEN_BYTES = LAYERS * HEADS * HEAD_SIZE * 2 * 4
"""Keys and values of one token in the Llama of the tests."""

ENDS = dict(eos_token_id=list(range(3, 12)), pad_token_id=0)
"""One token in ten ends a row, so that rows end at different steps."""


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def count_tokens(model, monkeypatch):
    """Let a list grow by the number of tokens of every forward."""
    fed, forward = [], model.forward

    @functools.wraps(forward)
    def counting(*args, **kwargs):
        fed.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return fed


def repeated(inputs, times):
    return {name: x.repeat_interleave(times, 0) for name, x in inputs.items()}


def branch_lengths(out):
    """New tokens of each branch, the one that ends it included."""
    ended = torch.isin(out[:, 21:], torch.tensor(ENDS["eos_token_id"]))
    return ended.int().argmax(-1).where(ended.any(-1), ended.shape[1] - 1) + 1


def segments(cache):
    return [layer.store.tree.readers for layer in cache.layers if isinstance(layer, CacheLayer)]


# ------------------------------------------------------------------------------- exact: one prefill

MODES = {
    "samples": dict(do_sample=True),
    "samples_that_end": dict(do_sample=True, **ENDS),
    "chunked_prefill": dict(do_sample=True, prefill_chunk_size=5, **ENDS),
    "penalties": dict(do_sample=True, repetition_penalty=1.3, min_new_tokens=5, top_p=0.9, **ENDS),
    "beams": dict(num_beams=4, do_sample=False),
    "beams_that_end": dict(num_beams=4, do_sample=False, **ENDS),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_branches_equal_plain_generate_with_dynamic_cache(name, mode, monkeypatch):
    model, inputs, arguments = build(name), prompt(), dict(MODES[mode])

    def run(generate, **more):
        torch.manual_seed(3)
        return generate(**arguments, **more, max_new_tokens=40)

    plain = functools.partial(model.generate, **inputs, num_return_sequences=4)
    expected = run(plain, **cache_kwarg(DynamicCache(config=model.config)))
    fed = count_tokens(model, monkeypatch)
    cache = SharedBranchCache(model.config)
    branches = functools.partial(branch_generate, model, inputs, num_branches=4)
    assert torch.equal(run(branches, **cache_kwarg(cache)), expected)
    assert all(len(found) <= 2 for found in segments(cache))
    prompts = inputs["input_ids"].numel()
    chunks = -(-21 // arguments.get("prefill_chunk_size", 21))
    assert sum(fed[:chunks]) == (prompts - 2 if "beams" in mode else prompts)


def test_finished_branches_leave_the_batch_and_their_memory_goes(llama, monkeypatch):
    fed = count_tokens(llama, monkeypatch)
    held = []

    def look(ids, scores):
        held.append(cache.report().kv_bytes)
        return torch.zeros(len(ids), dtype=torch.bool)

    class Look:
        __call__ = staticmethod(look)

    cache = SharedBranchCache(llama.config)
    torch.manual_seed(0)
    out = branch_generate(
        llama,
        prompt(batch=1),
        num_branches=16,
        past_key_values=cache,
        do_sample=True,
        max_new_tokens=60,
        stopping_criteria=[Look()],
        **ENDS,
    )
    lengths = branch_lengths(out)
    assert len(lengths.unique()) > 5, "rows end at different steps"
    # A branch's last token is never fed.
    assert sum(fed) == 21 + int((lengths - 1).sum())
    assert max(held) > 2 * held[-1]
    rows = int((lengths == lengths.max()).sum())
    assert cache.report().branches.rows == rows
    kept = branch_generate(
        llama, prompt(batch=1), num_branches=3, do_sample=True, drop_finished=False,
        max_new_tokens=30, past_key_values=(whole := SharedBranchCache(llama.config)), **ENDS,
    )  # fmt: skip
    assert whole.report().branches.rows == 3 == len(kept)


def test_dropping_changes_no_token_and_records_scores(llama):
    def run(**more):
        torch.manual_seed(5)
        return llama.generate(
            **prompt(),
            do_sample=True,
            num_return_sequences=5,
            max_new_tokens=30,
            custom_generate=prefill_once,
            **cache_kwarg(SharedBranchCache(llama.config)),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **ENDS,
            **more,
        )

    dropped, kept = run(), run(drop_finished=False)
    assert torch.equal(dropped.sequences, kept.sequences)
    assert len(dropped.scores) == len(dropped.logits) == dropped.sequences.shape[1] - 21
    for step, (found, expected) in enumerate(zip(dropped.scores, kept.scores, strict=True)):
        running = ~torch.isin(
            dropped.sequences[:, 21 : 21 + step], torch.tensor(ENDS["eos_token_id"])
        ).any(-1)
        torch.testing.assert_close(found[running], expected[running], atol=1e-4, rtol=1e-4)


def test_prefill_once_works_with_any_cache(llama, monkeypatch):
    fed = count_tokens(llama, monkeypatch)
    torch.manual_seed(0)
    found = llama.generate(
        **prompt(),
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=10,
        custom_generate=prefill_once,
        **cache_kwarg(DynamicCache(config=llama.config)),
    )
    assert fed[0] == 2 * 21
    torch.manual_seed(0)
    expected = llama.generate(**prompt(), do_sample=True, num_return_sequences=3, max_new_tokens=10)
    assert torch.equal(found, expected)


def test_second_turn_of_all_branches(llama):
    inputs = repeated(prompt(), 3)
    question = torch.randint(3, VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(4))

    def run(cache):
        torch.manual_seed(1)
        first = llama.generate(**inputs, **cache_kwarg(cache), do_sample=True, max_new_tokens=20)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 29), value=1)
        ids = torch.cat([first, question], dim=1)
        return llama.generate(
            input_ids=ids, attention_mask=mask, **cache_kwarg(cache), max_new_tokens=20
        )

    cache = SharedBranchCache(llama.config)
    assert torch.equal(run(cache), run(DynamicCache(config=llama.config)))
    assert {len(found) for found in segments(cache)} == {2}


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("prompts", "branches"), [(1, 16), (3, 4), (2, 1)])
def test_bytes_are_prefixes_and_suffixes(llama, prompts, branches):
    inputs = prompt(batch=prompts, tokens=300, padding=(0, 30, 7)[:prompts])
    cache = SharedBranchCache(llama.config)
    cache.reserve(41)
    llama.generate(
        **repeated(inputs, branches), **cache_kwarg(cache), do_sample=True, max_new_tokens=42
    )
    ideal = TOKEN_BYTES * (int(inputs["attention_mask"].sum()) + prompts * branches * 41)
    storages = {}
    for layer in cache.layers:
        for tensor in layer.kv_tensors():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    report = cache.report()
    assert sum(storages.values()) == report.kv_bytes == ideal
    real = int(inputs["attention_mask"].sum()) * branches
    assert report.branches.unshared_bytes == TOKEN_BYTES * (real + prompts * branches * 41)


def test_suffixes_grow_with_little_room(llama):
    cache, steps = SharedBranchCache(llama.config), 400
    llama.generate(**repeated(prompt(batch=1), 2), **cache_kwarg(cache), max_new_tokens=steps)
    room = cache.report().kv_bytes / TOKEN_BYTES - 21 - 2 * (steps - 1)
    assert 0 <= room <= 2 * steps / 16


def test_report_says_what_is_shared(llama):
    cache = SharedBranchCache(llama.config)
    assert cache.report().branches.rows == 0
    llama.generate(**repeated(prompt(batch=1), 4), **cache_kwarg(cache), max_new_tokens=9)
    text = str(cache.report())
    assert (
        "branches: 4 in the batch, 0 parked; unshared" in text
        and max(map(len, text.splitlines())) <= 80
    )
    assert [layer.held for layer in cache.report().layers] == [[[29, 29]] * 4] * 3
    cache.reset()
    assert cache.report() == SharedBranchCache(llama.config).report()


def test_different_prompts_are_not_shared_and_equal_ones_are(llama):
    """One token makes a prompt another one; rows need not be neighbours; padding counts."""
    ids = prompt(batch=1, padding=(0,))["input_ids"].repeat(5, 1)
    ids[1, 20] += 1
    ids[3, 0] += 1
    mask = torch.ones_like(ids)
    mask[4, 0] = 0
    cache = SharedBranchCache(llama.config)
    with torch.no_grad():
        llama(ids, attention_mask=mask, **cache_kwarg(cache))
    for layer in cache.layers:
        paths = layer.store.tree.paths
        assert paths[0] == paths[2] and len(set(paths)) == 4
        assert sum(layer.store.tree.readers.values()) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [(0, 0, 0), (3, 3, 9), (20, 20, 0)], ids=str)
def test_prompts_of_tokens_that_look_alike_are_not_shared(dtype, padding):
    """Rows 0 and 1 read the same prompt, row 2 one in which a token has a twin 3% away."""
    model = build("llama").to(dtype)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[3] = weight[4] * (1 + 0.03 * torch.randn(weight.shape[1]))
    inputs = prompt(batch=3, padding=padding)
    ids = inputs["input_ids"][:1].expand(3, -1).clone()
    ids[:, -1] = torch.tensor([4, 4, 3])
    inputs["input_ids"] = ids.masked_fill(inputs["attention_mask"] == 0, 0)
    cache = SharedBranchCache(model.config)
    model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=2, do_sample=False)
    assert [list(readers.values()) for readers in segments(cache)] == [[2, 1]] * LAYERS


def test_prompts_with_a_common_beginning_share_it_if_it_comes_in_chunks(llama):
    ids = prompt(batch=1, padding=(0,))["input_ids"].repeat(4, 1)
    ids[2:, 15:] += 1
    cache = SharedBranchCache(llama.config)
    with torch.no_grad():
        for part in ids.split(8, 1):
            llama(part, **cache_kwarg(cache))
    for layer in cache.layers:
        lengths = [[part.tokens for part in path] for path in layer.store.tree.paths]
        assert lengths == [[8, 13]] * 4 and list(layer.store.tree.readers.values()) == [4, 2, 2]
    assert cache.report().kv_bytes == TOKEN_BYTES * (8 + 2 * 13)


# ------------------------------------------------------------------------------ compressed suffixes

POLICIES = [
    make_policy("reason_alloc", scorer=RKV()),
    make_policy("reason_alloc", scorer=SnapKV(), head_budgets=False),
    make_policy("reason_alloc", ratio=0.6, min_budget=10),
    make_policy("sliding_window", head_budgets=True),
    make_policy("sliding_window", max_budget=42, scorer=RKV()),
]


@pytest.mark.parametrize(
    ("policy", "name", "chunks"),
    in_turn(POLICIES, ["llama", "gpt_oss", "deepseek_v3"], [21, 8]),
    ids=str,
)
def test_compressed_branches_equal_oracle(name, policy, chunks):
    model, inputs = build(name), repeated(prompt(), 3)
    cache = SharedBranchCache(model.config, suffix=policy)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    draw = torch.Generator().manual_seed(3)
    for part in inputs["input_ids"].split(chunks, 1):
        logits = recorder.forward(part)
    for new in [1] * 45 + [11] + [1] * 12:
        sampled = torch.multinomial(logits.softmax(-1), new, generator=draw)
        logits = recorder.forward(sampled)
    recorder.check(1e-4)
    report = cache.report()
    assert report.evictions >= 6 * 5 and all(len(found) == 2 for found in segments(cache))
    prompts = [set(range(0, 21)), set(range(7, 21))]
    for layer in report.layers:
        for row, heads in enumerate(cache.held_positions(layer.index)):
            assert all(prompts[row // 3] <= set(head) for head in heads)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("reason_alloc", {"profile": [1, 9, 4]}),
        ("reason_alloc", {"profile": [1, 9, 4], "ratio": 0.7, "head_budgets": False}),
        ("sliding_window", {"max_budget": 36}),
    ],
    ids=["budget", "ratio", "max_budget"],
)
def test_budget_of_a_branch_counts_its_prompt(llama, kind, changes):
    """A branch holds as much as a row of the cache whose policy it has."""
    inputs = repeated(prompt(), 2)
    shared = SharedBranchCache(llama.config, suffix=make_policy(kind, **changes))
    alone = make_cache(kind, llama, **changes)
    for cache in (shared, alone):
        llama.generate(**inputs, **cache_kwarg(cache), max_new_tokens=70)
    for mine, other in zip(shared.report().layers, alone.report().layers, strict=True):
        assert torch.tensor(mine.held).sum(1).tolist() == torch.tensor(other.held).sum(1).tolist()
    assert shared.report().evictions == alone.report().evictions > 0
    assert shared.report().kv_bytes < alone.report().kv_bytes


def test_compressed_branches_are_dropped_and_scored_alone(llama):
    """A branch does not depend on those beside it, finished or not."""
    policy = make_policy("reason_alloc", budget=32)
    torch.manual_seed(0)
    out = branch_generate(
        llama, prompt(batch=1), num_branches=6, suffix=policy, do_sample=True,
        max_new_tokens=60, output_logits=True, return_dict_in_generate=True, **ENDS,
    )  # fmt: skip
    lengths = branch_lengths(out.sequences)
    row, length = int(lengths.argmax()), int(lengths.max())
    assert length > 30 and len(lengths.unique()) > 2
    cache = SharedBranchCache(llama.config, suffix=policy)
    with torch.no_grad():
        logits = llama(out.sequences[row : row + 1, :21], **cache_kwarg(cache)).logits[:, -1]
        for step, expected in enumerate(out.logits[:length]):
            torch.testing.assert_close(logits[0], expected[row], atol=1e-4, rtol=1e-4)
            logits = llama(
                out.sequences[row : row + 1, 21 + step, None], **cache_kwarg(cache)
            ).logits[:, -1]
    assert cache.report().evictions > 0


# ------------------------------------------------------------------------------------------- faults


def refused(*words):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(words))


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        (ReasonAllocCache, ["suffix: expected", "policy", "got"]),
        (make_policy("reason_alloc", protect=False), ["protect=True, got"]),
        (make_policy("sliding_window", scorer=H2O()), ["cumulative attention", "RKV"]),
        (make_policy("reason_alloc", budget=-1), ["budget", "-1"]),
        (SharedBranchCache.policy(), ["expected the policy of", "SharedBranchCache"]),
    ],
    ids=str,
)
def test_suffix_that_cannot_be(llama, suffix, words):
    with refused(*words):
        SharedBranchCache(llama.config, suffix=suffix)


def test_policy_names_an_argument_that_there_is_not():
    with pytest.raises(TypeError, match="windows"):
        ReasonAllocCache.policy(budget=64, windows=3)
    with refused("expected either budget or ratio, got none"):
        ReasonAllocCache.policy()(build("llama").config)
    assert SlidingWindowCompressCache.policy().settings == {}


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "1GB"], ids=repr)
def test_max_bytes_that_is_none(llama, value):
    with refused("max_bytes: expected an integer", "got"):
        SharedBranchCache(llama.config, max_bytes=value)


def test_assisted_decoding_of_compressed_branches(llama):
    cache = SharedBranchCache(llama.config, suffix=POLICIES[0])
    with refused("assisted decoding", "suffix"):
        llama.generate(
            **prompt(batch=1), **cache_kwarg(cache), prompt_lookup_num_tokens=3, max_new_tokens=5
        )


def test_budget_below_the_prompt(llama):
    with refused("budget too small", "expected budget >= 25", "got budget=20"):
        branch_generate(
            llama, prompt(), num_branches=2, suffix=make_policy("reason_alloc", budget=20),
            do_sample=True, max_new_tokens=3,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 2}, ["prefill_once", "beam", "branch_generate"]),
        ({"prompt_lookup_num_tokens": 3}, ["prefill_once", "greedy decoding or sampling"]),
        (
            {"return_dict_in_generate": True, "output_hidden_states": True},
            ["output_hidden_states", "got one"],
        ),
    ],
    ids=str,
)
def test_what_prefill_once_cannot_do(llama, changes, words):
    inputs = prompt(batch=1)
    arguments = cache_kwarg(SharedBranchCache(llama.config)) | {"max_new_tokens": 3} | changes
    with refused(*words):
        llama.generate(**inputs, **arguments, custom_generate=prefill_once)


def test_used_cache(llama):
    cache = SharedBranchCache(llama.config)
    branch_generate(llama, prompt(), num_branches=2, past_key_values=cache, do_sample=True,
                    max_new_tokens=3)  # fmt: skip
    with refused("empty SharedBranchCache", "23 tokens", "reset"):
        branch_generate(llama, prompt(), num_branches=2, past_key_values=cache)
    with refused("a used cache"):
        llama.generate(**prompt(), **cache_kwarg(cache), custom_generate=prefill_once)
    with refused("suffix", "got both"):
        branch_generate(
            llama, prompt(), num_branches=2, past_key_values=SharedBranchCache(llama.config),
            suffix=POLICIES[0],
        )  # fmt: skip


def test_finished_rows_without_a_token_to_fill_them_with(llama):
    class FirstRow:
        def __call__(self, ids, scores):
            return torch.arange(len(ids)) == 0

    with refused("pad_token_id: expected a token", "drop_finished=False"):
        llama.generate(
            **prompt(), **cache_kwarg(SharedBranchCache(llama.config)), pad_token_id=None,
            custom_generate=prefill_once, stopping_criteria=[FirstRow()], max_new_tokens=4,
        )  # fmt: skip


def test_inputs_that_are_no_prompts(llama):
    with refused("inputs: expected input_ids", "inputs_embeds"):
        branch_generate(llama, {"inputs_embeds": torch.zeros(1, 3, 48)}, num_branches=2)
    for count in (0, -1, 2.0, None):
        with refused("num_branches: expected an integer >= 1"):
            branch_generate(llama, prompt(), num_branches=count)
    with refused("prefill_once", "token_type_ids as well"):
        prefill_once(
            llama,
            prompt()["input_ids"],
            LogitsProcessorList(),
            StoppingCriteriaList(),
            llama.generation_config,
            token_type_ids=torch.zeros(1),
            **cache_kwarg(SharedBranchCache(llama.config)),
        )
    with refused("assistant_model: expected None"):
        branch_generate(llama, prompt(), num_branches=2, assistant_model=llama)
