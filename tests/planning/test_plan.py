from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache import ReasonAllocCache, SharedBranchCache
from hf_reasoncache.planning import DEVICES, CachePlan, ModelSize, Setting, step_seconds
from hf_reasoncache.planning.speed import RowWork, prompt_seconds
from tests.support.models import llama_8b

CONFIG = llama_8b()
SIZE = ModelSize.of(CONFIG, torch.bfloat16, name="8B")
SETTING = Setting(CONFIG, SIZE, DEVICES["H100-SXM"], prompt=256, context=8192, reserve=4 * 10**9)


def plan(cache, branches: int = 1, setting: Setting = SETTING) -> CachePlan:
    return CachePlan(setting, "", cache, branches)


CACHES = {
    "full": lambda: DynamicCache(config=CONFIG),
    "budget": lambda: ReasonAllocCache(CONFIG, budget=1024),
    "shared": lambda: SharedBranchCache(CONFIG, suffix=ReasonAllocCache.policy(budget=1024)),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("branches", [1, 6])
def test_the_most_rows_that_fit(kind: str, branches: int) -> None:
    found = plan(CACHES[kind](), branches)

    def needed(prompts: int) -> int:
        read = prompts if kind == "shared" else prompts * branches
        activations = SIZE.activation_bytes(read * 256, prompts * branches)
        return prompts * found.row.most(branches) + activations

    assert found.prompts > 0 and found.rows == found.prompts * branches
    assert needed(found.prompts) <= SETTING.room < needed(found.prompts + 1)


def test_rows_of_a_budget_and_of_branches() -> None:
    full, budget = plan(CACHES["full"]()), plan(CACHES["budget"]())
    shared = plan(CACHES["shared"](), 8)
    assert full.rows < budget.rows < shared.rows
    assert full.bytes_per_row == 8191 * 131072
    assert shared.bytes_per_row < budget.bytes_per_row < full.bytes_per_row


def test_too_many_rows_have_no_speed() -> None:
    found = plan(CACHES["full"](), 2)
    assert found.tokens_per_second(found.rows + 2) is None
    assert found.tokens_per_second(3) is None
    assert found.mean_tokens_per_second(0) is None
    nothing = plan(CACHES["full"](), 1000)
    assert nothing.rows == 0 and nothing.mean_tokens_per_second(nothing.rows) is None


def test_the_mean_is_over_every_step() -> None:
    """32 lengths stand for 300 steps."""
    here = replace(SETTING, context=556)
    for kind in ("full", "budget"):
        found = plan(CACHES[kind](), setting=here)
        seconds = prompt_seconds(SIZE, here.device, CONFIG, 256, 4)
        for step in range(300):
            work = RowWork.of(
                CACHES[kind](), CONFIG, prompt=256, generated=step + 1, dtype=torch.bfloat16
            )
            seconds += step_seconds(SIZE, here.device, [work] * 4)
        assert found.mean_tokens_per_second(4) == pytest.approx(1200 / seconds, rel=1e-3)


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"expected more than 20.06 GB .* got 16.00 GB; take a"):
        replace(SETTING, device=replace(SETTING.device, memory=16 * 10**9))
    with pytest.raises(ValueError, match=r"prompt: expected from 1 to 199 tokens .* got 200"):
        replace(SETTING, prompt=200, context=200)
