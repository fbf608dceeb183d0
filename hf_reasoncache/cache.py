"""What the caches share: layers from the model's config, and the report."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_reasoncache.geometry import latent_rank, supported_layers
from hf_reasoncache.graph_use import GraphMode, GraphUse, require_graph_mode
from hf_reasoncache.guards import GuardTensor, LogicalLength, OnFailure, foreign_attention
from hf_reasoncache.joint_evictions import JointEvictions
from hf_reasoncache.keep_rates import keep_rates
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.precision import as_attended
from hf_reasoncache.protection import Spans
from hf_reasoncache.report import CacheReport, LayerReport, storage_bytes
from hf_reasoncache.shards import TPMode, require_tp_mode
from hf_reasoncache.sliding import SlidingLayer


class ReasonCache(Cache):
    """A cache whose full-attention layers are ours and whose other layers are transformers' own.

    Parameters
    ----------
    config : PretrainedConfig
        The model's config.
    make_layer : Callable[[int, int, int], CacheLayer]
        Makes a layer from its index in the model, its rank among the full-attention layers, and
        their number.
    tensor_parallel : {"agree", "local"}
        Whether processes that hold other KV heads of a layer decide together with this one what is
        evicted, or each for its own heads.

    Attributes
    ----------
    own_layers : list of CacheLayer
        The full-attention layers, which are ours.
    graph_use : GraphUse
        How many decode steps came from a CUDA graph, and why others did not.

    Raises
    ------
    ValueError
        If the model is not supported.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        make_layer: Callable[[int, int, int], CacheLayer],
        *,
        tensor_parallel: TPMode = "agree",
    ) -> None:
        self.tp_mode = require_tp_mode(tensor_parallel)
        layers = supported_layers(config)
        ours = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        # Known once, because every forward asks for them several times.
        self.own_layers: list[CacheLayer] = []
        for layer_rank, index in enumerate(ours):
            layer = layers[index] = make_layer(index, layer_rank, len(ours))
            layer.tp_mode, layer.layers = self.tp_mode, len(layers)
            if rank := latent_rank(config.get_text_config(decoder=True), index):
                layer.hold_latents(rank)
            self.own_layers.append(layer)
        self._joint = JointEvictions(self.own_layers)
        self._foreign = [index for index in range(len(layers)) if index not in ours]
        for index in self._foreign:
            if type(layers[index]) is DynamicSlidingWindowLayer:
                layers[index] = SlidingLayer(layers[index].sliding_window)
        self._graphs: GraphMode = "auto"
        self.graph_use = GraphUse()
        # Kept unused for `reset`: some releases leave tokens behind in their own layers.
        self._blank = {index: copy.deepcopy(layers[index]) for index in self._foreign}
        self._latent = {layer.index: layer for layer in self.own_layers if layer.rank}
        # The layer whose latents the model expands at the moment.
        self._expanded: tuple[CacheLayer, OnFailure] | None = None
        self._hides = False  # whether the last mask hid columns that were seen
        super().__init__(layers=layers)

    @property
    def foreign_layers(self) -> list[Any]:
        """The layers that are transformers' own: sliding windows and the like."""
        return [self.layers[index] for index in self._foreign]

    @property
    def graphs(self) -> GraphMode:
        """Whether decode steps may come from CUDA graphs: "auto" (wherever they can) or "off".

        A model that was given to `enable_graphs` asks for it, and only such a model.
        """
        return self._graphs

    @graphs.setter
    def graphs(self, mode: GraphMode) -> None:
        self._graphs = require_graph_mode(mode)

    @classmethod
    def policy(cls, **settings: Any) -> CacheFactory:
        """Describe a cache of this class without a config, which is given later.

        `SharedBranchCache(suffix=...)` and `pipeline(cache=...)` take such a description.

        Parameters
        ----------
        **settings
            What the class takes besides the config.

        Raises
        ------
        TypeError
            If the class takes no such argument.
        """
        inspect.signature(cls).bind(None, **settings)
        return CacheFactory(cls, settings)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset for the mask of a layer, at the beginning of a forward.

        Raises
        ------
        ValueError
            If an earlier forward did not reach all layers.
        """
        self._check_complete()
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if isinstance(length, LogicalLength):
            length.cache = self
        return length, offset

    def see_mask(self, mask: torch.Tensor | None, q_len: int) -> torch.Tensor | None:
        """Attend from now on to the columns that a mask shows, as a forward with it would.

        What the mask hides leaves the pools and comes back if a later mask shows it again, unless
        it was evicted meanwhile: of a row that evicts, what is hidden goes first. Padding was never
        stored and cannot come back.

        Parameters
        ----------
        mask : Tensor[B, T] or None
            Not 0 for the columns to attend to, of those seen and of `q_len` new ones; None for all.
        q_len : int

        Returns
        -------
        BoolTensor[B, q_len] or None
            Which new tokens are real; None if all are.

        Raises
        ------
        ValueError
            If the mask has another number of columns.
        """
        ours = self.own_layers
        first, seen = ours[0], ours[0].seen
        if first.store.clock is not None:
            # Within a captured step, before which the mask has been seen.
            return None
        if mask is None:
            if self._hides:
                self._hide(torch.zeros(first.rows or 0, seen, dtype=torch.bool, device="cpu"))
            first.shown = None
            return None
        if mask.shape[-1] < seen + q_len:
            raise ValueError(
                f"attention_mask: expected {seen + q_len} columns, {seen} seen and {q_len} new, "
                f"got {mask.shape[-1]}; pass the mask of the whole sequence, and reset() the cache "
                "or use a new one for another prompt."
            )
        self._check_batch(mask.shape[0])
        mask = mask[:, : seen + q_len].bool()
        if first.shown is None:
            expected = torch.ones_like(mask)
        else:
            expected = torch.nn.functional.pad(first.shown[:, :seen], (0, q_len), value=True)
        # One question for both parts, as every question waits for the device.
        if torch.equal(mask, expected):
            first.shown = expected
            return None
        past, new = mask[:, :seen], mask[:, seen:]
        if not torch.equal(past, expected[:, :seen]):
            self._hide(~past)
        # Only now, as a store may refuse to hide. The caller may write to its own mask.
        first.shown = mask.clone()
        return None if bool(new.all()) else new

    def _hide(self, hidden: torch.Tensor) -> None:
        self._hides = bool(hidden.any())
        for layer in self.own_layers:
            layer.hide(hidden)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """Yield keys, values and size of a sliding window of each layer, as `DynamicCache` does."""
        for layer in self.layers:
            names = ("keys", "values", "_sliding_window_tensor")
            yield tuple(getattr(layer, name, None) for name in names)

    def reset(self) -> None:
        """Make the cache new: no token, no storage."""
        self._hides = False
        self._expanded = None
        self.graph_use = GraphUse()
        for layer in self.own_layers:
            layer.reset()
        for index, blank in self._blank.items():
            self.layers[index] = copy.deepcopy(blank)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce new tokens to a layer; see `transformers.Cache.update`.

        Raises
        ------
        ValueError
            If the batch or the dtype is another one than before, an earlier forward did not reach
            all layers, or the model has more layers than the cache.
        """
        if layer_idx == 0:
            self._check_forward(key_states)
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"expected a model of {len(self.layers)} layers, as in the config of this cache, "
                f"got layer {layer_idx}; reset() the cache, or make one from this model's config."
            )
        try:
            self._check_expanded()
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:
            self._forget_first()
            raise
        on_failure = partial(self._undo, layer_idx, key_states.shape[-2])
        if isinstance(keys, GuardTensor):
            keys.on_failure = on_failure
        elif layer_idx in self._latent:
            self._expanded = self._latent[layer_idx], on_failure
        return keys, values

    def announced(self, layer_idx: int | None) -> tuple[CacheLayer, OnFailure] | None:
        """Return the layer whose latents a model has expanded since `update`.

        Parameters
        ----------
        layer_idx : int or None
            Index of the layer whose attention runs now.

        Returns
        -------
        layer : CacheLayer
        on_failure : Callable[[Exception], None]
            What to do when the attention fails. None instead of both where that layer is none of
            ours, or holds no latents.
        """
        if self._expanded is None or self._expanded[0].index != layer_idx:
            return None
        found, self._expanded = self._expanded, None
        return found

    def _check_expanded(self) -> None:
        """Raise ValueError if the attention of an earlier layer did not come for its latents."""
        found, self._expanded = self._expanded, None
        if found is not None and found[0].incoming is not None:
            raise foreign_attention(
                "attended to the new tokens alone",
                "torch.compile traces the forward or a mask was prepared outside the model (pass "
                "attention_mask with shape [batch, tokens]), neither of which is supported; or a "
                "forward was interrupted (reset() the cache)",
            )

    def _forget_first(self) -> bool:
        """Make the cache new if its first forward is still going on."""
        first = not self.own_layers[-1].is_initialized
        if first:
            self.reset()
        return first

    def _undo(self, layer_idx: int, q_len: int, error: Exception) -> None:
        """Leave no trace of a forward that a layer has refused, where that is possible."""
        if not self._forget_first() and layer_idx == 0 and isinstance(error, ValueError):
            cast(CacheLayer, self.layers[0]).take_back(q_len)

    def _check_complete(self) -> None:
        self._check_expanded()
        first, last = self.own_layers[0], self.own_layers[-1]
        first.expect_idle()
        # Layers run in order.
        if first.seen != last.seen:
            raise ValueError(
                f"expected all layers to have seen the same tokens, got [{last.seen}, "
                f"{first.seen}]: a forward was interrupted, or has not ended (a cache serves one "
                "generation at a time). reset() the cache, or use a new one."
            )

    def _check_batch(self, batch: int) -> None:
        first = self.own_layers[0]
        if first.is_initialized and len(first.store.first) != batch:
            raise ValueError(
                f"expected a batch of {first.rows} rows as before, got {batch}; reset() the cache, "
                "or use a new one, for another batch."
            )

    def _check_forward(self, keys: torch.Tensor) -> None:
        self._check_complete()
        self._check_batch(keys.shape[0])
        first = self.own_layers[0]
        (keys,) = as_attended(keys)
        if first.is_initialized and first.dtype != keys.dtype:
            raise ValueError(
                f"expected keys and values in {first.dtype} as before, got {keys.dtype}; reset() "
                "the cache, or use a new one, for a model in another type."
            )
        if keys.shape[-2] == 1:
            self.evict_due()

    @property
    def evicts_together(self) -> bool:
        """Whether evictions are those of all layers at once, where the kernels run."""
        return bool(self._joint.layers)

    def evict_due(self) -> None:
        """Evict what is due before one more token, from all layers at once where that is possible.

        Layers do the rest themselves.
        """
        self._joint.run()

    def report(self, *, positions: bool = False) -> CacheReport:
        """Return what is held now, and what it took; of the KV heads that this process holds.

        Parameters
        ----------
        positions : bool
            Whether also which tokens are held, for `CacheReport.to_html`.
        """
        ours = self.own_layers
        return CacheReport(
            seen=self.get_seq_length(),
            layers=tuple(LayerReport.of(layer.index, layer, positions=positions) for layer in ours),
            other_bytes=sum(storage_bytes(layer) for layer in self.foreign_layers),
            shard=ours[0].shard.describe(ours[0].held().shape[1]),
            graphs=self._describe_graphs(),
        )

    def _describe_graphs(self) -> str | None:
        """Say what became of the decode steps; None before the first forward."""
        first, use = self.own_layers[0], self.graph_use
        if not first.is_initialized:
            return None
        if self._graphs == "off":
            return "off"
        if use != GraphUse():
            return str(use)
        if first.device.type != "cuda":
            return f"none on this device ({first.device.type})"
        return "none; enable_graphs(model) has decode steps recorded"

    def keep_rates(self, spans: Any) -> torch.Tensor:
        """Return how much of some spans of the prompt is still held.

        Parameters
        ----------
        spans : Spans, or token ranges
            See `hf_reasoncache.protection`; they need not be protected.

        Returns
        -------
        Tensor[L, B, S]
            For each full-attention layer, row and span, the share of its tokens that is held, on
            average over the KV heads that this process holds; NaN where a row has fewer spans.

        Raises
        ------
        ValueError
            If the spans are not valid or for another number of rows, or nothing is held yet.
        """
        chosen = Spans.of(spans)
        return torch.stack([keep_rates(layer, chosen) for layer in self.own_layers])

    def held_positions(self, layer_idx: int) -> list[list[list[int]]]:
        """Return the tokens that the last forward attended to in one layer.

        Parameters
        ----------
        layer_idx : int
            Index of a full-attention layer of the model.

        Returns
        -------
        list[list[list[int]]]
            For each row, for each KV head that this process holds, the sorted positions held:
            columns of the padded sequence as generate counts them. Padding is never listed.

        Raises
        ------
        ValueError
            If the layer is not one of ours.
        """
        ours = {layer.index: layer for layer in self.own_layers}
        if layer_idx not in ours:
            raise ValueError(
                f"held_positions: expected a full-attention layer of {list(ours)}, got {layer_idx}."
            )
        return ours[layer_idx].held_positions()


@dataclass(frozen=True)
class CacheFactory:
    """A cache but for its config, made by `policy` of its class; called with one, a new cache.

    Attributes
    ----------
    cache : type of ReasonCache
    settings : dict
        Arguments of that class; it checks them when it gets a config.
    """

    cache: type[ReasonCache]
    settings: dict[str, Any]

    def __call__(self, config: PretrainedConfig) -> ReasonCache:
        """Make a new cache for a model."""
        return self.cache(config, **self.settings)
