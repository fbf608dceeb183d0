"""The caches of a run: what is tried, at which budgets, and how the command line writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

from transformers import Cache, DynamicCache, PretrainedConfig

from hf_reasoncache.arguments import LARGEST
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.caches.reason_alloc import ReasonAllocCache
from hf_reasoncache.caches.shared_branch import SharedBranchCache
from hf_reasoncache.caches.sliding_window import SlidingWindowCompressCache
from hf_reasoncache.calibration.queries import load_queries
from hf_reasoncache.geometry import rotary_frequencies
from hf_reasoncache.messages import shown
from hf_reasoncache.protection import Fair, Protect, Spans
from hf_reasoncache.scorers import (
    SCORERS,
    ExpectedAttention,
    Random,
    Scorer,
    TriAttention,
    make_scorer,
)
from hf_reasoncache.storage.fp8 import FORMS

Budget = int | float
"""Tokens per KV head; below 1, a share of the tokens seen, which is the ratio of a cache."""

CACHES: dict[str, type[ReasonCache] | None] = {
    "full": None,
    "reason-alloc": ReasonAllocCache,
    "sliding-window": SlidingWindowCompressCache,
}
"""Every cache by its name on the command line; None is transformers' `DynamicCache`."""


TRI_ATTENTION = "tri-attention"
"""Name on the command line of the one scorer that cannot be made without statistics."""

EXPECTED_ATTENTION = "expected-attention"
"""Name of the one scorer that is made of a model's config."""


@dataclass(frozen=True)
class CacheSpec:
    """One kind of cache to try.

    Attributes
    ----------
    name : str
    cache : type of ReasonCache or None
        `ReasonAllocCache` or `SlidingWindowCompressCache`; None is transformers' `DynamicCache`,
        the full cache.
    settings : dict
        Its arguments besides config, budget and spans; and, as `queries`, where `TriAttention`,
        which is then the scorer, finds its statistics: an official file (`.pt`), or a profile.
    scorer : str or None
        One of `SCORERS`, made with the window and the seed of a run, or `EXPECTED_ATTENTION`; by
        default the cache's own.
    whitelist : bool
        Whether the spans of a question are protected, and the rest of the prompt not.
    fair : float or None
        Strength of fair eviction over the spans of a question, which are not protected by that.
    fair_window : int
        Tokens of a span wherever a question names none.
    """

    name: str
    cache: type[ReasonCache] | None = None
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
        return not partly and self._protect.prompt

    @property
    def is_random(self) -> bool:
        """Whether tokens are evicted at random."""
        given = self.settings.get("scorer")
        return self.scorer == "random" or given == "random" or isinstance(given, Random)

    @property
    def protection(self) -> tuple[Any, ...]:
        """What must be equal for two caches to protect the same tokens."""
        return self.whitelist, self.fair, self.fair_window, self._protect

    @property
    def profile(self) -> Any:
        """The layer profile, as it was given; None for equal layers."""
        return self.settings.get("profile")

    @property
    def _protect(self) -> Protect:
        """What is protected besides the spans of questions."""
        return Protect.of(self.settings.get("protect", True))

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
        return self.cache(config, **self._arguments(self.cache, config, budget, spans, seed))

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
            As `make`; and if the cache does not keep prompts.
        """
        if self.cache is None:
            return SharedBranchCache(config)
        arguments = self._arguments(self.cache, config, budget, None, seed)
        return SharedBranchCache(config, suffix=self.cache.policy(**arguments))

    def span_settings(self, spans: Spans | None) -> dict[str, Any]:
        """Return the arguments of a cache that follow from the spans of a batch.

        Raises
        ------
        ValueError
            If spans are needed and there are none, or they overlap and must not.
        """
        if not self.whitelist and self.fair is None:
            return {}
        if spans is None:
            raise ValueError(
                f"{self.name}: expected questions with spans to protect, got none; name them "
                "in the file ('spans'), or leave out protect and fair."
            )
        keep = spans if self.whitelist else None
        fair = None if self.fair is None else Fair(self.fair, spans, self.fair_window)
        return {"protect": replace(self._protect, prompt=False, spans=keep, fair=fair)}

    def _arguments(
        self,
        cache: type[ReasonCache],
        config: PretrainedConfig,
        budget: Budget | None,
        spans: Spans | None,
        seed: int,
    ) -> dict[str, Any]:
        """What the cache takes besides the config."""
        if budget is None:
            raise ValueError(f"{self.name}: expected a budget, got none; pass --budgets.")
        settings = self.settings | self.span_settings(spans)
        if self.scorer is not None:
            window = settings.get("window", 8)
            settings["scorer"] = _scorer(self.scorer, config, window, seed)
        if (queries := settings.pop("queries", None)) is not None:
            settings["scorer"] = TriAttention(load_queries(queries, config))
        if isinstance(budget, float):
            return settings | {"ratio": budget}
        return settings | {"budget" if _takes(cache, "budget") else "max_budget": budget}


def _scorer(name: str, config: PretrainedConfig, window: int, seed: int) -> Scorer:
    """Make the scorer of a run for a model."""
    if name == EXPECTED_ATTENTION:
        return ExpectedAttention(tuple(rotary_frequencies(config)))
    return make_scorer(name, window=window, seed=seed)


FULL = CacheSpec("full")


def baseline(window: int, buffer: int) -> CacheSpec:
    """Return random eviction beside a protected prompt, which every method has to beat."""
    settings = {"window": window, "buffer": buffer}
    return CacheSpec("random, prompt kept", ReasonAllocCache, settings, scorer="random")


def control(spec: CacheSpec) -> CacheSpec:
    """Return random eviction with the protection, profile and every other setting of a cache."""
    kind, _, rest = spec.name.partition(":")
    # What only says how tokens are scored.
    scores = ("scorer=", "queries=")
    settings = ",".join(each for each in rest.split(",") if not each.startswith(scores))
    # Of caches with a threshold the scorer is the name, of others a setting.
    if "buffer" in spec.settings:
        name = f"random:{settings}".rstrip(":")
    else:
        name = f"{kind}:scorer=random,{settings}".rstrip(",")
    plain = {key: value for key, value in spec.settings.items() if key != "queries"}
    return replace(spec, name=name, settings=plain, scorer="random")


def controls(specs: Sequence[CacheSpec], usual: CacheSpec | None) -> dict[str, str]:
    """Say which random eviction every cache is compared with.

    Parameters
    ----------
    specs : sequence of CacheSpec
        All caches of a run.
    usual : CacheSpec or None
        For caches that none of `specs` is a control of.

    Returns
    -------
    dict of str to str
        Name of the control by that of the cache: random eviction with the same protection, and the
        same profile if there is one. Random eviction itself has none.
    """
    drawn = [spec for spec in specs if spec.is_random]
    found = {}
    for spec in specs:
        alike = [each for each in drawn if each.protection == spec.protection]
        nearest = [each for each in alike if each.profile == spec.profile] + alike
        control = nearest[0] if nearest else usual
        if control is not None and not spec.is_random and not spec.is_full:
            found[spec.name] = control.name
    return found


def _profile(text: str) -> str:
    if not text:
        raise ValueError("no directory and no repository")
    return text


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "profile": ("profile", _profile),
    "heads": ("head_budgets", {"on": True, "off": False}.__getitem__),
    "prompt": ("protect", {"keep": True, "evict": False}.__getitem__),
    "window": ("window", int),
    "buffer": ("buffer", int),
    "min_budget": ("min_budget", int),
    "ratio": ("ratio", float),
    "recent": ("recent", int),
    "storage": ("storage", {name: name for name in FORMS}.__getitem__),
}
"""Settings on the command line: the argument of a cache, if it takes it, and how it is read."""


def parse_spec(text: str, window: int = 8, buffer: int = 128) -> CacheSpec:
    """Turn what the command line writes into the description of a cache.

    Parameters
    ----------
    text : str
        One of `CACHES`, or of `SCORERS` or `expected-attention` (that is `ReasonAllocCache` with
        this scorer), or `tri-attention` (the same, with `queries=FILE.pt` or `queries=PROFILE`),
        then a colon and settings with commas between them: `scorer=NAME`, `profile=DIR`,
        `heads=on|off`, `prompt=keep|evict`, `protect` (the question's spans), `fair=0.5`,
        `fair_window=128`, `min_budget=128` (where budgets are ratios), `storage=fp8` (see
        `ReasonAllocCache`), and for `sliding-window` `ratio=0.3`, `recent=32`. Example:
        `snapkv:protect,fair=0.5`.
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
    if name == FULL.name and not given:
        return FULL
    by_name = (*SCORERS, EXPECTED_ATTENTION)
    cache = ReasonAllocCache if name in (*by_name, TRI_ATTENTION) else CACHES.get(name)
    if cache is None:
        known = ", ".join((*CACHES, *by_name, TRI_ATTENTION))
        raise ValueError(f"--cache: expected one of {known}, got {shown(text, 40)}.")
    # Caches that compress at a threshold: `window` means another thing to those by windows.
    usual = {"window": window, "buffer": buffer}
    settings: dict[str, Any] = usual if _takes(cache, "buffer") else {}
    scorer = name if name in by_name else None
    chosen: dict[str, Any] = {}
    for key, value in given.items():
        try:
            # A ratio in place of a budget is one of the budgets.
            is_budget = key == "ratio" and _takes(cache, "budget")
            if key in _SETTINGS and _takes(cache, _SETTINGS[key][0]) and not is_budget:
                argument, read = _SETTINGS[key]
                settings[argument] = read(value)
            elif key == "scorer" and value in by_name:
                scorer = value
            elif key == "queries" and value and name == TRI_ATTENTION:
                settings["queries"] = value
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
    if name == TRI_ATTENTION and ("queries" not in settings or scorer is not None):
        raise ValueError(
            f"--cache {shown(text)}: expected queries=FILE.pt or queries=PROFILE and no other "
            "scorer; hf-reasoncache calibrate --tri-attention measures them."
        )
    return CacheSpec(text, cache, settings, scorer, **chosen)


def _takes(cache: type[ReasonCache], argument: str) -> bool:
    """Whether a cache has an argument of that name."""
    return argument in signature(cache).parameters


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
