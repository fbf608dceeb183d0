"""The ways to decode that `gpu_decode` compares, by the names of its `--decoders`."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import LlamaForCausalLM

from examples.benchmarks.decoders import (
    Compiled,
    Compressed,
    Decoder,
    NoCache,
    NotBuiltError,
    Uncompressed,
)
from examples.benchmarks.workload import Work
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.graphs import DecodeGraphs, Recorder
from hf_reasoncache.scorers import RKV
from hf_reasoncache.scorers.base import HeldTokens


class Flash(Decoder):
    """`DynamicCache` with the flash attention 2 package."""

    name = "DynamicCache + flash 2"
    attention = "flash_attention_2"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        if importlib.util.find_spec("flash_attn") is None:
            raise NotBuiltError("flash_attn is not installed")
        super().__init__(model, work)


class Static(Compiled):
    """`StaticCache` compiled as transformers compiles it for `generate`."""

    mode = "reduce-overhead"


def _recorder(work: Work) -> Recorder:
    if work.recorder is None:
        raise NotBuiltError("CUDA graphs need a GPU")
    return work.recorder()


class UncompressedGraphs(Uncompressed):
    """Our cache without a budget, steps from CUDA graphs."""

    name = "budget=None, graphs"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        recorder = _recorder(work)
        super().__init__(model, work)
        self.forward = DecodeGraphs(model, self.cache, recorder)


class CompressedGraphs(Compressed):
    """Our cache with a budget, steps from CUDA graphs between evictions."""

    name = "with a budget, graphs"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        recorder = _recorder(work)
        super().__init__(model, work)
        self.name = f"budget={work.budget}, graphs"
        self.forward = DecodeGraphs(model, self.cache, recorder)


@dataclass(frozen=True)
class Moving(RKV):
    """R-KV that prefers another head at each eviction.

    Attributes
    ----------
    asked : Counter
        Evictions so far, by layer.
    """

    asked: Counter[int] = field(default_factory=Counter)

    def score(self, held: HeldTokens) -> torch.Tensor:
        """See `RKV.score`."""
        scores = super().score(held)
        scores[:, self.asked[held.layer] % scores.shape[1]] += 1.0
        self.asked[held.layer] += 1
        return scores


class MovingGraphs(CompressedGraphs):
    """Heads whose budgets change at every eviction, which moves the pool and ends the graph.

    The heads of random weights are alike and mostly keep theirs, which is the other extreme.
    """

    name = "moving heads, graphs"
    head_budgets = True

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        super().__init__(model, work)
        self.name = f"{self.name}, moving"

    def _scorer(self) -> Moving:
        return Moving()


class UnequalGraphs(CompressedGraphs):
    """Rows whose prompts differ in length, so that each evicts at a step of its own.

    The shortest prompt fills the budget, and the next ones a part of the buffer besides.
    """

    name = "unequal prompts, graphs"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        if work.batch < 2:
            raise NotBuiltError("one row only")
        super().__init__(model, work)
        self.name = f"{self.name}, unequal"

    def _fill(self, cache: ReasonAllocCache) -> None:
        work = self.work
        tokens = work.budget + work.buffer
        row = torch.arange(work.batch, device=work.device)[:, None]
        padding = work.buffer - row * work.buffer // work.batch
        valid = torch.arange(tokens, device=work.device) >= padding
        work.fill(cache, tokens, valid)


class NoCacheGraphs(NoCache):
    """The floor from one CUDA graph: what the GPU needs, without the host's launches."""

    name = "no cache, graph (floor)"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        recorder = _recorder(work)
        super().__init__(model, work)
        model.set_attn_implementation(self.attention)
        self._token = self._draw(1)[0]
        # A whole mask, which transformers takes as it is: to make one, it reads the device.
        size = (work.batch, 1, 1, 1)
        mask = torch.zeros(size, dtype=work.dtype, device=work.device)

        def step() -> None:
            model(input_ids=self._token, attention_mask=mask, use_cache=False)

        step()
        _, self._replay = recorder.record(step)

    def _step(self, token: torch.Tensor) -> None:
        self._token.copy_(token)
        self._replay()


BASELINES: dict[str, type[Decoder]] = {"dynamic": Decoder, "flash": Flash, "static": Static}
OURS: dict[str, type[Decoder]] = {
    "exact-graphs": UncompressedGraphs,
    "budget": Compressed,
    "budget-graphs": CompressedGraphs,
    "moving-graphs": MovingGraphs,
    "unequal-graphs": UnequalGraphs,
}
FLOORS: dict[str, type[Decoder]] = {"floor": NoCache, "floor-graph": NoCacheGraphs}
DECODERS = BASELINES | OURS | FLOORS
