"""The profiles of the tiny reasoners: theirs, of the prompts they name, and measurable again."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.policies import ablation, policies
from examples.tiny_reasoner import FAMILIES, MODELS, TASKS, make_problems
from examples.tiny_reasoner.prompts import SEED
from hf_reasoncache import BudgetProfile
from hf_reasoncache.calibration.coverage import Coverage
from hf_reasoncache.calibration.prompts import Prompt
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.traces import TraceSettings, generate_traces
from hf_reasoncache.scorers import RKV

NAMES = {"coverage": 8, "sensitivity": 8, "tuned": 16}  # and problems of each task


def prompts(family: str, count: int) -> list[str]:
    batches = [make_problems(task, count, SEED, family) for task in TASKS]
    return [p.prompt for problems in zip(*batches, strict=True) for p in problems]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_of_its_model_and_of_its_prompts(family: str, name: str) -> None:
    profile = BudgetProfile.from_pretrained(MODELS[family] / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.check(AutoModelForCausalLM.from_pretrained(MODELS[family]))
    used = {Prompt(text, "").digest for text in prompts(family, NAMES[name])}
    held_out = profile.calibration.settings["tune"] or {"prompts": []}
    assert {*profile.calibration.prompts, *held_out["prompts"]} == used
    assert not set(profile.calibration.prompts) & set(held_out["prompts"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_measured_again_gives_the_figures_of_the_profile(family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        MODELS[family], dtype=torch.float32, attn_implementation="reasoncache"
    )
    tokenizer = AutoTokenizer.from_pretrained(MODELS[family])
    ids = Prompt(prompts(family, 1)[0], "").encode(tokenizer, chat=False)
    greedy = TraceSettings(max_new_tokens=512, temperature=0.0)
    trace = generate_traces(model, [ids], greedy)[0]
    coverage = BudgetProfile.from_pretrained(MODELS[family] / "coverage").statistics
    for name, found in Coverage(interval=32).measure(model, trace).items():
        torch.testing.assert_close(found, coverage[name][0], rtol=1e-3, atol=1e-4)
    shipped = BudgetProfile.from_pretrained(MODELS[family] / "sensitivity")
    budgets = tuple(shipped.calibration.settings["estimator"]["budgets"])
    again = Sensitivity(budgets=budgets[:2], eviction=Eviction(RKV(queries=16), 16, 16), every=1)
    found = again.measure(model, trace)["divergence"]
    torch.testing.assert_close(
        found, shipped.statistics["divergence"][0, :, :2], rtol=1e-2, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_arm_of_the_tables_can_be_made(family: str) -> None:
    assert len(ablation(family)) == 10
    assert {"profile"} <= set(policies(family)["R-KV + wave"])
