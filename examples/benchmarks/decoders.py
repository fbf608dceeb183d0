"""What is compared: one class per way to decode, each able to take a few steps and to undo them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from examples.benchmarks.workload import Work
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.arguments import Storage
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import RKV, Scorer

WARM_UP_ROUNDS = 4
"""Evictions before the first timed one; `4 * buffer` new tokens fill the default budget."""


class NotBuiltError(Exception):
    """A decoder cannot run here; the message says why."""


class Decoder:
    """Decode with one cache: `DynamicCache` over the whole context unless a subclass differs.

    Attributes
    ----------
    name : str
    attention : str
        Implementation that the model must run.
    note : str
        What the table cannot show.
    """

    name = "DynamicCache + sdpa"
    attention = "sdpa"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        self.model, self.work = model, work
        self.forward: Callable[..., Any] = model
        self.cache = self._make_cache()
        self.note = ""
        self._generator = torch.Generator(work.device).manual_seed(work.seed)

    @property
    def steps(self) -> int:
        """Steps of one round."""
        return self.work.steps

    def _make_cache(self) -> Cache | None:
        cache = DynamicCache(config=self.model.config)
        self.work.fill(cache, self.work.context)
        return cache

    def round(self, clock: Callable[[], float]) -> Iterator[float]:
        """Take the steps of one round, yielding the seconds of each."""
        # Always new tokens: a text that repeats itself would be easy to compress.
        for token in self._draw(self.steps):
            # Other decoders may have run the model since.
            self.model.set_attn_implementation(self.attention)
            start = clock()
            self._step(token)
            yield clock() - start
        self._undo()

    def _draw(self, steps: int) -> torch.Tensor:
        size = (steps, self.work.batch, 1)
        return torch.randint(
            self.work.shape.vocabulary, size, generator=self._generator, device=self.work.device
        )

    def warm_up(self) -> None:
        """Take untimed steps until a round is like every other round."""
        list(self.round(time.perf_counter))

    def _step(self, token: torch.Tensor) -> None:
        self.forward(input_ids=token, **cache_kwarg(self.cache), use_cache=True)

    def _undo(self) -> None:
        if self.cache is not None:
            self.cache.crop(-self.steps)


class NoCache(Decoder):
    """The floor: the model on one token that attends to itself only."""

    name = "no cache (floor)"

    def _make_cache(self) -> None:
        return None

    def _step(self, token: torch.Tensor) -> None:
        self.forward(input_ids=token, use_cache=False)


class Compiled(Decoder):
    """A cache of static size under torch.compile."""

    name = "StaticCache + compile"
    mode = "default"

    def __init__(self, model: LlamaForCausalLM, work: Work, limit: float) -> None:
        if limit <= 0:
            raise NotBuiltError("left out by --compile-limit 0")
        super().__init__(model, work)
        model.set_attn_implementation(self.attention)
        torch._dynamo.reset()
        self.forward = torch.compile(model.forward, dynamic=False, mode=self.mode)
        start = time.perf_counter()
        try:
            with _time_limit(limit):
                for token in self._draw(2):
                    self._step(token)
        except Exception as error:
            # Whatever the compiler raises, the other decoders run; the table quotes it.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise NotBuiltError(f"{reason[0][:200]} (limit {limit:.0f} s)") from error
        self.note = f"compiled in {time.perf_counter() - start:.0f} s"
        self._take_back(2)

    def _make_cache(self) -> StaticCache:
        cache = StaticCache(self.model.config, max_cache_len=self.work.context + self.steps)
        self.work.fill(cache, self.work.context)
        return cache

    def _undo(self) -> None:
        self._take_back(self.steps)

    def _take_back(self, steps: int) -> None:
        # StaticCache has no crop. In place: the compiled code knows the tensor by its address.
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(steps)


class Uncompressed(Decoder):
    """Our cache without a budget: every token in place, attended to from the pool."""

    name = "ReasonAllocCache, budget=None"
    attention = "reasoncache"

    def _make_cache(self) -> ReasonAllocCache:
        return self._pool(self.work.context)

    storage: Storage | None = None

    def _pool(self, tokens: int) -> ReasonAllocCache:
        cache = ReasonAllocCache(self.model.config, budget=None, storage=self.storage)
        self.work.fill(cache, tokens)
        return cache


class InCodes(Uncompressed):
    """Every token in 8 bits."""

    name = "ReasonAllocCache, storage=fp8"
    storage = "fp8"


class Holds(Uncompressed):
    """What the compressed cache would cost if evicting were free.

    It grows from `budget` to `budget + buffer` tokens like the compressed one, and is then put back
    at no cost.
    """

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        super().__init__(model, work)
        self.name = f"holds {work.budget}, never evicts"

    @property
    def steps(self) -> int:
        """As many as the compressed cache takes."""
        return self.work.buffer

    def _make_cache(self) -> ReasonAllocCache:
        return self._pool(self.work.budget)


class Compressed(Decoder):
    """Our cache with a budget and R-KV: one eviction per round, row and layer."""

    head_budgets = False

    attention = "reasoncache"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        super().__init__(model, work)
        self.name = f"ReasonAllocCache, budget={work.budget}"

    @property
    def steps(self) -> int:
        """From one eviction to the next."""
        return self.work.buffer

    def _make_cache(self) -> ReasonAllocCache:
        cache = ReasonAllocCache(
            self.model.config,
            budget=self.work.budget,
            buffer=self.work.buffer,
            scorer=self._scorer(),
            head_budgets=self.head_budgets,
            protect=False,
        )
        for layer in cache.layers:
            # With head budgets every eviction shares them out anew, as with the default buffer.
            layer.policy = replace(layer.policy, head_interval=self.work.buffer)
        self._fill(cache)
        return cache

    def _scorer(self) -> Scorer:
        return RKV()

    def _fill(self, cache: ReasonAllocCache) -> None:
        self.work.fill(cache, self.work.context)

    def warm_up(self) -> None:
        """Fill the buffer, after which every round starts with an eviction, and run some rounds.

        The tokens that the cache was filled with are like no model's: the heads disagree on how
        many of them to keep until its own have taken their place.
        """
        for _ in range(1 + WARM_UP_ROUNDS):
            list(super().round(time.perf_counter))

    def round(self, clock: Callable[[], float]) -> Iterator[float]:
        """See `Decoder.round`; checks that the evictions came at their true rate."""
        before = self.cache.report().evictions
        yield from super().round(clock)
        found = self.cache.report().evictions - before
        expected = self.work.shape.layers * self.work.batch
        if found != expected:
            raise RuntimeError(
                f"expected {expected} compactions in {self.steps} steps, got {found}; the time "
                "per token would not be that of a long generation."
            )

    def _undo(self) -> None:
        """Nothing: the cache stays between `budget` and `budget + buffer` tokens by itself."""


def build_decoders(
    model: LlamaForCausalLM, work: Work, compile_limit: float
) -> tuple[list[Decoder], dict[str, tuple[str, str]]]:
    """Return the decoders that run here, warmed up; of the others name, class and reason."""
    decoders: list[Decoder] = []
    missing: dict[str, tuple[str, str]] = {}
    for kind in (Decoder, Compiled, Uncompressed, InCodes, Compressed, Holds, NoCache):
        try:
            decoder = kind(model, work, compile_limit) if kind is Compiled else kind(model, work)
        except NotBuiltError as error:
            missing[kind.name] = (kind.__name__, str(error))
            continue
        decoder.warm_up()
        decoders.append(decoder)
    return decoders, missing


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def expire(*_: Any) -> None:
        raise TimeoutError("torch.compile took too long")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
