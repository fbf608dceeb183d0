"""Branches that fork, are put aside and come back: every row attends to its own text, and nothing
is stored that nobody reads.
"""

import copy
import weakref

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import LlamaConfig

from hf_reasoncache import SharedBranchCache
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.storage.new_tokens import NewTokens
from tests.support.caches import make_policy
from tests.support.driver import Driver
from tests.support.models import build, prompt
from tests.support.oracle import Recorder

HEADS, GROUP, SIZE, LAYERS = 2, 2, 4, 2
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS * GROUP,
    num_key_value_heads=HEADS,
    head_dim=SIZE,
    hidden_size=16,
)
TOKEN_BYTES = LAYERS * HEADS * SIZE * 2 * 4


class Text:
    """What a branch should attend to: keys, values and columns, layer by layer."""

    def __init__(self, tokens=()):
        self.tokens = list(tokens)

    def upto(self, column):
        return Text(each for each in self.tokens if each[0] < column)

    def attend(self, layer, query):
        keys = torch.stack([each[1][layer] for each in self.tokens], 1).double()
        values = torch.stack([each[2][layer] for each in self.tokens], 1).double()
        logits = query.double() @ keys.transpose(1, 2) * SIZE**-0.5
        return logits.softmax(-1) @ values


class Tree(RuleBasedStateMachine):
    """Drives a cache layer by layer, and keeps every row's text beside it."""

    def __init__(self):
        super().__init__()
        self.draw = torch.Generator().manual_seed(0)
        self.made = weakref.WeakSet()
        self.column, self.parked = 0, []

    @initialize(
        rows=st.integers(1, 3), copies=st.integers(1, 3), bound=st.sampled_from([None, 20, 40])
    )
    def begin(self, rows, copies, bound):
        self.cache = SharedBranchCache(CONFIG, max_bytes=bound and bound * TOKEN_BYTES)
        self.rows = [Text() for _ in range(rows * copies)]
        self.feed([row // copies for row in range(rows * copies)], steps=4)

    def random(self, *shape):
        return torch.randn(shape, generator=self.draw)

    def feed(self, like, steps):
        """One forward; rows with the same entry in `like` get the same tokens."""
        kinds = max(like) + 1
        keys, values = (self.random(LAYERS, kinds, HEADS, steps, SIZE)[:, like] for _ in range(2))
        query = self.random(LAYERS, kinds, HEADS, GROUP, steps, SIZE)[:, like]
        for row, text in enumerate(self.rows):
            for step in range(steps):
                each = (keys[:, row, :, step], values[:, row, :, step])
                text.tokens.append((self.column + step, *each))
        for index, layer in enumerate(self.cache.layers):
            self.cache.update(keys[index], values[index], index)
            chunk = NewTokens(
                query[index].flatten(1, 2),
                *layer.take_incoming(),
                None,
                {"scaling": SIZE**-0.5, "softcap": None, "s_aux": None},
            )
            if layer.rows is None:
                layer.store_first(chunk)
                continue
            found = layer.attend(chunk)[:, -1].view(-1, HEADS, GROUP, SIZE)
            for row, text in enumerate(self.rows):
                expected = text.attend(index, query[index, row, :, :, -1])
                torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-5)
        self.column += steps

    @rule(times=st.integers(1, 5))
    def write(self, times):
        for _ in range(times):
            self.feed(list(range(len(self.rows))), steps=1)

    @precondition(lambda self: len(self.rows) < 8)
    @rule(data=st.data(), copies=st.integers(1, 2))
    def fork(self, data, copies):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        new = self.cache.fork(row, copies)
        assert new == list(range(len(self.rows), len(self.rows) + copies))
        self.rows += [Text(self.rows[row].tokens) for _ in new]

    @rule(data=st.data())
    def select(self, data):
        count = len(self.rows)
        rows = data.draw(
            st.lists(st.integers(0, count - 1), min_size=1, max_size=min(count + 1, 8))
        )
        self.cache.reorder_cache(torch.tensor(rows))
        self.rows = [Text(self.rows[row].tokens) for row in rows]

    @precondition(lambda self: len(self.rows) <= 3)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.rows = [Text(text.tokens) for text in self.rows for _ in range(2)]

    @precondition(lambda self: len(self.rows) > 1)
    @rule(data=st.data(), score=st.sampled_from([0, 0.5, 2.0]))
    def park(self, data, score):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.parked.append((self.cache.park(row, score), self.rows.pop(row)))
        report, bound = self.cache.report(), self.cache.max_bytes
        if bound is None:
            assert all(each.end >= text.tokens[-1][0] for each, text in self.parked)
        elif report.kv_bytes + report.branches.parked_bytes > bound:
            live = {part for path in self.cache.layers[0].store.tree.paths for part in path}
            assert all(set(each.paths[0]) <= live for each, _ in self.parked)

    @precondition(lambda self: self.parked and len(self.rows) < 8)
    @rule(data=st.data())
    def resume(self, data):
        parked, text = self.parked.pop(data.draw(st.integers(0, len(self.parked) - 1)))
        assert self.cache.resume(parked) == len(self.rows)
        self.rows.append(text.upto(parked.end))

    @precondition(lambda self: self.parked)
    @rule()
    def discard(self):
        self.cache.discard(self.parked.pop(0)[0])

    @precondition(lambda self: self.column > 6 and not self.parked)
    @rule(columns=st.integers(1, 4))
    def crop(self, columns):
        self.cache.crop(-columns)
        self.column -= columns
        self.rows = [text.upto(self.column) for text in self.rows]

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def rows_hold_their_texts(self):
        for index in range(LAYERS):
            held = self.cache.held_positions(index)
            assert held == [[[each[0] for each in text.tokens]] * HEADS for text in self.rows]
        for parked, text in self.parked:
            assert parked.tokens == len(text.upto(parked.end).tokens)

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def nothing_is_stored_that_nobody_reads(self):
        paths = [path for layer in self.cache.layers for path in layer.store.tree.paths]
        paths += [path for parked, _ in self.parked for path in parked.paths]
        reached = {part for path in paths for part in path}
        self.made.update(reached)
        assert set(self.made) == reached, "a segment outlives its readers"
        own = sum(layer.store.pool.layout.slots for layer in self.cache.layers) * SIZE * 2 * 4
        report = self.cache.report()
        stored = report.kv_bytes + report.branches.parked_bytes
        assert stored == own + sum(part.nbytes for part in reached)


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_fork_stores_the_common_text_once_and_goes_on_as_a_copy_would():
    model, inputs = build("llama"), prompt()
    for name in ("llama", "gemma3", "deepseek_v3"):
        model = build(name)
        cache = SharedBranchCache(model.config)
        driver = Driver(model, cache, inputs["attention_mask"])
        logits = driver.greedy(driver(inputs["input_ids"]), 30)
        before = cache.report().kv_bytes
        rows = [0, 1, 0, 0, 0]
        twin = copy.deepcopy(cache)
        twin.batch_select_indices(torch.tensor(rows))
        assert cache.fork(0, copies=3) == [2, 3, 4]
        assert cache.report().kv_bytes <= before < twin.report().kv_bytes
        other = Driver(model, twin, driver.mask)
        other.seen = driver.seen
        draw = torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(0))
        for step in range(12):
            found = driver.rows(rows if step == 0 else slice(None))(draw[:, step, None])
            expected = other.rows(rows if step == 0 else slice(None))(draw[:, step, None])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert logits.shape[1] == 30


@pytest.mark.parametrize("kind", ["reason_alloc", "sliding_window"])
def test_fork_of_compressed_branches_equals_oracle(kind):
    model, inputs = build("llama"), prompt()
    cache = SharedBranchCache(model.config, suffix=make_policy(kind))
    recorder = Recorder(model, cache, inputs["attention_mask"])
    draw = torch.Generator().manual_seed(0)

    def decode(logits, steps):
        for _ in range(steps):
            logits = recorder.forward(torch.multinomial(logits.softmax(-1), 1, generator=draw))
        return logits

    logits = decode(recorder.forward(inputs["input_ids"]), 30)
    cache.fork(1, copies=2)
    rows = [0, 1, 1, 1]
    recorder.padding, recorder.ids = recorder.padding[rows], recorder.ids[rows]
    recorder.visible = {layer: seen[rows] for layer, seen in recorder.visible.items()}
    recorder.logits = [each[rows] for each in recorder.logits]
    decode(logits[rows], 40)
    recorder.check(1e-4)
    assert cache.report().evictions > 60


@pytest.mark.parametrize("bound", [None, 1])
def test_parked_branch_comes_back_as_if_it_had_waited_alone(bound):
    """Its gap is padding. With a bound, what it wrote is gone, and is fed again."""
    model, inputs = build("llama"), {k: v.repeat(2, 1) for k, v in prompt(batch=1).items()}
    draw = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = SharedBranchCache(model.config, max_bytes=bound)
    driver = Driver(model, cache, inputs["attention_mask"])
    driver(inputs["input_ids"])
    for step in range(10):
        driver(draw[:, step, None])
    parked = cache.park(1, 1.0)
    assert parked.end == (31 if bound is None else 21)
    driver.mask = driver.mask[:1]
    for step in range(10, 20):
        driver(draw[:1, step, None])
    assert cache.resume(parked) == 1
    gap = torch.ones(1, 41, dtype=torch.long)
    gap[:, parked.end :] = 0
    driver.mask = torch.cat([driver.mask[:, :41], gap])
    again = 31 - parked.end
    if again:
        # To the other row these columns are padding.
        new = torch.tensor([[0] * again, [1] * again])
        driver.mask = torch.cat([driver.mask, new], dim=1)
        driver(draw[:, :again])
    found = [driver(draw[:, [20 + step]]) for step in range(5)]
    for row, written in enumerate((20, 10)):
        ids = torch.cat(
            [inputs["input_ids"][:1], draw[row : row + 1, [*range(written), *range(20, 25)]]], 1
        )
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[0, -5:]
        torch.testing.assert_close(torch.cat(found, 1)[row], expected, atol=1e-4, rtol=1e-4)


def test_lowest_score_goes_first_prompt_last():
    """RKSC's order: score over depth + 1, and never what a row in the batch reads."""
    machine = Tree()
    machine.begin(rows=2, copies=2, bound=None)
    machine.write(5)
    cache = machine.cache
    for row in (3, 2):
        cache.fork(row)
        machine.rows.append(Text(machine.rows[row].tokens))
    machine.write(5)
    # Rows 2 and 3 have a prompt that no other row reads, and so have their copies 4 and 5.
    low, high, middle, top = (cache.park(2, score) for score in (1.0, 5.0, 2.0, 4.0))
    assert [each.tokens for each in (low, high, middle, top)] == [14] * 4
    order = []
    while cache._parking.evict_one(cache.layers[0].store.tree.paths):
        order.append([each.tokens for each in (low, middle, top, high)])
    assert order == [
        # Ends, by score / 3.
        [9, 14, 14, 14],
        [9, 9, 14, 14],
        [9, 9, 9, 14],
        [9, 9, 9, 9],
        # What low and top, then middle and high, have in common, by the better score / 2.
        [4, 9, 4, 9],
        [4, 4, 4, 4],
        # The prompt of all four.
        [0, 0, 0, 0],
    ]
    assert cache.report().branches.blocks_evicted == len(order) == 7
    assert cache.report().branches.parked_bytes == 0
    machine.rows = machine.rows[:2]
    machine.write(2)


def test_prompts_go_after_all_else():
    """A prompt that nobody reads is kept before what was written behind another one."""
    machine = Tree()
    machine.begin(rows=3, copies=1, bound=None)
    cache = machine.cache
    poor = cache.park(1, 0.1)
    machine.rows.pop(1)
    machine.write(3)
    rich = cache.park(1, 9.0)
    order = []
    while cache._parking.evict_one(cache.layers[0].store.tree.paths):
        order.append([poor.tokens, rich.tokens])
    assert order == [[4, 4], [0, 4], [0, 0]]


def test_bound_is_reported_and_not_fatal():
    model = build("llama")
    cache = SharedBranchCache(model.config, max_bytes=20_000)
    out = model.generate(
        **prompt(batch=1), do_sample=True, num_return_sequences=3, **cache_kwarg(cache),
        max_new_tokens=20,
    )  # fmt: skip
    assert out.shape == (3, 41)
    report = cache.report()
    assert report.kv_bytes > 20_000 and report.branches.steps_over > 0
    assert f"exceeded in {report.branches.steps_over} steps" in str(report)
    assert max(map(len, str(report).splitlines())) <= 80
    kept = cache.park(2, 1.0)
    assert kept.tokens == 21 == kept.end, "only the prompt, which the others read"
    assert cache.report().branches.blocks_evicted == 1


def refused(*words):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(words))


def test_what_cannot_be_forked_or_parked():
    model = build("llama")
    cache = SharedBranchCache(model.config)
    with refused("row: expected", "0 rows", "got 0"):
        cache.fork(0)
    model.generate(**prompt(), **cache_kwarg(cache), max_new_tokens=3)
    with refused("row: expected one of 2 rows", "got 2"):
        cache.fork(2)
    for score in (-1, float("nan"), float("inf"), "1", True):
        with refused("score: expected a finite number >= 0"):
            cache.park(0, score)
    parked = cache.park(0, 1.0)
    with refused("park: expected another row"):
        cache.park(0, 1.0)
    cache.resume(parked)
    with refused("resume: expected", "not parked here"):
        cache.resume(parked)
    for name, policy in (("gemma3", None), ("llama", make_policy("reason_alloc"))):
        model = build(name)
        other = SharedBranchCache(model.config, suffix=policy)
        model.generate(**prompt(), **cache_kwarg(other), max_new_tokens=3)
        with refused("park: expected full-attention layers that keep every token", "got"):
            other.park(0, 1.0)
