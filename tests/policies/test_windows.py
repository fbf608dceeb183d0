"""What only SlidingWindowCompressCache promises: where windows lie, what stays, what it costs."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache import SlidingWindowCompressCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.scorers import H2O, RKV, Random, Scorer
from tests.support.driver import Driver, now_held, tokens
from tests.support.models import LAYERS, VOCABULARY, build, prompt
from tests.support.reachable import tensors_reachable_from

WINDOW, KEPT, RECENT = 8, 3, 4


def new_cache(model, **changes):
    arguments = dict(window=WINDOW, ratio=KEPT / WINDOW, recent=RECENT) | changes
    return SlidingWindowCompressCache(model.config, **arguments)


def start(model, inputs, **changes):
    driver = Driver(model, new_cache(model, **changes), inputs["attention_mask"])
    return driver, driver(inputs["input_ids"])


def windows_of(begin, compressed, phase, *cuts):
    """Windows `(from, to)` of one row from position `begin`, complete at `compressed` tokens."""
    found = []
    while True:
        end = next(at for at in range(begin + 1, begin + WINDOW + 1) if at % WINDOW == phase)
        end = min([end, *(cut for cut in cuts if begin < cut)])
        if end + RECENT > compressed:
            return found
        found.append((begin, end))
        begin = end


def share(begin, end, kept=KEPT):
    return end * kept // WINDOW - begin * kept // WINDOW


def phase_of(layer):
    return layer * WINDOW // LAYERS


# ---------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize("scorer", [None, Random(), H2O()], ids=repr)
@pytest.mark.parametrize("protect", [True, False])
def test_after_every_step_each_window_holds_its_share_and_the_rest_is_whole(scorer, protect):
    paddings = (0, 7, 16)
    model, inputs = build("llama"), prompt(batch=3, padding=paddings)
    driver, logits = start(model, inputs, scorer=scorer, protect=protect)
    before = {}
    for _ in range(45):
        logits = driver(logits[:, -1:].argmax(-1))
        for layer in range(LAYERS):
            for row, heads in enumerate(driver.cache.held_positions(layer)):
                prompt_end, seen = 21 - paddings[row], driver.seen - paddings[row]
                begin = prompt_end if protect else 0
                done = windows_of(begin, seen - 1, phase_of(layer), prompt_end)
                for head, columns in enumerate(heads):
                    held = {column - paddings[row] for column in columns}
                    assert len(held) == len(columns) and min(held) >= 0
                    for window in done:
                        kept = held & set(range(*window))
                        assert len(kept) == share(*window)
                        # What survives a window stays for good.
                        key = (layer, row, head, window)
                        assert before.setdefault(key, kept) == kept
                    whole = set(range(begin)) | set(range(done[-1][1] if done else begin, seen))
                    assert whole <= held
                    assert len(held) == len(whole) + sum(share(*window) for window in done)
    assert len(before) > 2 * 3 * LAYERS


def test_ratio_holds_over_a_long_text_whatever_the_prompt():
    model = build("llama")
    driver, logits = start(model, prompt(batch=1, tokens=13))
    driver.greedy(logits, 200)
    for layer in range(LAYERS):
        held = driver.cache.held_positions(layer)[0][0]
        done = windows_of(13, 212, phase_of(layer))
        compressed = [at for at in held if 13 <= at < done[-1][1]]
        assert len(compressed) == pytest.approx(KEPT / WINDOW * (done[-1][1] - 13), abs=1)


@pytest.mark.parametrize("head_budgets", [False, True])
def test_profile_and_heads_share_a_window_exactly(head_budgets):
    model, inputs = build("llama"), prompt(batch=1, padding=(0,))
    driver, logits = start(model, inputs, profile=[1, 9, 4], head_budgets=head_budgets)
    driver.greedy(logits, 60)
    kept = [layer.policy.kept for layer in driver.cache.layers]
    assert sum(kept) == LAYERS * KEPT and kept[1] > kept[2] > kept[0]
    unequal = False
    for layer in range(LAYERS):
        heads = driver.cache.held_positions(layer)[0]
        for window in windows_of(21, 80, phase_of(layer)):
            counts = [len(set(head) & set(range(*window))) for head in heads]
            assert sum(counts) == len(heads) * share(*window, kept[layer])
            unequal |= len(set(counts)) > 1
    assert unequal == head_budgets


def test_no_layer_keeps_more_than_the_window_has():
    cache = new_cache(build("llama"), ratio=0.75, profile=[1, 1000, 1])
    kept = [layer.policy.kept for layer in cache.layers]
    assert sum(kept) == LAYERS * 6 and max(kept) == WINDOW


def test_a_layer_that_needs_all_its_text_keeps_all_of_it():
    """Whatever the rule says a layer may have of the mean: here that would be 6 of 8."""
    cache = new_cache(build("llama"), profile=[0.1, 1000, 0.1])
    kept = [layer.policy.kept for layer in cache.layers]
    assert sum(kept) == LAYERS * KEPT
    assert kept == [1, 7, 1], "the rule's lower bound holds"


def test_prompt_ratio_is_the_share_of_the_prompt_only():
    model, inputs = build("llama"), prompt(batch=1, tokens=40, padding=(0,))
    driver, logits = start(model, inputs, protect=False, prompt_ratio=0.75)
    driver.greedy(logits, 40)
    for layer in range(LAYERS):
        held = set(driver.cache.held_positions(layer)[0][0])
        for window in windows_of(0, 79, phase_of(layer), 40):
            kept = 6 if window[1] <= 40 else KEPT
            assert len(held & set(range(*window))) == share(*window, kept)


# ------------------------------------------------------------------------------- bound in memory


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"profile": [1, 9, 4], "head_budgets": True},
        {"protect": False},
        {"scorer": RKV()},
    ],
    ids=str,
)
def test_bound_holds_after_every_compaction(changes):
    model, inputs = build("llama"), prompt(batch=2, padding=(0, 7))
    bound = 38
    driver, logits = start(model, inputs, max_budget=bound, **changes)
    prompts, compactions = [set(range(0, 21)), set(range(7, 21))], 0
    for _ in range(120):
        before = driver.cache.report()
        logits = driver(logits[:, -1:].argmax(-1))
        report = driver.cache.report()
        limits = [layer.state.limit for layer in driver.cache.layers]
        assert torch.stack(limits).sum(0).tolist() == [bound * LAYERS] * 2
        for layer, limit in enumerate(limits):
            for row in range(2):
                held = report.layers[layer].held[row]
                now, was = sum(held), sum(before.layers[layer].held[row])
                assert now <= len(held) * (int(limit[row]) + WINDOW)
                if now < was:
                    # The token that came after the compaction is the newest one.
                    assert now <= len(held) * (int(limit[row]) + 1)
                    compactions += 1
                for head in now_held(driver.cache, layer)[row]:
                    newest = set(range(driver.seen - RECENT, driver.seen))
                    kept = (
                        prompts[row] if driver.cache.layers[layer].policy.protect_prompt else set()
                    )
                    assert newest | kept <= set(head)
    assert compactions > 40


def test_without_a_bound_the_past_is_never_looked_at_again():
    """Scores are asked for one window per row and compaction, however long the text."""
    sizes = []

    class Probe(Random):
        def score(self, held):
            sizes.append(held.keys.shape[2])
            return super().score(held)

    model = build("llama")
    driver, logits = start(model, prompt(batch=1), scorer=Probe())
    driver.greedy(logits, 150)
    assert max(sizes) == WINDOW and len(sizes) == driver.cache.report().evictions > 40


def test_bound_below_the_prompt_is_an_error_before_any_token():
    model = build("llama")
    said = (
        r"expected max_budget >= 28 \(21 protected prompt tokens, 4 recent ones and 3 of a window"
        r"\), got max_budget=27\. Raise it, shorten the prompt, or pass protect=False"
    )
    with pytest.raises(ValueError, match=said):
        tokens(model, new_cache(model, max_budget=27))
    tokens(model, new_cache(model, max_budget=28))
    tokens(model, new_cache(model, max_budget=12, protect=False))


# ------------------------------------------------------------------------------------- no storms


def compactions_per_step(driver, logits, steps):
    """How often each layer compacted a row at each step: `[steps][layers]`."""
    found = []
    for _ in range(steps):
        before = [layer.evictions for layer in driver.cache.report().layers]
        logits = driver(logits[:, -1:].argmax(-1))
        after = [layer.evictions for layer in driver.cache.report().layers]
        found.append([b - a for a, b in zip(before, after, strict=True)])
    return found


def test_rows_of_different_length_compact_at_different_steps():
    batch = WINDOW
    model, inputs = build("llama"), prompt(batch=batch, padding=tuple(range(batch)))
    driver, logits = start(model, inputs)
    driver.greedy(logits, WINDOW + RECENT)  # every row has had its first, shorter window
    found = compactions_per_step(driver, logits, 4 * WINDOW)
    assert max(max(step) for step in found) == math.ceil(batch / WINDOW) == 1
    for layer in range(LAYERS):
        assert sum(step[layer] for step in found) == 4 * batch


def test_layers_of_one_row_compact_at_different_steps():
    model = build("llama")
    driver, logits = start(model, prompt(batch=1))
    driver.greedy(logits, WINDOW + RECENT)
    found = compactions_per_step(driver, logits, 4 * WINDOW)
    assert max(sum(step) for step in found) == 1
    assert sum(map(sum, found)) == 4 * LAYERS


# ------------------------------------------------------------------------- what a scorer is shown


@dataclass(frozen=True)
class Witness(Scorer):
    """Notes what it is shown."""

    queries: int = WINDOW
    seen: list = None

    def score(self, held):
        self.seen.append(held)
        return held.positions.float()


@pytest.mark.parametrize("turn", [1, 30])
def test_a_window_is_scored_by_its_own_queries(turn, monkeypatch):
    model, paddings = build("llama"), (0, 5)
    inputs, scorer = prompt(padding=paddings), Witness(seen=[])
    recorded = {layer: [] for layer in range(LAYERS)}
    store, attend = CacheLayer.store_first, CacheLayer.attend

    def spy(function):
        def call(self, chunk):
            recorded[self.index].append((chunk.query, chunk.keys))
            return function(self, chunk)

        return call

    monkeypatch.setattr(CacheLayer, "store_first", spy(store))
    monkeypatch.setattr(CacheLayer, "attend", spy(attend))
    driver, logits = start(model, inputs, scorer=scorer)
    logits = driver.greedy(logits, 20)
    driver(logits[:, -1:].argmax(-1).expand(-1, turn))
    driver.greedy(logits, 9)
    assert len(scorer.seen) > 3 * LAYERS
    for held in scorer.seen:
        queries, keys = (torch.cat(parts, 2) for parts in zip(*recorded[held.layer], strict=True))
        for row in range(len(held.length)):
            positions = held.positions[row, 0][held.valid[row, 0]].tolist()
            end = int(held.length[row])
            assert positions == list(range(positions[0], end)), "the window, and nothing else"
            asked = held.query_positions[row].tolist()
            assert [at for at in asked if at >= 0] == positions
            # Which row of the batch it was, the keys tell.
            source = next(
                b
                for b in range(2)
                if torch.equal(
                    held.keys[row, :, : len(positions)],
                    keys[b, :, paddings[b] + positions[0] : paddings[b] + end],
                )
            )
            expected = queries[source].unflatten(0, (2, -1))
            expected = expected[:, :, paddings[source] + positions[0] : paddings[source] + end]
            assert torch.equal(held.queries[row][:, :, [at >= 0 for at in asked]], expected)


# --------------------------------------------------------------------------------- memory and crop


@pytest.mark.parametrize("head_budgets", [False, True])
def test_storages_follow_the_windows_and_move_rarely(head_budgets):
    """No head owns more than its next window will need, 1/16 or what stays of one more, and
    rounding."""
    paddings, model = (0, 3), build("llama")
    inputs = prompt(batch=2, padding=paddings)
    driver, logits = start(model, inputs, head_budgets=head_budgets)
    layouts = set()
    for _ in range(160):
        logits = driver(logits[:, -1:].argmax(-1))
        report = driver.cache.report()
        for index, layer in enumerate(report.layers):
            step, slots = WINDOW // 4, 0
            spare = max(KEPT, max(map(max, layer.held)) // 16)
            for row, lengths in enumerate(layer.held):
                seen = driver.seen - paddings[row]
                done = windows_of(21 - paddings[row], seen - 1, phase_of(index))
                begin = done[-1][1] if done else 21 - paddings[row]
                end = next(
                    at for at in range(begin + 1, seen + 99) if at % WINDOW == phase_of(index)
                )
                for length in lengths:
                    need = length + end + RECENT - seen + spare
                    slots += math.ceil(need / step) * step
            pool = driver.cache.layers[index].store.pool
            size = pool.fields["keys"].untyped_storage().nbytes() // (
                4 * pool.fields["keys"].shape[-1]
            )
            assert sum(map(sum, layer.held)) < size == sum(map(sum, layer.capacity)) <= slots
        layouts.add(tuple(map(tuple, report.layers[0].capacity)))
    assert len(layouts) <= 160 / WINDOW
    found = {}
    for layer in driver.cache.layers:
        tensors_reachable_from(vars(layer), found, set())
    assert sum(found.values()) == report.total_bytes


def test_long_turn_gives_its_memory_back():
    model = build("llama")
    driver, logits = start(model, prompt())
    driver.greedy(logits, 20)
    driver(torch.randint(3, VOCABULARY, (2, 90)))
    layer = driver.cache.report().layers[0]
    assert max(map(max, layer.held)) < 21 + 110 * KEPT / WINDOW + WINDOW + RECENT
    most = max(map(max, layer.held)) + WINDOW + KEPT + WINDOW // 4
    assert max(map(max, layer.capacity)) <= 1.25 * most
    log = driver.cache.layers[0].queries
    assert log.last().shape[2] == WINDOW + RECENT


@pytest.mark.parametrize("columns", [1, 3, 6, 11, 25])
def test_crop_without_a_draft_begins_a_window_where_it_ends(columns):
    model = build("llama")
    driver, logits = start(model, prompt())
    logits = driver.greedy(logits, 33)
    driver.cache.crop(-columns)
    driver.seen -= columns
    before = [now_held(driver.cache, layer) for layer in range(LAYERS)]
    driver.greedy(logits, 40)
    for layer in range(LAYERS):
        for row, heads in enumerate(driver.cache.held_positions(layer)):
            for head, positions in enumerate(heads):
                assert len(set(positions)) == len(positions)
                old = {at for at in positions if at < 54 - columns}
                assert old <= set(before[layer][row][head])
                assert set(range(driver.seen - RECENT, driver.seen)) <= set(positions)
        held = driver.cache.report().layers[layer].held
        assert max(map(max, held)) <= 21 + KEPT * (73 // WINDOW + 2) + WINDOW + RECENT


@settings(max_examples=15)
@given(
    window=st.integers(2, 12),
    ratio=st.floats(0.1, 0.9),
    recent=st.integers(1, 9),
    chunk_share=st.floats(0, 1),
    protect=st.booleans(),
    forwards=st.lists(st.integers(1, 17), min_size=1, max_size=12),
)
def test_any_settings_and_any_chunks_keep_what_they_must(
    window, ratio, recent, chunk_share, protect, forwards
):
    model, inputs = build("llama"), prompt(padding=(0, 6))
    cache = SlidingWindowCompressCache(
        model.config,
        window=window,
        ratio=max(ratio, 1 / window),
        recent=recent,
        chunk_share=chunk_share,
        protect=protect,
        scorer=Random(),
    )
    driver = Driver(model, cache, inputs["attention_mask"])
    assert bool(driver(inputs["input_ids"]).isfinite().all())
    for steps in forwards:
        driver(torch.randint(3, VOCABULARY, (2, steps)))
        for layer in range(LAYERS):
            for row, heads in enumerate(now_held(cache, layer)):
                first = (0, 6)[row]
                must = set(range(max(first, driver.seen - recent), driver.seen))
                if protect:
                    must |= set(range(first, 21))
                for head in heads:
                    assert must <= set(head)
                    assert len(set(head)) == len(head) and min(head) >= first
        copy.deepcopy(cache)
