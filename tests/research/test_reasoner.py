"""The studies of the reasoner, on a tiny random model with words as tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from examples.real_model.reasoner.problems import TASKS, make_problems
from examples.real_model.reasoner.train import encode
from examples.research import chains as chains_module
from examples.research import reading, reasoner_budgets, risk_signals
from examples.research.chains import Arm, Chain, answer, answer_arms, right_until
from examples.research.reading import Reading, read, read_arms
from examples.research.risk_signals import (
    ERROR,
    SQUARE,
    Logistic,
    Promise,
    Scored,
    Weights,
    mean_of,
    peak,
    tables,
    total,
)
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import CacheSpec
from hf_reasoncache.evaluation.fidelity import CHUNK
from hf_reasoncache.evaluation.specs import FULL
from hf_reasoncache.releases import cache_kwarg
from tests.support.profiles import make_profile
from tests.support.tokenizers import Words, words_model

TOKENIZER = Words()
LIMIT = 40
SPEC = CacheSpec(
    "R-KV", ReasonAllocCache, {"window": 4, "buffer": 8, "protect": False, "risk": True}, "rkv"
)


@pytest.fixture(scope="module")
def model():
    return words_model(TOKENIZER, layers=3, attention="reasoncache").eval()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(chains_module, "MAX_NEW_TOKENS", LIMIT)


def problems(count, task="trades"):
    return dict(enumerate(make_problems(task, count, 1000)))


def test_an_answer_is_that_of_generate_with_what_it_measured(model):
    found = answer(model, TOKENIZER, problems(2), Arm(SPEC, 64, 2), 1000)
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    for chain, problem in zip(found, problems(2).values(), strict=True):
        example = encode(TOKENIZER, problem)
        ids = torch.tensor([example.ids[: example.start]])
        cache = SPEC.make(model.config, 64, None, 0)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **cache_kwarg(cache),
            do_sample=False,
            max_new_tokens=LIMIT,
            eos_token_id=end,
            pad_token_id=end,
            output_logits=True,
            return_dict_in_generate=True,
        )
        wrote = output.sequences[0, example.start :].tolist()
        assert chain.tokens == len(wrote) - chain.finished
        logs = torch.stack(output.logits, 1)[0].log_softmax(-1).max(-1).values
        assert chain.confidence == pytest.approx(logs.tolist(), rel=0.02, abs=1e-4)
        for own, layer in zip(chain.damage, cache.own_layers, strict=True):
            # Whatever the padding: tokens written when it happened.
            written = (layer.risk.columns - example.start).tolist()
            assert written == [each[0] for each in own] and 0 <= written[0] < written[-1] < LIMIT
            expected = torch.stack(
                [layer.risk.error.mean(-1), layer.risk.error.square().mean(-1)], -1
            )
            assert [each[1:3] for each in own] == [
                pytest.approx(each, rel=0.02, abs=1e-4) for each in expected.tolist()
            ]
        assert 64 < chain.held < 64 + 8 + len(example.ids) / LIMIT
        assert (chain.task, chain.number) == ("trades", found.index(chain))


def test_rows_that_end_early_keep_their_damage(model, monkeypatch):
    def with_end(ids):
        return {"ids": ids}

    alone = answer(model, TOKENIZER, problems(3), Arm(SPEC, 64, 3), 1000)
    # The end is now a token that some rows write sooner than others.
    ends = {}
    real = Words.convert_tokens_to_ids

    def other_end(self, word):
        return ends.get(word, real(self, word))

    monkeypatch.setattr(Words, "convert_tokens_to_ids", other_end)
    example = encode(TOKENIZER, problems(3)[1])
    model.set_attn_implementation("sdpa")
    logits = model(torch.tensor([example.ids[: example.start]])).logits[0, -1]
    first = int(logits.argmax())
    ends["<|im_end|>"] = first
    found = answer(model, TOKENIZER, problems(3), Arm(SPEC, 64, 3), 1000)
    assert found[1].finished and found[1].tokens == 0
    lengths = [chain.tokens for chain in found]
    assert max(lengths) > 0
    for before, after in zip(alone, found, strict=True):
        for old, new in zip(before.damage, after.damage, strict=True):
            assert new == [each for each in old if each[0] <= after.tokens][: len(new)]


def test_the_full_cache_has_no_damage(model):
    [chain] = answer(model, TOKENIZER, problems(1), Arm(FULL, None, 1), 1000)
    assert chain.damage == [] and chain.budget is None
    example = encode(TOKENIZER, problems(1)[0])
    assert example.start < chain.held < example.start + LIMIT


def test_where_a_chain_leaves_the_script():
    assert right_until([1, 2, 3], [1, 2, 3]) is None
    assert right_until([1, 2, 3], [1, 2, 3, 4]) is None
    assert right_until([1, 2, 3], [1, 2]) == 2
    assert right_until([1, 2, 3], [1, 4, 3]) == 1


def test_answers_are_kept(model, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    arms = [Arm(SPEC, 64, 2), Arm(FULL, None, 1)]
    given = (model, TOKENIZER, arms, ("trades",), 1000, path)
    first = answer_arms(*given)
    assert [[chain.number for chain in some] for some in first] == [[0, 1], [0]]
    monkeypatch.setattr(chains_module, "answer", None)
    assert answer_arms(*given) == first
    other = replace(SPEC, settings=SPEC.settings | {"buffer": 16})
    with pytest.raises(ValueError, match="other settings"):
        answer_arms(model, TOKENIZER, [Arm(other, 64, 2)], ("trades",), 1000, path)


def chain_of(number, wrong, level, task="trades", seed=1000, layers=3, **changes):
    """An answer whose evictions have an error of `level` in every layer."""
    level = float(level)
    damage = [[[at, level, level**2, level / 2, level] for at in (10, 30)] for _ in range(layers)]
    fields = {"cache": reasoner_budgets.MAIN, "budget": 64, "digest": "", "followed": True}
    fields |= {"finished": True, "tokens": 50, "right": 20 if wrong else None, "held": 70.0}
    fields |= {"confidence": [-0.1, -0.2 - number % 7 / 10], "damage": damage}
    return Chain(task, seed, number, correct=not wrong, **(fields | changes))


EQUAL = Weights(*[np.ones(1)] * 3)


def test_sums_and_peaks_of_damage():
    damage = [[[0, 1.0, 1.0, 0.5, 2.0], [100, 3.0, 9.0, 0.5, 2.0]], [[40, 2.0, 4.0, 0.5, 5.0]]]
    chain = chain_of(0, True, 0.0, damage=damage)
    weights = np.array([1.0, 10.0])
    assert total(chain, ERROR, weights) == 1 + 3 + 20
    assert total(chain, SQUARE, weights, until=50) == 1 + 40
    assert mean_of(chain, ERROR) == 2 and mean_of(chain, ERROR, until=10) == 1
    assert mean_of(chain, ERROR, weights) == 8
    assert peak(chain, ERROR, weights) == 20 + 3, "0 and 40 are within 64 tokens, and 40 and 100"
    assert peak(replace(chain, damage=[[], []]), ERROR, weights) == 0
    assert mean_of(chain, ERROR, until=50, since=10) == 2


def test_damage_before_the_error_is_compared_at_the_same_token():
    """Damage falls along a chain, and is the same in right and wrong ones up to any token."""

    def damage(level):
        return [[[at, level + 1 / (1 + at), 0.0, 0.0, 0.0] for at in range(0, 50, 10)]]

    chains = [
        chain_of(n, n % 2 == 0, 0.0, damage=damage(0.0), right=None if n % 2 else 5 + n % 3 * 10)
        for n in range(20)
    ]
    value = risk_signals.before_the_error(EQUAL)["mean error"]
    assert risk_signals.matched_area(chains, value) == "0.50 (0.50-0.50)"
    worse = [replace(chain, damage=damage(0.5 * (chain.right is not None))) for chain in chains]
    assert risk_signals.matched_area(worse, value) == "1.00 (1.00-1.00)"


def test_weights_are_costs_per_squared_error():
    divergence = torch.tensor([[[1.0], [2.0], [4.0]]] * 2)
    shipped = make_profile(demand=(1.0, 1.0, 2.0))
    calibrated = make_profile(statistics={"divergence": divergence})
    weights = Weights.of(shipped, calibrated, [chain_of(0, False, 2.0)])
    assert weights.demand == pytest.approx([0.75, 0.75, 1.5])
    assert weights.divergence == pytest.approx(np.array([1, 2, 4]) / (7 / 3))


def test_a_regression_finds_what_tells_wrong_answers():
    rng = np.random.default_rng(0)
    chains = [
        chain_of(n, wrong := bool(rng.random() < 0.5), 0.1 * np.exp(rng.normal() + 2 * wrong))
        for n in range(200)
    ]
    made = Logistic.fit(chains[:100], risk_signals.by_layer)
    assert Scored.of(chains[100:], made).mean_area > 0.85
    found = risk_signals.cross_validated(chains, risk_signals.by_layer)
    assert 0.85 < found.mean_area < 1


def test_areas_are_within_tasks():
    # Higher where the task is another one, not where the answer is wrong.
    tasks = [TASKS[n % 2] for n in range(80)]
    chains = [chain_of(n, n // 2 % 2 == 0, n % 2 * 5, task) for n, task in enumerate(tasks)]
    scored = Scored.of(chains, lambda chain: mean_of(chain, ERROR))
    assert scored.mean_area == 0.5
    assert scored.mean_area_with_interval == "0.50 (0.50-0.50)"


@pytest.mark.parametrize("alpha", [0.3, 0.1])
def test_thresholds_keep_their_promise(alpha):
    rng = np.random.default_rng(1)
    wrong = rng.random(400) < 0.4
    values = rng.normal(size=400) + wrong
    found = Promise.of(values, wrong, alpha)
    assert 0 < found.missed <= alpha + 0.01
    assert found.accepted > alpha and found.wrong < wrong.mean()
    useless = Promise.of(rng.normal(size=400), wrong, alpha)
    assert useless.accepted < found.accepted


def test_tables_of_risk(tmp_path):
    rng = np.random.default_rng(0)
    journal = []
    for seed, count in ((1000, 60), (2000, 90)):
        for task in TASKS:
            for n in range(count):
                wrong = bool(rng.random() < 0.5)
                journal.append(chain_of(n, wrong, rng.random() + wrong, task, seed))
    statistics = {"divergence": torch.ones(2, 3, 1)}
    profile = make_profile(statistics=statistics)
    parts = [[chain for chain in journal if chain.seed == seed] for seed in (1000, 2000)]
    areas, promises, chosen = tables(*parts, profile, profile)
    rows = {row["signal"]: row for row in areas}
    assert rows["length"]["fresh"].startswith("0.50")
    assert float(rows["mean error"]["fresh"][:4]) > 0.8
    assert len(promises) == len(chosen) * 3 * 3
    risk_signals.draw(chosen, tmp_path / "roc.png")
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")


def reading_of(number, right, task="trades", **changes):
    """A chain of 100 tokens, right until some token."""
    fields = {"cache": reasoner_budgets.MAIN, "budget": 64, "digest": "", "held": 70.0}
    return Reading(task, 2000, number, right=right, length=100, **(fields | changes))


def test_arms_are_compared_on_the_same_problems():
    main = [reading_of(n, 50 if n < 4 else 100, task) for task in TASKS for n in range(10)]
    other = [reading_of(n, 40, task, cache="R-KV") for task in TASKS for n in range(5)]
    row = reasoner_budgets.line(other, main)
    assert row["of each"] == "5" and row["trades"].startswith("0.0 ")
    assert row[f"against {reasoner_budgets.MAIN}"] == "-20.0 of 15" and row["p"] == "0.25"
    assert row["right until"] == "40"
    assert row["right until, against it"].startswith("-20 ("), "four of five by 10, one by 60"
    assert reasoner_budgets.line(main, main)["p"] == ""
    assert reasoner_budgets.picture([main, other]).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="NAME:BUDGET:PROBLEMS"):
        reasoner_budgets.parse_arm("R-KV")
    assert reasoner_budgets.parse_arm("full::20") == Arm(FULL, None, 20)


def test_reading_follows_greedy_decoding(model):
    """The script is what the model would write, up to some token of each row."""
    examples = [encode(TOKENIZER, problem) for problem in problems(4).values()]
    model.set_attn_implementation("sdpa")
    until = [0, 5, 19, None]
    scripts = []
    for example, wrong in zip(examples, until, strict=True):
        ids = torch.tensor([example.ids[: example.start]])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=27,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
        if wrong is not None:
            output[example.start + wrong] = (output[example.start + wrong] + 1) % 9
        scripts.append(replace(example, ids=output))
    found = read(model, scripts, DynamicCache(config=model.config))
    assert [right for right, _ in found] == [0, 5, 19, 27]
    assert found[0][1] == examples[0].start
    assert examples[3].start < found[3][1] < examples[3].start + 27


def test_reading_evicts_as_decoding_with_a_chunk_more_of_buffer_does(model):
    example = encode(TOKENIZER, problems(1)[0])
    larger = replace(SPEC, settings=SPEC.settings | {"buffer": 8 + CHUNK})
    cache = larger.make(model.config, example.start, None, 0)
    ids = torch.tensor([example.ids[: example.start]])
    model.set_attn_implementation("reasoncache")
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **cache_kwarg(cache),
        do_sample=False,
        max_new_tokens=LIMIT,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()
    fresh = SPEC.make(model.config, example.start, None, 0)
    assert read(model, [replace(example, ids=output)], fresh)[0][0] == LIMIT
    decoded, found = (
        [damage[0] for layer in chains_module.damage_of(each, 0, example.start) for damage in layer]
        for each in (cache, fresh)
    )
    assert decoded == found == [16, 32] * 3


def test_arms_are_read_once(model, tmp_path, monkeypatch):
    path = tmp_path / "readings.jsonl"
    given = (model, TOKENIZER, [Arm(SPEC, 64, 2), Arm(FULL, None, 1)], ("trades",), 1000, path)
    first = read_arms(*given)
    assert [[each.number for each in some] for some in first] == [[0, 1], [0]]
    monkeypatch.setattr(reading, "read", None)
    assert read_arms(*given) == first
    other = replace(SPEC, settings=SPEC.settings | {"buffer": 16})
    with pytest.raises(ValueError, match="other settings"):
        read_arms(model, TOKENIZER, [Arm(other, 64, 2)], ("trades",), 1000, path)


def test_settings_of_the_sweep_hold_as_much():
    arms = reasoner_budgets.sweep(224, 5)
    assert arms[0].spec.name == reasoner_budgets.MAIN
    assert len({arm.spec.name for arm in arms}) == len(arms)
    for arm in arms:
        free = arm.spec.settings.get("buffer", arm.spec.settings["window"])
        assert arm.budget + free // 2 == 224 + reasoner_budgets.BUFFER // 2
