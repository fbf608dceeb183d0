"""One list of scorers: what is in it, what it makes, and who names it."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache, scorers
from hf_reasoncache.arguments import require_scorer
from hf_reasoncache.cli.options import Caches
from hf_reasoncache.evaluation import parse_spec
from hf_reasoncache.scorers import RKV, SCORERS, LagKV, Random, Scorer, SnapKV, make_scorer
from tests.support.models import build

START = Path(__file__).resolve().parents[2] / "docs" / "start.md"


def test_every_scorer_is_listed_and_exported() -> None:
    found = set()
    for module in pkgutil.iter_modules(scorers.__path__, f"{scorers.__name__}."):
        for each in vars(importlib.import_module(module.name)).values():
            if isinstance(each, type) and Scorer in each.__mro__[1:]:
                found.add(each)
    # Those that need something of the model cannot be made by their names.
    assert found == {*SCORERS.values(), scorers.TriAttention, scorers.ExpectedAttention}
    assert {each.__name__ for each in found} < set(scorers.__all__)


def test_documentation_names_every_scorer() -> None:
    (line,) = [each for each in START.read_text().splitlines() if "`scorer=" in each]
    for name, scorer in SCORERS.items():
        assert f"`{scorer.__name__}`" in line and f'`"{name}"`' in line


def test_help_names_every_scorer() -> None:
    (option,) = Caches.__metadata__
    assert f"a scorer: {', '.join(SCORERS)}." in option.help


def test_settings_of_a_run_reach_the_fields_that_follow_them() -> None:
    made = {name: make_scorer(name, window=16, seed=3) for name in SCORERS}
    assert made["snapkv"] == SnapKV(queries=16) and made["rkv"] == RKV(queries=16)
    assert made["lag-kv"] == LagKV(lag=16) and made["random"] == Random(seed=3)
    assert made["tova"].queries == 1 and made["h2o"] == SCORERS["h2o"]()


@pytest.mark.parametrize("name", SCORERS)
def test_caches_take_a_name(name: str) -> None:
    config = build("llama").config
    scorer = SCORERS[name]()
    for cache in (
        ReasonAllocCache(config, budget=64, scorer=name),
        SlidingWindowCompressCache(config, scorer=name),
    ):
        assert cache.layers[0].policy.scorer == scorer
    alone = parse_spec(name, window=8).make(config, 64, None, seed=0)
    assert alone.layers[0].policy.scorer == make_scorer(name, window=8, seed=0)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"scorer: expected one of random, .*, got 'snap'"):
        require_scorer("snap")
