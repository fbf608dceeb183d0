"""Drive a model with a cache: by `generate`, or forward by forward."""

import torch

from hf_reasoncache.releases import cache_kwarg
from tests.support.caches import make_cache
from tests.support.models import prompt

MODES = {
    "greedy": dict(do_sample=False),
    "three_samples": dict(do_sample=True, num_return_sequences=3),
    "four_beams": dict(do_sample=False, num_beams=4),
    "chunked_prefill": dict(do_sample=False, prefill_chunk_size=5),
    "prompt_lookup": dict(do_sample=False, prompt_lookup_num_tokens=4),
    "assisted": dict(do_sample=False),
}
"""Ways of generate."""
PROFILE = [1, 9, 4]
"""Layers that share the budget unequally."""


def new_cache(model, kind="reason_alloc", **changes):
    return make_cache(kind, model, **({"profile": PROFILE} | changes))


def tokens(model, cache, inputs=None, **arguments):
    arguments = dict(max_new_tokens=60, do_sample=False) | arguments
    return model.generate(**(inputs or prompt()), **cache_kwarg(cache), **arguments)


def mask_bytes(cache):
    """Bytes of the attention mask that a cache has kept; older releases give a needless one."""
    shown = cache.own_layers[0].shown
    return 0 if shown is None else shown.nbytes


class Driver:
    """Feeds a model forward by forward, with the mask and positions that generate would pass."""

    def __init__(self, model, cache, mask):
        self.model, self.cache, self.mask, self.seen = model, cache, mask, 0

    def __call__(self, ids):
        self.seen += ids.shape[1]
        missing = self.seen - self.mask.shape[1]
        if missing > 0:
            self.mask = torch.nn.functional.pad(self.mask, (0, missing), value=1)
        mask = self.mask[:, : self.seen]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            return self.model(
                ids, attention_mask=mask, position_ids=positions, **cache_kwarg(self.cache)
            ).logits

    def greedy(self, logits, steps):
        """Feed the best token `steps` times; returns all logits `[B, steps, V]`."""
        found = []
        for _ in range(steps):
            logits = self(logits[:, -1:].argmax(-1))
            found.append(logits)
        return torch.cat(found, dim=1)

    def rows(self, rows):
        """Keep other rows; the caller has told the cache."""
        self.mask = self.mask[rows]
        return self


def start(model, inputs=None, **changes):
    inputs = inputs or prompt()
    driver = Driver(model, new_cache(model, **changes), inputs["attention_mask"])
    return driver, driver(inputs["input_ids"])


def now_held(cache, layer):
    return cache.layers[layer].store.pool.held().lists()
