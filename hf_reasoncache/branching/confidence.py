"""How sure a model is of each token, recorded while it generates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LogitsProcessor


class Confidence(NamedTuple):
    """What the logits of one step say about each row; every field is a Tensor[B].

    Attributes
    ----------
    top1 : Tensor
        Probability of the likeliest token, in (0, 1].
    top2 : Tensor
        Probability of the runner-up.
    spread : Tensor
        Token confidence of DeepConf (arXiv 2508.15260): minus the mean log-probability, in nats, of
        the `top_k` likeliest tokens. Larger is surer: the others are far behind.
    """

    top1: torch.Tensor
    top2: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, top_k: int) -> Confidence:
        """Measure logits.

        Parameters
        ----------
        logits : Tensor[B, V]
            Minus infinity for tokens that are ruled out; these are never counted.
        top_k : int
            At least 2; no more than V are taken.
        """
        logits = logits.float()
        best = logits.topk(min(top_k, logits.shape[-1])).values
        logs = best - logits.logsumexp(-1, keepdim=True)
        allowed = logs.isfinite()
        spread = -logs.masked_fill(~allowed, 0.0).sum(-1) / allowed.sum(-1)
        return cls(logs[:, 0].exp(), logs[:, 1].exp(), spread)


class ConfidenceRecorder(LogitsProcessor):
    """Notes the confidence of every step and leaves the scores as they are.

    Among transformers' processors it stands behind penalties and constraints, and before
    temperature and truncation (top-k, top-p), so that it sees what the model thinks and not how it
    is sampled. Stopping criteria cannot see that: they get scores only with `output_scores=True`,
    and then after truncation.

    Parameters
    ----------
    top_k : int
        Tokens that `Confidence.spread` looks at; DeepConf takes 20.
    """

    def __init__(self, top_k: int = 20) -> None:
        self.top_k = top_k
        self.reset()

    def reset(self) -> None:
        """Forget the last step."""
        self._latest: tuple[int, torch.Tensor] | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Record `scores`, a Tensor[B, V], and return them."""
        self._latest = (
            input_ids.shape[1],
            torch.stack(Confidence.of(scores, self.top_k), -1).cpu(),
        )
        return scores

    def take(self, tokens: int, rows: int) -> torch.Tensor | None:
        """Hand over the confidence of the step that followed `tokens` tokens, once.

        Returns
        -------
        Tensor[B, 3] or None
            The fields of `Confidence`, on the CPU; None if nothing was recorded since.

        Raises
        ------
        ValueError
            If another generation than the caller's was recorded.
        """
        if self._latest is None:
            return None
        (seen, latest), self._latest = self._latest, None
        if (seen, len(latest)) != (tokens, rows):
            raise ValueError(
                f"recorder: expected the step after {tokens} tokens of {rows} rows, got the one "
                f"after {seen} tokens of {len(latest)} rows; pass the recorder and its "
                "ConfidentExit to the same generate call, without beams."
            )
        return latest
