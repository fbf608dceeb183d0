"""Generations that must not depend on how many processes share the model."""

from dataclasses import replace

import torch
from transformers import set_seed

from hf_reasoncache import (
    Protect,
    ReasonAllocCache,
    SharedBranchCache,
    SlidingWindowCompressCache,
    branch_generate,
)
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.protection import Fair
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, Risk
from hf_reasoncache.scorers import H2O, Random

ALLOC = dict(budget=44, buffer=8, window=4, head_budgets=True)
KARA = dict(window=16, ratio=0.4, recent=4)
LOOSE = dict(protect=False)
FAIR = Protect(prompt=False, spans=[(2, 9)], fair=Fair(0.5, window=8))
SAMPLED = dict(do_sample=True, temperature=1.5)
DEMAND = (3.0, 1.0)


def inputs(rows=2, tokens=32):
    """Left-padded prompts of random digits and letters."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 90, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, : 5 * row], mask[row, : 5 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def alloc(**changes):
    return lambda model: often(ReasonAllocCache(model.config, **ALLOC | changes))


def share(**changes):
    settings = {"ratio": 0.6, "min_budget": 10, **ALLOC, **changes}
    del settings["budget"]
    return lambda model: often(ReasonAllocCache(model.config, **settings))


def kara(**changes):
    return lambda model: SlidingWindowCompressCache(model.config, **KARA | changes)


def branches(suffix=None):
    return lambda model: often(SharedBranchCache(model.config, suffix=suffix))


def often(cache):
    """Re-allocate heads every 12 tokens, not every 128."""
    for layer in cache.layers:
        if hasattr(getattr(layer, "policy", None), "head_interval"):
            layer.policy = replace(layer.policy, head_interval=12)
    return cache


def generate(make, rows=2, **arguments):
    """A case: tokens of a generation, and the cache afterwards."""

    def run(model):
        cache = make(model)
        set_seed(0)
        settings = dict(do_sample=False, max_new_tokens=36) | arguments
        out = model.generate(**inputs(rows), **cache_kwarg(cache), **settings)
        return out, cache

    return run


def chunked(make):
    """The prompt in chunks, then token by token, then a crop past all drafts, then more."""

    def run(model):
        cache, given = make(model), inputs(tokens=60)
        mask = torch.cat([given["attention_mask"], torch.ones(2, 100, dtype=torch.long)], 1)
        ids, found, seen = given["input_ids"], [], 0

        def feed(tokens):
            nonlocal seen
            seen += tokens.shape[1]
            place = (mask[:, :seen].cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            out = model(
                input_ids=tokens,
                attention_mask=mask[:, :seen],
                position_ids=place,
                **cache_kwarg(cache),
                use_cache=True,
            )
            found.append(out.logits[:, -1:].argmax(-1))
            return found[-1]

        with torch.no_grad():
            for first in range(0, 60, 25):
                token = feed(ids[:, first : first + 25])
            for _ in range(20):
                token = feed(token)
            cache.crop(-3)
            seen -= 3
            for _ in range(15):
                token = feed(token)
            feed(ids[:, :20])
            feed(token)
        return torch.cat(found, 1), cache

    return run


def branched(make):
    """Two prompts, three sampled branches each, the prompts read once."""

    def run(model):
        cache = make(model)
        set_seed(0)
        out = branch_generate(
            model,
            inputs(),
            num_branches=3,
            past_key_values=cache,
            max_new_tokens=30,
            **SAMPLED,
        )
        return out, cache

    return run


CASES = {
    # Nothing is evicted.
    "exact": generate(alloc(budget=None)),
    "exact kara": generate(kara(ratio=1.0)),
    "exact branches": branched(branches()),
    # Heads share by demand.
    "alloc": generate(alloc()),
    "alloc sampled": generate(alloc(), **SAMPLED),
    "alloc demand": generate(alloc(profile=DEMAND)),
    "alloc equal heads": generate(alloc(head_budgets=False)),
    "alloc share": generate(share()),
    "alloc share demand": generate(share(profile=DEMAND, head_budgets=False)),
    "alloc random": generate(alloc(scorer=Random(), **LOOSE)),
    "alloc mass": generate(alloc(scorer=H2O())),
    "alloc loose": chunked(alloc(**LOOSE)),
    "alloc protected": chunked(alloc(budget=80)),
    "alloc fair": generate(alloc(protect=FAIR)),
    "alloc shrink": generate(alloc(risk=0.02)),
    "alloc move": generate(alloc(risk=Risk(0.02, "move"))),
    "alloc drafts": generate(alloc(), rows=1, prompt_lookup_num_tokens=4),
    "alloc beams": generate(alloc(), num_beams=2, max_new_tokens=30),
    "alloc probes": generate(alloc(risk=Risk(probes=Probes(heads=0.5, interval=4)))),
    "kara": generate(kara()),
    "kara heads": generate(kara(head_budgets=True, **LOOSE)),
    "kara bound": generate(kara(head_budgets=True, max_budget=56), max_new_tokens=60),
    "kara move": generate(kara(risk=Risk(0.02, "move"), max_budget=56), **SAMPLED),
    "kara chunked": chunked(kara(head_budgets=True, profile=DEMAND, max_budget=60, **LOOSE)),
    "branches": branched(branches(ReasonAllocCache.policy(**ALLOC))),
    "branches kara": branched(branches(SlidingWindowCompressCache.policy(**KARA))),
}

LOCAL = {
    "alloc local": generate(alloc(tensor_parallel="local", **LOOSE), max_new_tokens=24),
    "alloc local random": generate(alloc(tensor_parallel="local", scorer=Random(), **LOOSE)),
}
"""Each process decides for its own heads."""
HYBRID = {"hybrid": generate(alloc(**LOOSE))}
"""With layers of transformers between ours: another model."""


def outcome(name, model):
    """What a case gives, as plain numbers; of the heads of this process."""
    tokens, cache = (CASES | LOCAL | HYBRID)[name](model)
    ours = [index for index, layer in enumerate(cache.layers) if isinstance(layer, CacheLayer)]
    report = cache.report()
    return {
        "tokens": tokens.tolist(),
        "held": [cache.held_positions(index) for index in ours],
        "shard": report.shard,
        "evictions": [layer.evictions for layer in report.layers],
        "evicted": [layer.evicted for layer in report.layers],
        "risk": [errors_of(layer.risk) for layer in report.layers],
        "probes": [errors_of(layer.probes) for layer in report.layers],
    }


def errors_of(log):
    """Largest error of each head, as a row of heads that each have one number."""
    return [[[x] for x in log.error.amax(0).tolist()] if log is not None and len(log) else []]
