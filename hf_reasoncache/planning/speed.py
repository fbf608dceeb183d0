"""How fast a step can be at best: bytes over bandwidth, or operations over their peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PretrainedConfig

from hf_reasoncache.geometry import AttentionWork
from hf_reasoncache.planning.devices import Device
from hf_reasoncache.planning.model import ModelSize
from hf_reasoncache.planning.rows import layer_rows


@dataclass(frozen=True)
class RowWork:
    """What one decoding step does for one row besides the weights.

    Attributes
    ----------
    own, shared : float
        Bytes of keys and values that move: for the row itself, and once for all branches of its
        prompt.
    flops : float
        Operations of its attention, to shared tokens too.
    """

    own: float
    shared: float
    flops: float

    @staticmethod
    def of(
        cache: Cache,
        config: PretrainedConfig,
        *,
        prompt: int,
        generated: int,
        dtype: torch.dtype,
    ) -> RowWork:
        """Compute it for a row in a new cache; parameters as of `row_bytes`.

        Attention reads the keys and values it attends to, once. `DynamicCache` and the
        sliding-window layers of transformers also copy all of them at every step, a read and a
        write more. Where it holds latents, they are expanded at every step, which is another write
        and read.
        """
        decoder = config.get_text_config(decoder=True)
        layers = layer_rows(cache, config, prompt=prompt, generated=generated, dtype=dtype)
        own = shared = flops = 0.0
        for index, layer in enumerate(layers):
            own += layer.token * layer.tokens * (3 if layer.concatenates else 1)
            shared += layer.token * layer.shared_tokens
            each = AttentionWork.of(decoder, index, absorbed=not layer.concatenates)
            own += 2 * each.expanded * dtype.itemsize * layer.tokens
            flops += (each.pair + each.expansion) * (layer.tokens + layer.shared_tokens)
        return RowWork(own, shared, flops)


def step_seconds(
    size: ModelSize,
    device: Device,
    work: Sequence[RowWork],
    branches: int = 1,
    alike: int = 1,
) -> float:
    """Least time of one decoding step.

    Parameters
    ----------
    size : ModelSize
    device : Device
    work : sequence of RowWork
        One for each prompt of the batch.
    branches : int
        Rows of each prompt.
    alike : int
        Prompts like each of these.
    """
    rows = alike * branches * len(work)
    moved = size.read_bytes(rows) + alike * sum(each.shared + branches * each.own for each in work)
    flops = 2 * size.active * rows + alike * branches * sum(each.flops for each in work)
    return max(moved / device.bandwidth, flops / device.flops)


def prompt_seconds(
    size: ModelSize, device: Device, config: PretrainedConfig, prompt: int, rows: int = 1
) -> float:
    """Least time of reading prompts of so many tokens in so many rows at once.

    Attention is counted where it looks, back to the beginning or through the sliding window.
    """
    decoder = config.get_text_config(decoder=True)
    pairs = 0.0
    for index, layer in enumerate(DynamicCache(config=config).layers):
        window = min(prompt, getattr(layer, "sliding_window", None) or prompt)
        pair = AttentionWork.of(decoder, index, absorbed=False).pair
        pairs += pair * (window * prompt - window * (window - 1) / 2)
    flops = rows * (2 * size.active * prompt + pairs)
    return max(size.read_bytes(rows * prompt) / device.bandwidth, flops / device.flops)
