"""The model, the sizes and the cache contents that all benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.graphs import Recorder
from hf_reasoncache.report import storage_bytes
from hf_reasoncache.storage.new_tokens import NewTokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

COMMON = 1.5
"""Length of the direction that a head's keys share, in standard deviations of what differs: a mean
cosine of 0.7 between two keys. Keys of trained models share a large component too; without one,
R-KV's search for a similar key would run into its worst case."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the random Llama; a small vocabulary keeps the output layer from dominating."""

    layers: int = 16
    hidden: int = 512
    intermediate: int = 1536
    query_heads: int = 32
    kv_heads: int = 8
    head_size: int = 64
    vocabulary: int = 512

    def __str__(self) -> str:
        return (
            f"random Llama: {self.layers} layers, hidden {self.hidden}, {self.query_heads} query "
            f"and {self.kv_heads} KV heads of size\n{self.head_size}"
        )

    @property
    def widths(self) -> tuple[int, int, int]:
        """Heads of what a model gives a cache, and numbers of its two parts."""
        return self.kv_heads, self.head_size, self.head_size

    @property
    def scaling(self) -> float:
        """Factor on the logits."""
        return self.head_size**-0.5

    def held(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that a layer of ours holds of these two parts."""
        return keys, values

    def build(self, seed: int) -> PreTrainedModel:
        """Return a random model; the same seed gives the same weights."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            max_position_embeddings=1 << 20,
        )
        return LlamaForCausalLM(config).eval()

    def kv_bytes(self, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of `tokens` tokens in one layer."""
        return 2 * batch * self.kv_heads * tokens * self.head_size * dtype.itemsize


@dataclass(frozen=True)
class Work:
    """One configuration: what the caches hold, and how many steps are timed.

    Attributes
    ----------
    context : int
        Tokens in the cache before the timed steps.
    batch : int
    dtype : dtype
    budget, buffer : int
        Of the compressed cache.
    steps : int
        Timed steps per round of a cache of `context` tokens; one of `budget` tokens takes `buffer`,
        so that each round pays for exactly one eviction.
    seed : int
    shape : Shape
    device : str
        Where the tokens are drawn.
    recorder : Callable or None
        Makes what records the steps of decoders with graphs; None where nothing can.
    """

    context: int
    batch: int
    dtype: torch.dtype
    budget: int
    buffer: int
    steps: int
    seed: int
    shape: Shape = field(default_factory=Shape)
    device: str = "cpu"
    recorder: Callable[[], Recorder] | None = None

    def random_kv(self, tokens: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield index, keys and values `[B, H_kv, tokens, D]` of every layer."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        heads, key_size, value_size = self.shape.widths
        size = (self.batch, heads, tokens, key_size)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        for layer in range(self.shape.layers):
            common = draw(size[0], size[1], 1, size[3])
            keys, values = draw(*size).add_(common, alpha=COMMON), draw(*size[:3], value_size)
            yield layer, keys.to(self.dtype), values.to(self.dtype)

    def fill(self, cache: Cache, tokens: int, valid: torch.Tensor | None = None) -> None:
        """Put random tokens into a cache, as if a prompt had been read.

        Parameters
        ----------
        cache : Cache
        tokens : int
        valid : BoolTensor[B, tokens], optional
            False for padding; for caches of ours only.

        Notes
        -----

        A prompt of 8k tokens takes the model minutes on a CPU. What a step costs depends on how
        many tokens are held, not on which, so the layers get them directly. A layer of ours takes
        its first tokens from the attention function, hence the second call there; a budget cuts
        them as it cuts a prompt.
        """
        for index, keys, values in self.random_kv(tokens):
            cache.update(keys, values, index)
            if isinstance(cache, ReasonCache):
                layer = cache.layers[index]
                held = self.shape.held(*layer.take_incoming())
                size = (self.batch, self.shape.query_heads, 1, held[0].shape[-1])
                query = torch.randn(size, dtype=self.dtype, device=self.device)
                settings = {"scaling": self.shape.scaling}
                layer.store_first(
                    NewTokens(query.expand(-1, -1, tokens, -1), *held, valid, settings)
                )


def held_bytes(cache: Cache | None) -> int:
    """Bytes of everything a cache holds, measured on the storages."""
    if cache is None:
        return 0
    if isinstance(cache, ReasonCache):
        return cache.report().total_bytes
    return sum(storage_bytes(layer) for layer in cache.layers)
