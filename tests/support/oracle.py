"""An independent oracle for caches that evict: one full forward that may not see what was not held.

The recorder drives a model forward by forward and writes down, for every query, which keys its
layer and head held at that moment. The oracle then runs all tokens at once, without any cache,
under exactly those masks. It shares no code with the package: attention is written out, and the
tokens are never evicted, only hidden.
"""

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from hf_reasoncache.releases import cache_kwarg


class Recorder:
    """Runs a model with a cache and remembers what every query saw.

    `stock` makes a cache that holds what is held, for the oracle; by default that is what comes.
    """

    def __init__(self, model, cache, padding_mask, stock=None):
        self.model, self.cache, self.stock = model, cache, stock
        self.padding = padding_mask
        self.ids = torch.zeros(padding_mask.shape[0], 0, dtype=torch.long)
        self.visible = {}
        self.logits = []
        # Columns `[B, T]` that the mask hides from now on, without moving any position.
        self.hidden = torch.zeros(1, 0, dtype=torch.bool)

    def forward(self, ids):
        """Feed new tokens `[B, T]`; returns the logits of the last one."""
        begin, end = self.ids.shape[1], self.ids.shape[1] + ids.shape[1]
        self.ids = torch.cat([self.ids, ids], dim=1)
        new = self.ids.shape[1] - self.padding.shape[1]
        if new > 0:
            self.padding = pad(self.padding, (0, new), value=1)
        mask = self.padding[:, :end]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, begin:end]
        with torch.no_grad():
            out = self.model(
                input_ids=ids,
                attention_mask=mask * ~pad(self.hidden, (0, end - self.hidden.shape[1])),
                position_ids=positions,
                **cache_kwarg(self.cache),
                use_cache=True,
            )
        self.logits.append(out.logits)
        for layer in range(self.model.config.num_hidden_layers):
            self._see(layer, begin, end)
        return out.logits[:, -1]

    def _see(self, layer, begin, end):
        config = self.model.config
        # Of latents there is one for all heads.
        heads = 1 if getattr(config, "kv_lora_rank", None) else config.num_key_value_heads
        batch = self.ids.shape[0]
        causal = torch.ones(end, end, dtype=torch.bool).tril()
        kind = (getattr(config, "layer_types", None) or ["full_attention"] * 99)[layer]
        if kind == "full_attention":
            rows = torch.zeros(batch, heads, end, dtype=torch.bool)
            for b, row in enumerate(self.cache.held_positions(layer)):
                for h, held in enumerate(row):
                    rows[b, h, held] = True
            new = rows[:, :, None] & causal[begin:end]
        else:
            window = torch.ones(end, end, dtype=torch.bool).triu(1 - config.sliding_window)
            new = (causal & window)[begin:end] & self.padding[:, None, None, :end].bool()
            new = new.expand(batch, heads, end - begin, end)
        old = self.visible.get(layer, torch.zeros(batch, heads, 0, 0, dtype=torch.bool))
        old = pad(old, (0, end - old.shape[-1]))
        self.visible[layer] = torch.cat([old, new], dim=2)

    def check(self, tolerance=1e-4):
        """Compare all logits of real tokens with the oracle; returns the largest difference."""
        stock = None if self.stock is None else self.stock()
        first = self.logits[0].shape[1]
        expected = oracle_logits(self.model, self.ids, self.padding, self.visible, stock, first)
        real = self.padding[:, : self.ids.shape[1]].bool()
        difference = (torch.cat(self.logits, dim=1) - expected)[real].abs().max().item()
        assert difference < tolerance, f"logits differ from the oracle by {difference}"
        return difference


def oracle_logits(model, ids, padding, visible, stock=None, first=0):
    """Logits of one full forward in which layer `l` may see `visible[l][b, h, query, key]` only.

    With a stock cache the `first` columns come in a forward of their own: only later ones attend to
    what the cache holds instead of what the model makes.
    """

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        batch, heads, steps, _ = query.shape
        end, group = key.shape[2], heads // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        seen = visible[module.layer_idx][:, :, end - steps : end, :end]
        seen = seen.repeat_interleave(heads // seen.shape[1], 1)
        logits = (query @ key.transpose(-1, -2)).double() * scaling
        logits = logits.masked_fill(~seen, -1e30)
        if kwargs.get("s_aux") is not None:
            sinks = kwargs["s_aux"].double().view(1, -1, 1, 1).expand(batch, -1, steps, 1)
            weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        return (weights.to(value.dtype) @ value).transpose(1, 2), None

    AttentionInterface.register("eviction_oracle", attention)
    AttentionMaskInterface.register("eviction_oracle", lambda **_: None)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eviction_oracle")
    positions = (padding.cumsum(-1) - 1).clamp_min(0)[:, : ids.shape[1]]
    parts = [slice(None)] if stock is None else [slice(first), slice(first, None)]
    try:
        with torch.no_grad():
            found = [
                model(
                    input_ids=ids[:, part],
                    position_ids=positions[:, part],
                    use_cache=stock is not None,
                    **cache_kwarg(stock),
                ).logits
                for part in parts
            ]
        return torch.cat(found, dim=1)
    finally:
        model.set_attn_implementation(implementation)
