"""What an attention mask hides of the columns that are cached is not attended to."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.functional import pad
from transformers import DynamicCache

from hf_reasoncache import Protect, ReasonAllocCache, SharedBranchCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, Risk
from hf_reasoncache.scorers import H2O, RKV, Random
from tests.support.caches import KINDS, exact_cache, make_cache
from tests.support.models import VOCABULARY, build, prompt
from tests.support.oracle import Recorder
from tests.support.pairs import in_turn
from tests.support.quantised import stock_cache

LEFT, RIGHT = "left", "right"
RELEASE = Version(transformers.__version__)


def padded_prompt(side, batch=2, tokens=21):
    inputs = prompt(batch=batch, tokens=tokens)
    if side == RIGHT:
        inputs = {name: value.flip(-1) for name, value in inputs.items()}
    return inputs


def some_tokens(*shape, seed=3):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def later_turn(ids, mask, alive, seed):
    """The text so far, of which row `i` ended after `alive[i]` generated tokens, and a new turn."""
    rows = len(ids)
    live = torch.arange(ids.shape[1] - mask.shape[1]) < torch.tensor(alive)[:, None]
    new, real = some_tokens(rows, 6, seed=seed), torch.ones(rows, 6, dtype=torch.long)
    new[0, :2], real[0, :2] = 0, 0
    return torch.cat([ids, new], 1), torch.cat([mask, live.long(), real], 1)


def spread(rows, length):
    """Different numbers of tokens after which rows end, the last row's all."""
    return [length - 3 * row for row in reversed(range(rows))]


# -------------------------------------------------------------------- nothing evicted: DynamicCache

TURNS = {
    # Arguments of the first and of the later turns.
    "greedy": ({}, {}),
    "samples": (dict(num_return_sequences=3, do_sample=True), dict(do_sample=True)),
    "beams": (dict(num_beams=4, num_return_sequences=4), {}),
    "chunked_prefill": (dict(prefill_chunk_size=5), dict(prefill_chunk_size=4)),
    "prompt_lookup": (dict(prompt_lookup_num_tokens=4), {}),
    "assisted": (dict(assistant_model=None), {}),
}


def conversation(model, cache, side, mode, assistant=None):
    """Tokens of three turns whose rows end at different steps."""
    first, later = map(dict, TURNS[mode])
    alone = mode in ("prompt_lookup", "assisted")
    inputs = padded_prompt(side)
    if alone:
        inputs = {name: value[1:] for name, value in inputs.items()}
    if assistant is not None:
        first["assistant_model"] = assistant
    torch.manual_seed(5)
    common = {"do_sample": False, **cache_kwarg(cache), "use_cache": True}
    ids = model.generate(**inputs, **common | first, max_new_tokens=14)
    mask = inputs["attention_mask"].repeat_interleave(len(ids) // len(inputs["input_ids"]), 0)
    for seed in (11, 12):
        alive = [8] if alone else spread(len(ids), ids.shape[1] - mask.shape[1])
        ids, mask = later_turn(ids, mask, [max(each, 1) for each in alive], seed)
        ids = model.generate(
            input_ids=ids, attention_mask=mask, **common | later, max_new_tokens=18
        )
    return ids


@pytest.mark.parametrize(
    ("name", "mode", "side"),
    in_turn(["llama", "qwen2_sliding", "gpt_oss"], [*TURNS], [LEFT, RIGHT]),
)
@pytest.mark.filterwarnings("error:expected the new tokens to continue")
def test_three_turns_equal_dynamic_cache(name, mode, side):
    if Version("5.23") > RELEASE:
        if mode == "chunked_prefill":
            pytest.skip(f"transformers {RELEASE} cuts the mask of a later turn in chunks short")
        if mode in ("prompt_lookup", "assisted") and name != "llama":
            pytest.skip(f"transformers {RELEASE} cannot go on after drafts with sliding layers")
    base = "eager" if name == "gpt_oss" else "sdpa"
    model, assistant = build(name, base), None
    if mode == "assisted":
        assistant = build(name, base)
        with torch.no_grad():
            assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.02)
    expected = conversation(model, DynamicCache(config=model.config), side, mode, assistant)
    model.set_attn_implementation("reasoncache")
    for kind in KINDS:
        cache = exact_cache(kind, model)
        assert torch.equal(conversation(model, cache, side, mode, assistant), expected), kind
        assert cache.report().evicted == 0
        assert all(layer.store.hides for layer in cache.layers if isinstance(layer, CacheLayer))


def steps_of(model, cache, forwards):
    """Logits of the new tokens of some forwards, each with its ids, mask and positions."""
    found = []
    for ids, mask, positions in forwards:
        with torch.no_grad():
            out = model(
                ids, attention_mask=mask, position_ids=positions, **cache_kwarg(cache)
            ).logits
        found.append(out)
    return torch.cat(found, 1)


def masked_forwards(hidden, batch=3, tokens=20, by_hand=False):
    """A prompt and forwards of one or three tokens, before each of which a mask hides columns.

    Positions count the tokens shown, or, by hand, the columns.
    """
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (1, tokens), generator=generator).expand(batch, -1)
    forwards, mask = [(ids, torch.ones_like(ids), None)], torch.ones_like(ids)
    for number, columns in enumerate(hidden):
        new = some_tokens(batch, 3 if number % 2 else 1, seed=number)
        mask = torch.ones(batch, mask.shape[1] + new.shape[1], dtype=torch.long)
        for row, each in enumerate(columns):
            mask[row, list(each)] = 0
        positions = torch.arange(mask.shape[1]).expand_as(mask) if by_hand else mask.cumsum(-1) - 1
        forwards.append((new, mask, positions[:, -new.shape[1] :]))
    return forwards


HIDDEN = [
    [(), (), ()],
    [range(3, 7), (), range(12, 20)],  # of the prompt, other parts in each row
    [range(3, 7), (), range(12, 20)],
    [range(3, 7), (), range(15, 23)],  # some again, some of what followed
    [(), (1, 5, 6, 22), (2,)],  # all that was hidden is shown again
    [(), (), ()],
    [range(20), (), (25,)],  # nothing of the prompt
    [range(20), range(20), range(20)],
    [(), (), ()],
]


@pytest.mark.parametrize(
    ("name", "by_hand", "storage"),
    [(name, by_hand, None) for name in ("llama", "gemma3") for by_hand in (False, True)]
    + [("llama", False, "fp8"), ("deepseek_v3", False, "fp8")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_hide_and_show_again_equal_dynamic_cache(kind, name, by_hand, storage):
    model, forwards = build(name, "sdpa"), masked_forwards(HIDDEN, by_hand=by_hand)
    expected = steps_of(model, stock_cache(model, storage), forwards)
    model.set_attn_implementation("reasoncache")
    cache = exact_cache(kind, model, storage=storage)
    got = steps_of(model, cache, forwards)
    assert (got - expected).abs().max() < 1e-4
    assert not any(layer.store.hides for layer in cache.layers if isinstance(layer, CacheLayer))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_move_take_what_is_hidden_along(kind):
    model, forwards = build("llama", "sdpa"), masked_forwards(HIDDEN[:4])
    rows = torch.tensor([2, 0, 0])
    moved = [(ids[rows], mask[rows], at[rows]) for ids, mask, at in masked_forwards(HIDDEN)[5:]]

    def run(cache):
        before = steps_of(model, cache, forwards)
        cache.reorder_cache(rows)
        return torch.cat([before, steps_of(model, cache, moved)], 1)

    expected = run(DynamicCache(config=model.config))
    model.set_attn_implementation("reasoncache")
    assert (run(exact_cache(kind, model)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_cropped_columns_do_not_come_back(kind):
    """Tokens taken back while they are hidden are gone; others take their columns."""
    model, forwards = build("llama", "sdpa"), masked_forwards(HIDDEN[:4])
    seen = forwards[-1][1].shape[1]
    again = [
        (ids, mask, torch.arange(seen - 6, seen - 3).expand(3, -1))
        for ids, mask in [(some_tokens(3, 3, seed=9), torch.ones(3, seen - 3, dtype=torch.long))]
    ]

    def run(cache):
        steps_of(model, cache, forwards)
        cache.crop(-6)
        return steps_of(model, cache, again)

    expected = run(DynamicCache(config=model.config))
    model.set_attn_implementation("reasoncache")
    assert (run(exact_cache(kind, model)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("storage", [None, "fp8"])
def test_a_parked_branch_and_its_forks_keep_their_masks(storage):
    model = build("llama")
    cache = SharedBranchCache(model.config, storage=storage)
    exact = ReasonAllocCache(model.config, budget=None, storage=storage)
    forwards = masked_forwards(HIDDEN[:4])
    for each in (cache, exact):
        steps_of(model, each, forwards)
    assert cache.fork(2) == [3]
    exact.batch_select_indices(torch.tensor([0, 1, 2, 2]))
    rows, seen = torch.tensor([0, 1, 2, 2]), forwards[-1][1].shape[1]
    mask = pad(forwards[-1][1][rows], (0, 1), value=1)
    step = [(some_tokens(4, 1), mask, mask.cumsum(-1)[:, -1:] - 1)]
    assert (steps_of(model, cache, step) - steps_of(model, exact, step)).abs().max() < 1e-4
    parked = cache.park(1, score=1.0)
    assert cache.resume(parked) == 3
    rows = torch.tensor([0, 2, 3, 1])
    exact.batch_select_indices(rows)
    mask = pad(mask[rows], (0, 1), value=1)
    mask[0, :18] = 1
    assert seen + 2 == mask.shape[1]
    step = [(some_tokens(4, 1), mask, mask.cumsum(-1)[:, -1:] - 1)]
    assert (steps_of(model, cache, step) - steps_of(model, exact, step)).abs().max() < 1e-4


# --------------------------------------------------------------------------------- with an eviction

EVICTING = [
    ("reason_alloc", dict(scorer=RKV(), protect=False)),
    ("reason_alloc", dict(scorer=H2O(), protect=False)),
    ("reason_alloc", dict(scorer=Random())),
    ("sliding_window", dict(prompt_ratio=0.5, protect=False, max_budget=30)),
    ("sliding_window", dict(head_budgets=True)),
    ("branched", {}),
]


@pytest.mark.parametrize(
    ("kind", "changes", "turn"),
    [(*case, (1, 13)[number % 2]) for number, case in enumerate(EVICTING)],
    ids=str,
)
def test_what_is_hidden_is_not_held_and_logits_equal_the_oracle(kind, changes, turn):
    model, inputs = build("llama"), prompt(batch=3, padding=(0, 7, 3))
    recorder = Recorder(model, make_cache(kind, model, **changes), inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    hide = [range(26, 40), range(8, 12), range(30, 33)]
    for _ in range(30):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    seen = recorder.ids.shape[1]
    recorder.hidden = torch.zeros(3, seen, dtype=torch.bool)
    for row, columns in enumerate(hide):
        recorder.hidden[row, list(columns)] = True
    before = held_in_all(recorder.cache)
    recorder.forward(some_tokens(3, turn))
    for row, columns in enumerate(hide):
        assert before[row] & set(columns), "there is something to hide"
    for step in range(40):
        for row, columns in enumerate(hide):
            assert not held_in_all(recorder.cache)[row] & set(columns)
        logits = recorder.forward(some_tokens(3, 1, seed=step))
    assert recorder.cache.report().evictions > 9
    recorder.check()


def held_in_all(cache):
    """Columns that any layer and head holds, row by row."""
    rows = [set() for _ in cache.held_positions(0)]
    for layer in range(len(cache.layers)):
        for row, heads in enumerate(cache.held_positions(layer)):
            rows[row].update(*heads)
    return rows


@pytest.mark.parametrize(("kind", "changes"), EVICTING, ids=str)
def test_hidden_tokens_come_back_until_their_row_evicts(kind, changes):
    model, inputs = build("llama"), prompt(batch=2, tokens=12, padding=(0, 3))
    cache = make_cache(kind, model, **changes)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    recorder.hidden = torch.zeros(2, 12, dtype=torch.bool)
    for shown in (True, False):
        recorder.hidden[0, 4:8] = not shown
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
        assert (set(range(4, 8)) <= held_in_all(cache)[0]) == shown
    recorder.hidden[0, 4:8] = False
    recorder.forward(logits.argmax(-1, keepdim=True))
    assert set(range(4, 8)) <= held_in_all(cache)[0], "nothing was evicted in between"
    protected = kind == "branched"
    recorder.hidden[0, 4:8] = True
    evictions = cache.report().evictions
    while cache.report().evictions < evictions + 6:
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    recorder.hidden[0, 4:8] = False
    recorder.forward(logits.argmax(-1, keepdim=True))
    assert (set(range(4, 8)) <= held_in_all(cache)[0]) == protected, "the first to go"
    recorder.check()


@pytest.mark.parametrize("scorer", [RKV(), H2O()], ids=repr)
def test_rejected_drafts_leave_no_trace_over_what_is_hidden(scorer):
    """Drafts of four tokens, of which one is accepted, over a mask that hides since the first."""
    model, settings = build("llama"), dict(budget=24, buffer=6, window=4)
    ids, drafts = some_tokens(1, 21), [some_tokens(1, 4, seed=20 + step) for step in range(30)]

    def run(rejected):
        protect = Protect(prompt=False, prompt_length=21)
        cache = ReasonAllocCache(model.config, scorer=scorer, protect=protect, **settings)
        recorder = Recorder(model, cache, torch.ones(1, 21, dtype=torch.long))
        cache.activate_past_recording()
        found = [recorder.forward(ids)]
        cache.crop(0)
        for step, draft in enumerate(drafts):
            recorder.hidden = torch.zeros(1, 21, dtype=torch.bool)
            recorder.hidden[0, 12:18] = 5 <= step < 20
            recorder.forward(draft[:, : 1 + rejected])
            found.append(recorder.logits[-1][:, 0])
            cache.crop(-rejected)
            recorder.ids = recorder.ids[:, : 22 + step]
        return torch.cat(found), cache

    (expected, plain), (got, cache) = run(0), run(3)
    assert cache.report().evictions == plain.report().evictions >= 9
    assert (got - expected).abs().max() < 1e-4
    assert cache.report().evicted == plain.report().evicted
    for layer in range(3):
        assert cache.layers[layer].held_now() == plain.layers[layer].held_now()


def test_probes_measure_against_what_the_mask_shows():
    model, inputs = build("llama"), prompt(batch=2, padding=(0, 4))
    settings = dict(budget=60, buffer=8, window=4, protect=False)
    risk = Risk(measure=False, probes=Probes(heads=1.0, interval=1))
    cache = ReasonAllocCache(model.config, risk=risk, **settings)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    recorder.hidden = torch.zeros(2, 21, dtype=torch.bool)
    recorder.hidden[:, 5:15] = True
    for _ in range(20):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    assert cache.report().evictions == 0
    for layer in cache.report().layers:
        assert layer.probes is not None
        assert float(layer.probes.worst.max()) < 1e-4, "nothing shown is missing"


# --------------------------------------------------------------------------------- costs and errors


def test_a_step_whose_mask_hides_nothing_new_moves_nothing(monkeypatch):
    model, inputs, calls = build("llama"), prompt(), []
    monkeypatch.setattr(CacheLayer, "hide", lambda self, hidden: calls.append(hidden))
    for kind in KINDS:
        cache = exact_cache(kind, model)
        ids = model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=9, do_sample=False)
        mask = pad(inputs["attention_mask"], (0, ids.shape[1] - 21), value=1)
        model.generate(input_ids=ids, attention_mask=mask, **cache_kwarg(cache), max_new_tokens=9)
    assert not calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_is_too_short_is_refused(kind):
    model, inputs = build("llama"), prompt()
    cache = exact_cache(kind, model)
    steps_of(model, cache, [(*inputs.values(), None)])
    new = some_tokens(2, 4)
    expected = "attention_mask: expected 25 columns, 21 seen and 4 new, got 4; .* reset"
    with pytest.raises(ValueError, match=expected):
        steps_of(model, cache, [(new, torch.ones_like(new), None)])
    steps_of(model, cache, [(new, pad(inputs["attention_mask"], (0, 4), value=1), None)])


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding_over_a_used_cache_is_noticed(kind):
    """transformers feeds the whole text again there, as if the cache were new."""
    model = build("llama")
    inputs, common = prompt(), dict(do_sample=False, max_new_tokens=5)
    for row in (0, 1):  # without padding, and with a mask of the text as it is
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        cache = exact_cache(kind, model)
        ids = model.generate(**alone, **cache_kwarg(cache), **common)
        mask = pad(alone["attention_mask"], (0, 5), value=1)
        arguments = dict(input_ids=ids, attention_mask=mask, **cache_kwarg(cache), **common)
        if row == 0 and Version("5.18") <= RELEASE:
            # generate drops a mask that hides nothing.
            noticed = pytest.warns(UserWarning, match="continue the 25 .* seen, got .* reset")
        else:
            noticed = pytest.raises(ValueError, match=r"expected .* columns, 25 seen and .* reset")
        with noticed:
            model.generate(**arguments, prompt_lookup_num_tokens=3)


def test_another_prompt_is_noticed_where_it_shows():
    """A shorter one has a shorter mask; a longer one reads like the next turn of a conversation."""
    model, cache = build("llama"), ReasonAllocCache(build("llama").config, budget=None)
    model.generate(**prompt(), **cache_kwarg(cache), max_new_tokens=5)
    with pytest.raises(ValueError, match=r"attention_mask: expected .* reset"):
        model.generate(**prompt(tokens=12, padding=(0, 2)), **cache_kwarg(cache), max_new_tokens=5)
    seen = cache.get_seq_length()
    new, mask = some_tokens(2, 4), torch.ones(2, seen + 4, dtype=torch.long)
    with pytest.warns(UserWarning, match="continue the .* begin at 0 again"):
        steps_of(model, cache, [(new, mask, torch.arange(4).expand(2, -1))])
