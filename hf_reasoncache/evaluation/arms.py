"""The caches of a run: what is tried, at which budgets, and how the command line writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, DynamicCache, PretrainedConfig

from hf_reasoncache.arguments import LARGEST
from hf_reasoncache.messages import shown
from hf_reasoncache.protection import Fair, Spans
from hf_reasoncache.reason_alloc import ReasonAllocCache
from hf_reasoncache.scorers import (
    H2O,
    RKV,
    TOVA,
    Bidirectional,
    KeyDiff,
    KeyNorm,
    LagKV,
    Random,
    SnapKV,
    StreamingLLM,
    ValueNorm,
)
from hf_reasoncache.scorers.base import Scorer
from hf_reasoncache.shared_branch import SharedBranchCache
from hf_reasoncache.sliding_window import SlidingWindowCompressCache

Budget = int | float
"""Tokens per KV head; below 1, the ratio of a `SlidingWindowCompressCache`."""

SCORERS: dict[str, Callable[[int, int], Scorer]] = {
    "random": lambda window, seed: Random(seed),
    "streaming-llm": lambda window, seed: StreamingLLM(),
    "key-norm": lambda window, seed: KeyNorm(),
    "value-norm": lambda window, seed: ValueNorm(),
    "key-diff": lambda window, seed: KeyDiff(),
    "lag-kv": lambda window, seed: LagKV(lag=window),
    "tova": lambda window, seed: TOVA(),
    "snapkv": lambda window, seed: SnapKV(queries=window),
    "h2o": lambda window, seed: H2O(),
    "rkv": lambda window, seed: RKV(queries=window),
    "bidirectional": lambda window, seed: Bidirectional(queries=window),
}
"""Makers of scorers from the window and the seed of a run."""

FULL, REASON_ALLOC, SLIDING_WINDOW = "full", "reason-alloc", "sliding-window"


@dataclass(frozen=True)
class Arm:
    """One kind of cache to try.

    Attributes
    ----------
    name : str
    cache : type of ReasonCache or None
        `ReasonAllocCache` or `SlidingWindowCompressCache`; None is transformers' `DynamicCache`,
        the full cache.
    settings : dict
        Its arguments besides config, budget and spans.
    scorer : str or None
        One of `SCORERS`, made with the window and the seed of a run; by default the cache's own.
    whitelist : bool
        Whether the spans of a question are protected (`protect=`), and the rest of the prompt not.
    fair : float or None
        Strength of fair eviction over the spans of a question (`fair=`), which are not protected by
        that.
    fair_window : int
        Tokens of a span wherever a question names none.
    attention : str
        Attention implementation; "sdpa" for the full cache.
    """

    name: str
    cache: type[ReasonAllocCache] | type[SlidingWindowCompressCache] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    scorer: str | None = None
    whitelist: bool = False
    fair: float | None = None
    fair_window: int = 128

    @property
    def attention(self) -> str:
        """The attention implementation that the cache runs with."""
        return "sdpa" if self.cache is None else "reasoncache"

    @property
    def is_full(self) -> bool:
        """Whether nothing is compressed, so that budgets do not matter."""
        return self.cache is None

    @property
    def keeps_prompt(self) -> bool:
        """Whether no token of a prompt is ever evicted, so that branches may share it."""
        partly = self.whitelist or self.fair is not None
        return not partly and bool(self.settings.get("protect_prompt", True))

    def make(
        self, config: PretrainedConfig, budget: Budget | None, spans: Spans | None, seed: int
    ) -> Cache:
        """Make a new cache for a batch.

        Parameters
        ----------
        config : PretrainedConfig
        budget : int, float or None
            None only for the full cache.
        spans : Spans or None
            Of the questions in the batch.
        seed : int
            Of a random scorer.

        Raises
        ------
        ValueError
            If the cache does not take the budget or the settings, or needs spans and there are
            none.
        """
        if self.cache is None:
            return DynamicCache(config=config)
        return self.cache(config, **self._arguments(self.cache, budget, spans, seed))

    def make_shared(
        self, config: PretrainedConfig, budget: Budget | None, seed: int
    ) -> SharedBranchCache:
        """Make a new cache for a batch in which several rows continue one prompt.

        Parameters
        ----------
        config, budget, seed
            See `make`.

        Raises
        ------
        ValueError
            As `make`; and if the arm does not keep prompts.
        """
        if self.cache is None:
            return SharedBranchCache(config)
        arguments = self._arguments(self.cache, budget, None, seed)
        return SharedBranchCache(config, suffix=self.cache.policy(**arguments))

    def span_settings(self, spans: Spans | None) -> dict[str, Any]:
        """Return the arguments of a cache that follow from the spans of a batch.

        Raises
        ------
        ValueError
            If the arm needs spans and there are none, or they overlap and must not.
        """
        if not self.whitelist and self.fair is None:
            return {}
        if spans is None:
            raise ValueError(
                f"{self.name}: expected questions with spans to protect, got none; name them "
                "in the file ('spans'), or leave out protect and fair."
            )
        settings: dict[str, Any] = {"protect_prompt": False}
        if self.whitelist:
            settings["protect"] = spans
        if self.fair is not None:
            settings["fair"] = Fair(self.fair, spans, self.fair_window)
        return settings

    def _arguments(
        self,
        cache: type[ReasonAllocCache] | type[SlidingWindowCompressCache],
        budget: Budget | None,
        spans: Spans | None,
        seed: int,
    ) -> dict[str, Any]:
        """What the cache takes besides the config."""
        if budget is None:
            raise ValueError(f"{self.name}: expected a budget, got none; pass --budgets.")
        settings = self.settings | self.span_settings(spans)
        if self.scorer is not None:
            settings["scorer"] = SCORERS[self.scorer](settings.get("window", 8), seed)
        if cache is ReasonAllocCache:
            if not isinstance(budget, int):
                raise ValueError(
                    f"{self.name}: expected a budget in tokens, got the ratio {budget}; ratios are "
                    f"for {SLIDING_WINDOW}."
                )
            return {"budget": budget, **settings}
        return settings | ({"max_budget": budget} if isinstance(budget, int) else {"ratio": budget})


FULL_ARM = Arm(FULL)


def baseline(window: int, buffer: int) -> Arm:
    """Return random eviction beside a protected prompt, which every method has to beat."""
    settings = {"head_budgets": False, "window": window, "buffer": buffer}
    return Arm("random, prompt kept", ReasonAllocCache, settings, scorer="random")


def parse_arm(text: str, window: int = 8, buffer: int = 128) -> Arm:
    """Turn what the command line writes into an arm.

    Parameters
    ----------
    text : str
        `full`, `reason-alloc`, `sliding-window`, or a scorer of `SCORERS` (that is
        `ReasonAllocCache` with this scorer and equal budgets for all heads), then a colon and
        settings with commas between them: `scorer=NAME`, `profile=DIR`, `heads=on|off`,
        `prompt=keep|evict`, `protect` (the question's spans), `fair=0.5`, `fair_window=128`, and
        for `sliding-window` `ratio=0.3`, `recent=32`. Example: `snapkv:protect,fair=0.5`.
    window, buffer : int
        For caches with a budget; `window` and `buffer` among the settings go before. Of
        `sliding-window`, a window is what is compressed at once, 128 by default.

    Raises
    ------
    ValueError
        If a name or setting is not known.
    """
    name, _, rest = text.partition(":")
    given = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    if name == FULL and not given:
        return FULL_ARM
    if name not in (REASON_ALLOC, SLIDING_WINDOW, *SCORERS):
        known = ", ".join((FULL, REASON_ALLOC, SLIDING_WINDOW, *SCORERS))
        raise ValueError(f"--cache: expected one of {known}, got {shown(text, 40)}.")
    windows = name == SLIDING_WINDOW
    settings: dict[str, Any] = {} if windows else {"window": window, "buffer": buffer}
    scorer: str | None = None
    if name in SCORERS:
        scorer, settings["head_budgets"] = name, False
    numbers = {"window": int} | ({"ratio": float, "recent": int} if windows else {"buffer": int})
    chosen: dict[str, Any] = {}
    for key, value in given.items():
        try:
            if key in numbers:
                settings[key] = numbers[key](value)
            elif key == "scorer" and value in SCORERS:
                scorer = value
            elif key == "profile" and value:
                settings["profile"] = value
            elif key == "heads":
                settings["head_budgets"] = {"on": True, "off": False}[value]
            elif key == "prompt":
                settings["protect_prompt"] = {"keep": True, "evict": False}[value]
            elif key == "protect" and not value:
                chosen["whitelist"] = True
            elif key == "fair":
                chosen["fair"] = float(value)
            elif key == "fair_window":
                chosen["fair_window"] = int(value)
            else:
                raise ValueError(key)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"--cache {shown(text)}: setting {shown(f'{key}={value}')} is not known; see "
                "--help."
            ) from error
    cache = SlidingWindowCompressCache if windows else ReasonAllocCache
    return Arm(text, cache, settings, scorer, **chosen)


def parse_budget(text: str, option: str = "--budgets") -> Budget:
    """Turn a number into tokens (from 1 on) or a ratio (below 1); ValueError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 0 < value < 1:
        return value
    # Compared before it becomes an integer: infinity and NaN do not.
    if not 1 <= value <= LARGEST or not value.is_integer():
        raise ValueError(
            f"{option}: expected whole numbers of tokens from 1 to {LARGEST}, or ratios below 1, "
            f"got {shown(text)}."
        )
    return int(value)
