"""Early exit inside generate: exact against replay and against plain generation."""

import re

import pytest
import torch
from transformers import GenerationConfig

from hf_reasoncache import ReasonAllocCache, branch_generate
from hf_reasoncache.branching import (
    ConfidentExit,
    ConsensusExit,
    DecodeExit,
    ExitRules,
    Reason,
    WeakExit,
)
from hf_reasoncache.branching.confidence import Confidence
from hf_reasoncache.branching.recording import replay
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import VOCABULARY, build, prompt

BRANCHES, TOKENS = 6, 40
ENDS = (5, 6, 7)
NOTHING = ExitRules(consensus=None, group=8)


def answer(ids):
    """The last of a few ids: early, often wrong, and different between branches."""
    found = ids[(ids >= 90) & (ids < 93)]
    return str(int(found[-1])) if len(found) else None


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    model.generation_config.eos_token_id = list(ENDS)
    model.generation_config.pad_token_id = 0
    # Likelier ends and answers: branches stop at many lengths and agree now and then.
    with torch.no_grad():
        model.lm_head.weight[[*ENDS, 90, 91, 92]] *= 1.5
    return model


def run(model, rules=NOTHING, seed=3, recorder=True, **arguments):
    settings = dict(branches=BRANCHES, eos_token_id=ENDS, rules=rules)
    exit = ConfidentExit(answer, **settings)
    torch.manual_seed(seed)
    out = model.generate(
        **prompt(),
        do_sample=True,
        top_k=0,
        num_return_sequences=BRANCHES,
        max_new_tokens=TOKENS,
        stopping_criteria=[exit],
        logits_processor=[exit.recorder] if recorder else [],
        **arguments,
    )
    return exit, out


RULES = {
    "certain": ExitRules(group=8),
    "consensus": ExitRules(consensus=ConsensusExit(0.6), group=8),
    "decode": ExitRules(DecodeExit(confidence=0.05, gap=0.1, window=4, every=2), None, None, 8),
    "weak": ExitRules(weak=WeakExit(5.6), consensus=None, group=8),
    "all": ExitRules(
        DecodeExit(confidence=0.2, gap=0.3, window=4, every=3),
        WeakExit(5.5),
        ConsensusExit(0.7),
        8,
    ),
}


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("name", RULES)
def test_a_run_with_exit_is_the_recording_cut_short(model, name, seed):
    recorded, full = run(model, seed=seed)
    early, out = run(model, RULES[name], seed=seed)
    expected = replay(recorded.recordings(), RULES[name], answer=answer)
    assert early.results() == expected
    start = prompt()["input_ids"].shape[1]
    branches = [branch for result in expected for branch in result.branches]
    for row, branch in enumerate(branches):
        until = start + branch.tokens
        assert torch.equal(out[row, :until], full[row, :until])
        assert not out[row, until:].any()


def test_every_rule_stops_somebody_somewhere(model):
    """So that the test above compares something."""
    reasons = {
        name: {
            branch.reason
            for seed in (3, 4)
            for result in run(model, rules, seed)[0].results()
            for branch in result.branches
        }
        for name, rules in RULES.items()
    }
    assert Reason.CONSENSUS in reasons["consensus"]
    assert Reason.CONFIDENT in reasons["decode"]
    assert Reason.WEAK in reasons["weak"]
    assert {Reason.CONFIDENT, Reason.WEAK, Reason.END} <= reasons["all"]
    assert reasons["certain"] <= {Reason.END, Reason.LENGTH, Reason.CONSENSUS}


def test_certain_consensus_never_changes_a_vote(model):
    for seed in range(5, 11):
        recordings = run(model, seed=seed)[0].recordings()
        early, full = replay(recordings, ExitRules(group=8)), replay(recordings, NOTHING)
        for a, b in zip(early, full, strict=True):
            if a.stopped:
                assert a.answer == b.answer
            else:
                assert a == b


def test_the_recorder_sees_logits_before_temperature_and_truncation(model):
    exit, _ = run(model, output_logits=True, return_dict_in_generate=True, temperature=0.3)
    *_, out = run(model, output_logits=True, return_dict_in_generate=True, temperature=0.3)
    probabilities = torch.stack(out.logits, 1).double().softmax(-1)
    best = probabilities.topk(20).values
    for row, recorded in enumerate(
        each for recording in exit.recordings() for each in recording.confidence
    ):
        steps = len(recorded)
        best_of = best[row, :steps]
        expected = torch.stack([best_of[:, 0], best_of[:, 1], -best_of.log().mean(-1)], -1)
        torch.testing.assert_close(recorded, expected.float(), rtol=1e-5, atol=1e-6)


def test_confidence_leaves_out_forbidden_tokens():
    logits = torch.tensor([[2.0, 1.0, -torch.inf, 0.0]])
    allowed = logits[:, [0, 1, 3]]
    for a, b in zip(Confidence.of(logits, 4), Confidence.of(allowed, 3), strict=True):
        torch.testing.assert_close(a, b)


def test_it_works_with_our_caches_and_leaves_greedy_tokens_alone(model):
    start = prompt()["input_ids"].shape[1]
    exit = ConfidentExit(answer, branches=1, eos_token_id=ENDS)
    arguments = prompt() | dict(do_sample=False, max_new_tokens=TOKENS)
    plain = model.generate(**arguments)
    out = model.generate(
        **arguments,
        **cache_kwarg(ReasonAllocCache(model.config, budget=None)),
        stopping_criteria=[exit],
        logits_processor=[exit.recorder],
    )
    assert torch.equal(out, plain)
    for row, result in enumerate(exit.results()):
        (branch,) = result.branches
        assert branch.answer == answer(plain[row, start : start + branch.tokens])


@pytest.mark.parametrize("name", ["consensus", "all"])
def test_branches_that_stopped_leave_branch_generate(model, name):
    """The same branches as plain generate; rows that stopped cost no step of the model."""
    _, expected = run(model, RULES[name])
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    exit = ConfidentExit(answer, branches=BRANCHES, eos_token_id=ENDS, rules=RULES[name])
    torch.manual_seed(3)
    out = branch_generate(
        model,
        prompt(),
        num_branches=BRANCHES,
        do_sample=True,
        top_k=0,
        max_new_tokens=TOKENS,
        stopping_criteria=[exit],
        logits_processor=[exit.recorder],
    )
    hook.remove()
    assert torch.equal(out, expected)
    # Two prompts, then what still runs: a branch's first token comes from the prompt.
    spent = sum(result.tokens for result in exit.results())
    assert sum(rows) == 2 + spent - 2 * BRANCHES


def test_text_goes_through_the_tokenizer(model):
    class Tokenizer:
        eos_token_id = 5

        def decode(self, ids):
            return " ".join(f"w{int(i)}" for i in ids)

    exit = ConfidentExit(
        lambda text: (re.findall(r"w9\d", text) or [None])[-1],
        branches=BRANCHES,
        tokenizer=Tokenizer(),
        eos_token_id=ENDS,
    )
    out = model.generate(
        **prompt(),
        do_sample=True,
        num_return_sequences=BRANCHES,
        max_new_tokens=12,
        stopping_criteria=[exit],
    )
    start = prompt()["input_ids"].shape[1]
    texts = [Tokenizer().decode(row[start:]) for row in out]
    branches = [branch for result in exit.results() for branch in result.branches]
    assert any(branch.answer for branch in branches)
    for text, branch in zip(texts, branches, strict=True):
        if branch.reason is not Reason.CONSENSUS:
            assert branch.answer == exit.answer(text)
        assert branch.confidence is None


def test_reset_makes_it_new(model):
    exit, _ = run(model)
    first = exit.results()
    exit.reset()
    with pytest.raises(ValueError, match="expected a generation, got none"):
        exit.results()
    torch.manual_seed(3)
    model.generate(
        **prompt(),
        do_sample=True,
        top_k=0,
        num_return_sequences=BRANCHES,
        max_new_tokens=TOKENS,
        stopping_criteria=[exit],
        logits_processor=[exit.recorder],
    )
    assert exit.results() == first


def test_misuse_says_what_to_do(model):
    sampled = dict(do_sample=True, max_new_tokens=8)
    several = sampled | dict(num_return_sequences=BRANCHES)

    def generate(exit, **arguments):
        model.generate(**prompt() | arguments, stopping_criteria=[exit])

    def make(rules=None, branches=BRANCHES):
        return ConfidentExit(answer, branches=branches, eos_token_id=ENDS, rules=rules)

    with pytest.raises(ValueError, match=r"logits_processor=\[exit.recorder\]"):
        generate(make(RULES["weak"]), **several)
    with pytest.raises(ValueError, match="set branches to num_return_sequences"):
        generate(make(branches=5), **several)
    exit = make()
    generate(exit, **several)
    with pytest.raises(ValueError, match="call reset"):
        generate(exit, **several)
    with pytest.raises(ValueError, match="rules=ExitRules"):
        exit.recordings()
    with pytest.raises(ValueError, match="beam search"):
        generate(make(branches=1), num_beams=3, do_sample=False, max_new_tokens=20)
    exit = make(branches=1)
    with pytest.raises(ValueError, match="without beams"):
        generate(
            exit,
            num_beams=3,
            do_sample=False,
            max_new_tokens=20,
            logits_processor=[exit.recorder],
        )
    exit = make(branches=1)
    one = {name: each[:1] for name, each in prompt().items()}
    with pytest.raises(ValueError, match="assisted decoding"):
        generate(exit, **one, assistant_model=model, do_sample=False, max_length=41)
    with pytest.raises(ValueError, match="function to str or None"):
        generate(ConfidentExit(lambda ids: 7, branches=1, eos_token_id=range(VOCABULARY)))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="eos_token_id: expected the ids"):
        ConfidentExit(answer, branches=2)
    with pytest.raises(ValueError, match="branches: expected"):
        ConfidentExit(answer, branches=0, eos_token_id=2)
    for faulty, field in (
        (lambda: DecodeExit(confidence=1.1), "confidence"),
        (lambda: DecodeExit(every=0), "every"),
        (lambda: WeakExit(float("nan")), "threshold"),
        (lambda: ConsensusExit(0.0), "confidence"),
        (lambda: ExitRules(group=0), "group"),
        (lambda: ExitRules(weak=0.5), "weak"),
    ):
        with pytest.raises(ValueError, match=f"{field}: expected"):
            faulty()


def test_the_last_branch_of_an_unanswered_problem_never_stops(model):
    """However high the threshold: somebody must answer."""
    exit, _ = run(model, ExitRules(weak=WeakExit(100.0), consensus=None, group=8))
    for result in exit.results():
        survivors = [b for b in result.branches if b.reason is not Reason.WEAK]
        assert survivors
        weak = [b for b in result.branches if b.reason is Reason.WEAK]
        assert weak and all(b.answer is None and b.tokens >= 8 for b in weak)


def test_generation_config_of_the_model_may_name_several_ends(model):
    ends = GenerationConfig(eos_token_id=list(ENDS)).eos_token_id
    exit = ConfidentExit(answer, branches=BRANCHES, eos_token_id=ends)
    assert exit._ends.tolist() == list(ENDS)
