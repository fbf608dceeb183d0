"""Training of the reasoner's adapter, on a tiny random model with words as tokens."""

import json
import random
from dataclasses import replace

import pytest
import torch

from examples.real_model.reasoner import adapter, attention, evaluate
from examples.real_model.reasoner.problems import NUMBERS, make_problems
from examples.real_model.reasoner.train import (
    Settings,
    Trainer,
    draw_step,
    draw_sums,
    encode,
    group,
    predict,
)
from tests.support.tokenizers import Words, words_model

SETTINGS = Settings(steps=12, ramp=6, tokens=400, warmup=2, rank=4, alpha=8.0)


TOKENIZER = Words()


def make_model():
    return words_model(TOKENIZER, layers=2, attention=attention.NAME)


def loss_of(trainer):
    outcomes = [each for some in trainer.run_step().values() for each in some]
    return float(torch.cat([each.losses for each in outcomes]).mean())


@pytest.mark.parametrize("step", [0, 3, 9])
def test_a_step_depends_on_its_number_and_the_seed_alone(step):
    drawn = draw_step(TOKENIZER, SETTINGS, step)
    assert drawn == draw_step(TOKENIZER, SETTINGS, step)
    assert drawn != draw_step(TOKENIZER, SETTINGS, step + 1)
    assert sum(len(each.ids) for each in drawn) >= SETTINGS.tokens
    for each in drawn:
        words = TOKENIZER.split(each.problem.chain)
        assert each.ids[each.start :] == [TOKENIZER.ids[word] for word in [*words, "<|im_end|>"]]


def test_problems_grow_to_full_size():
    lengths = [
        max(len(each.ids) for each in draw_step(TOKENIZER, SETTINGS, step)) for step in (0, 6)
    ]
    assert lengths[0] * 2 < lengths[1]


def test_the_mix_says_what_is_drawn():
    settings = replace(SETTINGS, tokens=3000, mix="sums trades trades trades")
    tasks = [
        each.problem.task for step in range(6) for each in draw_step(TOKENIZER, settings, step)
    ]
    assert set(tasks) == {"sums", "trades"} and tasks.count("sums") * 2 < len(tasks)


def test_sums_are_right():
    signs = []
    for seed in range(20):
        problem = draw_sums(random.Random(seed), 5)
        for line, asked in zip(problem.chain.split("\n"), problem.prompt.split("\n"), strict=True):
            assert line.startswith(f"{asked} is ")
            one, sign, two, _, result = line.rstrip(".").split()[1:]
            first, second, found = map(NUMBERS.index, (one, two, result))
            assert found == (first + second if sign == "plus" else first - second)
            signs.append(sign)
    assert len(signs) == 100 and 10 < signs.count("plus") < 40


def test_groups_hold_every_example_once_with_little_padding():
    drawn = [each for step in range(7) for each in draw_step(TOKENIZER, SETTINGS, step)]
    groups = group(drawn)
    assert sorted(id(each) for some in groups for each in some) == sorted(map(id, drawn))
    assert len(groups) < len(drawn)
    for some in groups:
        lengths = [len(each.ids) for each in some]
        assert max(lengths) * len(lengths) <= 1.1 * sum(lengths)


def test_blocked_attention_equals_the_fused_one():
    ids = torch.randint(100, (2, 37))
    found = {}
    for name in (attention.NAME, "sdpa"):
        model = make_model()
        model.set_attn_implementation(name)
        model(ids).logits.square().mean().backward()
        weights = {key: each.grad for key, each in model.named_parameters()}
        found[name] = {"logits": model(ids).logits.detach(), **weights}
    for key, wanted in found["sdpa"].items():
        torch.testing.assert_close(found[attention.NAME][key], wanted, rtol=1e-3, atol=1e-4)


def test_logits_are_those_of_each_chain_alone():
    """Neither padding nor the other rows matter."""
    model = make_model()
    drawn = draw_step(TOKENIZER, SETTINGS, 2)
    logits, targets = predict(model, drawn)
    alone = [model(torch.tensor([each.ids])).logits[0, each.start - 1 : -1] for each in drawn]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert targets.tolist() == [token for each in drawn for token in each.ids[each.start :]]


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was():
    model = make_model()
    before = {name: each.clone() for name, each in model.named_parameters()}
    trainer = Trainer(model, TOKENIZER, Settings(steps=12, ramp=1000, tokens=400, rate=3e-2))
    losses = [loss_of(trainer) for _ in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    after = dict(model.named_parameters())
    for name, each in before.items():
        parent, _, child = name.rpartition(".")
        kept = after[name] if name in after else after[f"{parent}.base.{child}"]
        assert torch.equal(kept, each)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole = Trainer(make_model(), TOKENIZER, SETTINGS)
    losses = [loss_of(whole) for _ in range(6)]
    first = Trainer(make_model(), TOKENIZER, SETTINGS)
    assert [loss_of(first) for _ in range(3)] == losses[:3]
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(make_model(), TOKENIZER, SETTINGS)
    second.restore(tmp_path / "checkpoint.pt")
    assert [loss_of(second) for _ in range(3)] == losses[3:]
    assert (second.step, second.tokens) == (whole.step, whole.tokens)
    for name, each in whole.adapter.items():
        assert torch.equal(second.adapter[name], each)


def test_the_rate_rises_stays_and_falls():
    settings = Settings(steps=100, rate=1.0, warmup=10, cooldown=20)
    rates = [settings.rate_at(step) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert set(rates[10:81]) == {1.0}
    assert rates[81:] == [pytest.approx((100 - step) / 20) for step in range(81, 100)]


def test_a_merged_adapter_is_the_trained_model_in_the_layout_of_peft(tmp_path):
    trainer = Trainer(make_model(), TOKENIZER, SETTINGS)
    plain = make_model()
    ids = torch.randint(100, (1, 20))
    assert torch.equal(trainer.model(ids).logits, plain(ids).logits), "an adapter begins as zero"
    for _ in range(4):
        trainer.run_step()
    with torch.no_grad():
        for each in trainer.adapter.values():
            each.copy_(each.to(torch.bfloat16))  # as it is saved
    trained = trainer.model(ids).logits
    adapter.save(trainer.adapter, tmp_path, SETTINGS.rank, SETTINGS.alpha)
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    weights = adapter.load_file(tmp_path / adapter.WEIGHTS)
    assert len(weights) == 2 * 2 * len(config["target_modules"])
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    assert weights[name].shape == (4, 64) and weights[name].dtype == torch.bfloat16
    assert (trained - plain(ids).logits).abs().max() > 1e-3
    merged = adapter.merged(plain, tmp_path)
    torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_answers_are_what_generate_writes_wherever_it_leaves_the_chain(monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 30)
    model, end = make_model().eval(), TOKENIZER.ids["<|im_end|>"]
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.set_attn_implementation("sdpa")
    given, wanted = [], []
    for number, problem in enumerate(make_problems("ledger", 7, 1000)):
        ids = torch.tensor([encode(TOKENIZER, problem).ids])
        ids = ids[:, : encode(TOKENIZER, problem).start]
        reply = model.generate(
            input_ids=ids, max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=end
        )[0, ids.shape[1] :].tolist()
        wanted.append(TOKENIZER.decode(reply))
        # The chain is what the model writes, and is left after 0, 5, 10 ... tokens, or never.
        agreed = 5 * number if number < 6 else len(reply)
        chain = [*reply[:agreed], (reply[min(agreed, len(reply) - 1)] + 1) % 200]
        given.append(replace(problem, chain=TOKENIZER.decode(chain)))
    assert len(set(wanted)) > 1
    found = evaluate.answers(model, TOKENIZER, given, batch_size=3)
    for text, other in zip(found, wanted, strict=True):
        assert text.split()[: len(other.split())] == other.split()
