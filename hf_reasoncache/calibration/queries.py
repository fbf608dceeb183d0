"""Statistics of a model's queries for the scorer TriAttention: measured, kept, read and written.

A profile keeps them among its statistics. The official file of TriAttention (`.pt`), which other
engines read, is read and written too.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.estimate import Record
from hf_reasoncache.calibration.replay import replay
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry, rotary_frequencies
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.messages import shown
from hf_reasoncache.observers import Observer
from hf_reasoncache.observers.base import Observed
from hf_reasoncache.outputs import naming
from hf_reasoncache.profiles.profile import BudgetProfile
from hf_reasoncache.scorers.tri_attention import QueryStatistics
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.version import __version__

MEAN, NORM = "query_mean", "query_norm"
"""Names of the statistics in a profile."""

LARGEST_FILE = 64 * 2**20
_CHUNK = 512


@torch.inference_mode()
def measure_queries(model: PreTrainedModel, trace: Trace) -> Record:
    """Read a trace with the full cache, and average its queries before RoPE.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention.
    trace : Trace

    Returns
    -------
    dict of str to Tensor
        `MEAN` `[L, H_q, D]` and `NORM` `[L, H_q, D / 2]`, float32, see `QueryStatistics`.

    Raises
    ------
    ValueError
        If the model's rotary embedding is not one that turns halves by fixed angles.
    """
    frequencies = require_rotation(model)
    layers: list[_QuerySums] = []

    def make_layer(index: int, rank: int, count: int) -> CacheLayer:
        layers.append(_QuerySums(frequencies))
        return CacheLayer(index, observers=layers[-1:])

    cache = ReasonCache(model.config, make_layer)
    for _ in replay(model, cache, trace, edges=(), longest=_CHUNK):
        pass
    return {
        MEAN: torch.stack([each.mean / each.count for each in layers]).float().cpu(),
        NORM: torch.stack([each.norm / each.count for each in layers]).float().cpu(),
    }


def query_statistics(
    statistics: Mapping[str, torch.Tensor], config: PretrainedConfig
) -> QueryStatistics:
    """Take the statistics of queries from those of a profile, the mean over its prompts.

    Parameters
    ----------
    statistics : Mapping of str to Tensor
        `BudgetProfile.statistics`.
    config : PretrainedConfig
        Of the model that the profile was calibrated on.

    Raises
    ------
    ValueError
        If the profile has none, or they are of another geometry.
    """
    if MEAN not in statistics or NORM not in statistics:
        raise ValueError(
            f"profile: expected the statistics {MEAN} and {NORM}, got {shown(sorted(statistics))}; "
            "calibrate with queries (hf-reasoncache calibrate --tri-attention)."
        )
    mean, norm = (statistics[name].double().mean(0) for name in (MEAN, NORM))
    return _grouped(mean, norm, config)


def load_queries(name: str, config: PretrainedConfig) -> QueryStatistics:
    """Read statistics of queries from an official file (`.pt`) or a profile.

    Parameters
    ----------
    name : str
        The file; or a profile's directory, name or repository.
    config : PretrainedConfig
        Of the model.

    Raises
    ------
    ValueError, OSError
        As `read_official`, or as `BudgetProfile.from_pretrained` and `query_statistics`.
    """
    if name.endswith(".pt"):
        return read_official(Path(name), config)
    profile = BudgetProfile.from_pretrained(name)
    profile.check_config(config)
    return query_statistics(profile.statistics, config)


def read_official(path: Path, config: PretrainedConfig) -> QueryStatistics:
    """Read the file of an official calibration of TriAttention; nothing in it is executed.

    Parameters
    ----------
    path : Path
        What `torch.save` wrote: tensors, numbers and texts (`weights_only`), `LARGEST_FILE` bytes
        at most.
    config : PretrainedConfig
        Of the model.

    Raises
    ------
    ValueError
        If it is larger, holds anything else, turns pairs in another style than halves, or lacks a
        head of a full-attention layer.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path}: expected at most {LARGEST_FILE:,} bytes, got more.")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected tensors, numbers and texts that torch has saved, got: "
            f"{shown(error, 120)}."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), dict) for name in ("metadata", "stats")
    ):
        raise ValueError(f"{path}: expected 'metadata' and 'stats', got another file.")
    style = content["metadata"].get("rope_style", "half")
    if style != "half":
        raise ValueError(f"{path}: expected rope_style 'half', got {shown(style)}.")
    geometry, heads = Geometry.of(config), _query_heads(config)
    half = geometry.head_size // 2
    means, norms = [], []
    for layer in geometry.full_attention_layers:
        for head in range(heads):
            entry = content["stats"].get(f"layer{layer:02d}_head{head:02d}")
            parts = [_part(path, entry, name, layer, head, half) for name in _PARTS]
            means.append(torch.cat(parts[:2]))
            norms.append(parts[2])
    shape = (len(geometry.full_attention_layers), heads, -1)
    return _grouped(torch.stack(means).view(shape), torch.stack(norms).view(shape), config)


def write_official(path: Path, statistics: QueryStatistics, config: PretrainedConfig) -> None:
    """Write statistics as an official calibration of TriAttention has them.

    Parameters
    ----------
    path : Path
    statistics : QueryStatistics
    config : PretrainedConfig
        Of the model.
    """
    decoder = config.get_text_config(decoder=True)
    means, norms = (each.float().cpu().flatten(1, 2) for each in (statistics.mean, statistics.norm))
    stats, heads = {}, []
    for place, layer in enumerate(statistics.layers):
        for head, (mean, norm) in enumerate(zip(means[place], norms[place], strict=True)):
            real, imaginary = mean.chunk(2)
            # Copies: a view would be saved with all that it is part of.
            values = (real.clone(), imaginary.clone(), norm.clone())
            stats[f"layer{layer:02d}_head{head:02d}"] = dict(zip(_PARTS, values, strict=True))
            heads.append([layer, head])
    metadata: dict[str, Any] = {
        "created_by": f"hf-reasoncache {__version__}",
        "sampled_heads": heads,
        "head_dim": statistics.mean.shape[-1],
        "num_attention_heads": means.shape[1],
        "num_key_value_heads": statistics.mean.shape[1],
        "num_layers": decoder.num_hidden_layers,
        "rope_style": "half",
        "rope_type": "default",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "use_chat_template": False,
        "prompt_template": "",
        "system_prompt": "",
    }
    metadata |= {
        name: value
        for name, value in (getattr(decoder, "rope_parameters", None) or {}).items()
        if isinstance(value, str | int | float)
    }
    with naming(path):
        torch.save({"metadata": metadata, "stats": stats}, path)


_PARTS = ("q_mean_real", "q_mean_imag", "q_abs_mean")


def require_rotation(model: PreTrainedModel) -> torch.Tensor:
    """Return the angle per position of each pair, float64 ``[D / 2]``.

    Raises
    ------
    ValueError
        Unless the model turns the halves of its queries by position times these.
    """
    frequencies = torch.tensor(rotary_frequencies(model.config), dtype=torch.float64)
    name = type(model).__name__
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or apply is None or isinstance(embedding.rope_type, dict):
        raise ValueError(
            f"TriAttention: expected a model with one rotary embedding for all layers, got {name}."
        )
    size, at = 2 * len(frequencies), torch.tensor([[0, 1, 77]], device=model.device)
    states = torch.randn(1, 1, 3, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    turned, _ = apply(states, states, *embedding(states, at))
    back = _unrotated(turned, at[0], frequencies)
    if not torch.allclose(back, _pairs(states), atol=1e-3):
        raise ValueError(
            f"TriAttention: expected RoPE that turns the halves of a query by fixed angles, got "
            f"another kind in {name}."
        )
    return frequencies


class _QuerySums(Observer):
    """Sums up the queries of one layer before RoPE; rows without padding.

    Attributes
    ----------
    mean : Tensor[H_q, D]
    norm : Tensor[H_q, D / 2]
        Sums, float64.
    count : int
    """

    def __init__(self, frequencies: torch.Tensor) -> None:
        self.frequencies = frequencies
        self.reset()

    def reset(self) -> None:
        """See `Observer.reset`."""
        self.mean = self.norm = torch.zeros(1, 1, dtype=torch.float64)
        self.count = 0

    def attended(self, layer: Observed, new: NewTokens) -> None:
        """See `Observer.attended`."""
        at = torch.arange(layer.seen - new.q_len, layer.seen, device=new.query.device)
        pairs = _unrotated(new.query, at, self.frequencies)[0]
        total = pairs.sum(1)
        self.mean = self.mean.to(total.real) + torch.cat([total.real, total.imag], -1)
        self.norm = self.norm.to(total.real) + pairs.abs().sum(1)
        self.count += new.q_len


def _pairs(states: torch.Tensor) -> torch.Tensor:
    """Numbers ``[..., D]`` as complex ones ``[..., D / 2]``, in float64."""
    real, imaginary = states.double().chunk(2, -1)
    return torch.complex(real, imaginary)


def _unrotated(states: torch.Tensor, at: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Turn states ``[..., T, D]`` back from positions ``[T]``; complex, ``[..., T, D / 2]``."""
    angle = at[:, None].double() * frequencies.to(at.device)
    return _pairs(states) * torch.polar(torch.ones_like(angle), -angle)


def _query_heads(config: PretrainedConfig) -> int:
    heads: int = config.get_text_config(decoder=True).num_attention_heads
    return heads


def _grouped(mean: torch.Tensor, norm: torch.Tensor, config: PretrainedConfig) -> QueryStatistics:
    """Statistics ``[L, H_q, ...]`` of a model, by KV head."""
    geometry, heads = Geometry.of(config), _query_heads(config)
    wanted = (len(geometry.full_attention_layers), heads, geometry.head_size)
    if tuple(mean.shape) != wanted:
        raise ValueError(
            f"TriAttention: expected statistics {list(wanted)} (layers, query heads, head size), "
            f"got {list(mean.shape)}; calibrate this model."
        )
    by_kv_head = (geometry.kv_heads, heads // geometry.kv_heads)
    return QueryStatistics(
        layers=geometry.full_attention_layers,
        mean=mean.float().unflatten(1, by_kv_head),
        norm=norm.float().unflatten(1, by_kv_head),
        frequencies=torch.tensor(rotary_frequencies(config), dtype=torch.float64),
    )


def _part(path: Path, entry: object, name: str, layer: int, head: int, half: int) -> torch.Tensor:
    """One tensor of one head, checked."""
    found = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != (half,):
        got = list(found.shape) if isinstance(found, torch.Tensor) else found
        raise ValueError(
            f"{path}: expected {half} numbers {name} of layer {layer}, head {head}, got "
            f"{shown(got)}; TriAttention needs all heads of the full-attention layers."
        )
    numbers = found.double()
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{path}: expected finite numbers {name}, got NaN or infinity.")
    return numbers
