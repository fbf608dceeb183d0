"""When a branch may stop: settings, and their JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_reasoncache.arguments import require_int, require_share


@dataclass(frozen=True)
class DecodeExit:
    """A branch stops when it has an answer and is sure of what it writes.

    The thresholds are the decode exit of RKSC (arXiv 2606.09937). Ours: RKSC stops whatever has
    been written by then; here a branch stops only while an answer can be read from it, since a
    chain of thought without one cannot vote. Confidence is a mean over the latest tokens, so that
    a long sure beginning does not cover an unsure end.

    Attributes
    ----------
    steps : int
        Fewest tokens of a branch.
    confidence : float
        Least mean top-1 probability.
    gap : float
        Least relative gap `(c - r) / c` of the mean top-1 probability `c` to the runner-ups' mean
        `r`.
    window : int
        Latest tokens that the means are taken over; all where there are fewer.
    every : int
        Tokens between two looks for an answer; decoding the text is what a look costs.
    """

    steps: int = 3
    confidence: float = 0.72
    gap: float = 0.10
    window: int = 32
    every: int = 8

    def __post_init__(self) -> None:
        require_int("steps", self.steps, low=1)
        require_share("confidence", self.confidence)
        require_share("gap", self.gap)
        require_int("window", self.window, low=1)
        require_int("every", self.every, low=1)


@dataclass(frozen=True)
class WeakExit:
    """A branch stops, and does not vote, when a whole group of its tokens was unsure (DeepConf).

    Attributes
    ----------
    threshold : float
        Least group confidence: mean of `Confidence.spread` over the latest `ExitRules.group`
        tokens, in nats. DeepConf takes a percentile of the lowest groups of 16 first branches;
        `calibrate_exit` takes it from held-out problems. The last branch of a problem that nobody
        has answered yet never stops.
    """

    threshold: float

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or not math.isfinite(self.threshold):
            raise ValueError(f"threshold: expected a finite number, got {self.threshold!r}.")


@dataclass(frozen=True)
class ConsensusExit:
    """All branches of a problem stop when their majority is settled.

    Attributes
    ----------
    confidence : float
        Least probability, in (0, 1], that the leading answer stays the sole majority of all
        branches; see `consensus.probability_kept`. With 1, the branches that are left cannot
        overturn it, whatever they say.
    """

    confidence: float = 1.0

    def __post_init__(self) -> None:
        require_share("confidence", self.confidence)
        if self.confidence == 0:
            raise ValueError("confidence: expected a number above 0, got 0.")


@dataclass(frozen=True)
class ExitRules:
    """All rules together; None switches one off. By default only what cannot change the vote.

    Attributes
    ----------
    decode : DecodeExit or None
    weak : WeakExit or None
    consensus : ConsensusExit or None
    group : int
        Tokens of a sliding group, for `weak` and for `Branch.group_confidence`.
    """

    decode: DecodeExit | None = None
    weak: WeakExit | None = None
    consensus: ConsensusExit | None = ConsensusExit()
    group: int = 2048

    def __post_init__(self) -> None:
        require_int("group", self.group, low=1)
        for name, kind in _RULES.items():
            rule = getattr(self, name)
            if rule is not None and not isinstance(rule, kind):
                raise ValueError(f"{name}: expected {kind.__name__} or None, got {rule!r}.")

    @property
    def needs_confidence(self) -> bool:
        """Whether a rule looks at the logits."""
        return self.decode is not None or self.weak is not None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> ExitRules:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            If it is anything else.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != known:
            raise ValueError(f"rules: expected an object with {sorted(known)}, got {values!r}.")
        try:
            rules = {
                name: None if values[name] is None else kind(**values[name])
                for name, kind in _RULES.items()
            }
        except TypeError as error:
            raise ValueError(f"rules: expected the fields of each rule, got {values!r}.") from error
        return cls(group=values["group"], **rules)


_RULES: dict[str, type] = {"decode": DecodeExit, "weak": WeakExit, "consensus": ConsensusExit}
