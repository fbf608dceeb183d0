"""The adapter in the repository, on the pretrained model."""

import copy

import pytest

from examples.real_model.reasoner import adapter
from examples.real_model.reasoner.problems import MAX_NEW_TOKENS, TASKS, check, make_problems
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg

pytestmark = [pytest.mark.real, pytest.mark.slow]

SEED = 1998


def test_the_adapter_is_small():
    files = [adapter.HERE / name for name in (adapter.WEIGHTS, adapter.CONFIG)]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20


def test_it_solves_problems_of_each_task_that_the_model_alone_does_not(smollm2):
    model, tokenizer = smollm2
    problems = [problem for task in TASKS for problem in make_problems(task, 2, SEED)]
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )

    def solved(model, most):
        output = model.generate(
            **inputs,
            **cache_kwarg(ReasonAllocCache(model.config, budget=None)),
            max_new_tokens=most,
            do_sample=False,
        )
        replies = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [check(*pair).correct for pair in zip(problems, replies, strict=True)]

    assert sum(solved(adapter.merged(copy.deepcopy(model), adapter.HERE), MAX_NEW_TOKENS)) >= 4
    assert not any(solved(model, 100))
