"""The adapter against the real lm-evaluation-harness, on a local task."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, DynamicCache

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import ReasonAllocCache

lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

PROBLEMS = make_problems("walk", 3, DEVELOPMENT_SEEDS[600], "llama")


def make_task(output_type: str = "generate_until"):
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = [{"prompt": each.prompt, "answer": each.answer} for each in PROBLEMS]
    config = {
        "task": "walk",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
    }
    if output_type == "generate_until":
        config |= {
            "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 384, "do_sample": False},
            "filter_list": [
                {
                    "name": "answer",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"ANS (\d)"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [{"metric": "exact_match"}],
        }
    return ConfigurableTask(config=config)


def evaluate(make_cache, attention: str = "reasoncache", output_type: str = "generate_until"):
    from hf_reasoncache.evaluation.lm_harness import ReasonCacheLM

    model, _ = load(MODELS["llama"])
    model.set_attn_implementation(attention)
    tokenizer = AutoTokenizer.from_pretrained(MODELS["llama"])
    caches = []

    def remember(config):
        caches.append(make_cache(config))
        return caches[-1]

    lm = ReasonCacheLM(model, remember, tokenizer=tokenizer, batch_size=2, device="cpu")
    result = lm_eval.simple_evaluate(
        model=lm, tasks=[make_task(output_type)], bootstrap_iters=0, log_samples=True
    )
    answers = {
        sample["doc"]["prompt"]: sample["resps"][0][0] for sample in result["samples"]["walk"]
    }
    return result["results"]["walk"], answers, caches, lm


def test_an_exact_cache_gives_what_the_full_cache_gives() -> None:
    with pytest.warns(UserWarning, match="nothing was evicted"):
        ours, answers, caches, _ = evaluate(lambda config: ReasonAllocCache(config, budget=None))
    with pytest.warns(UserWarning, match="nothing was evicted"):
        full, wanted, _, _ = evaluate(lambda config: DynamicCache(config=config), "sdpa")
    assert answers == wanted
    assert ours["exact_match,answer"] == full["exact_match,answer"] == 1.0
    assert len(caches) == 2, "a new cache for each batch"


def test_a_small_budget_evicts_and_costs(recwarn: pytest.WarningsRecorder) -> None:
    found, _, _, lm = evaluate(
        lambda config: ReasonAllocCache(config, budget=40, buffer=16, window=16, protect=False)
    )
    assert found["exact_match,answer"] < 1.0
    assert lm.evicted > 0
    assert not [each for each in recwarn if "nothing was evicted" in str(each.message)]


def test_likelihoods_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a task that generates"):
        evaluate(lambda config: ReasonAllocCache(config, budget=64), output_type="loglikelihood")
