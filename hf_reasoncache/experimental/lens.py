"""How early in the layer stack the next token is known: RKSC's logit-lens exit, measured."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from hf_reasoncache.arguments import require_int


@dataclass(frozen=True)
class LensExit:
    """When a layer would be the last one.

    Attributes
    ----------
    entropy : float
        Largest entropy of the layer's own distribution of the next token, in nats.
    change : float
        Largest change of that entropy from the layer before, in nats.
    after : int
        Layers that always run; the paper's 2.
    """

    entropy: float = 0.5
    change: float = 0.1
    after: int = 2

    def __post_init__(self) -> None:
        for name in ("entropy", "change"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected nats > 0, got {getattr(self, name)!r}.")
        require_int("after", self.after, low=1)


@dataclass(frozen=True)
class LensReport:
    """What a lens saw.

    Attributes
    ----------
    tokens : int
        Next tokens looked at, of all rows.
    exited : int
        Those that a layer before the last would have decided.
    agreed : int
        Exited ones whose likeliest token was that of the whole stack.
    layers : int
        Layers of the model.
    depth : float
        Mean layers up to the exit, over all tokens.
    """

    tokens: int
    exited: int
    agreed: int
    layers: int
    depth: float

    @property
    def error(self) -> float:
        """Share of the exits whose token was another one; NaN without exits."""
        return 1 - self.agreed / self.exited if self.exited else float("nan")

    def __str__(self) -> str:
        return (
            f"{self.exited} of {self.tokens} tokens decided early, {self.error:.2%} of them "
            f"otherwise than by all layers; {self.depth:.2f} of {self.layers} layers on average"
        )


class LogitLens:
    """Looks at the next token after every layer, through the final norm and the output embedding.

    An exit inside the stack is not possible through public API: a hook cannot skip the layers that
    follow, and a skipped layer would owe its keys and values to later tokens. This is the nearest
    form: it says what an exit would have decided and how often it errs, and `processor` makes
    generate go on with the exit's logits. It saves no time; it costs a head product per layer.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder with `layers` and a final `norm`.
    exit : LensExit

    Attributes
    ----------
    processor : LogitsProcessor
        Optional, for `generate(logits_processor=[lens.processor])`: rows that exited get the logits
        of their exit layer.

    Raises
    ------
    ValueError
        If the model has no such parts.

    Examples
    --------
    >>> with LogitLens(model) as lens:
    ...     model.generate(**inputs)
    >>> print(lens.report())

    Notes
    -----
    From RKSC (arXiv 2606.09937): entropy below a threshold and steady, after layer 2; the paper
    gives no values, so the defaults are ours. Ours: the final norm before the output embedding,
    which the paper's code leaves out.
    """

    def __init__(self, model: PreTrainedModel, exit: LensExit | None = None) -> None:
        decoder = model.get_decoder()
        layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        head = model.get_output_embeddings()
        if layers is None or norm is None or head is None:
            raise ValueError(
                "LogitLens: expected a decoder with layers, a final norm and output embeddings, "
                f"got {type(model).__name__}."
            )
        self.exit = LensExit() if exit is None else exit
        self.processor = _ExitLogits(self)
        self._layers, self._norm, self._head = layers, norm, head
        self._softcap = getattr(
            model.config.get_text_config(decoder=True), "final_logit_softcapping", None
        )
        self._hooks: list[Any] = []
        self._tokens = self._exited = self._agreed = self._depth = 0
        self._logits: list[torch.Tensor] = []
        self.latest: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> LogitLens:
        self._hooks = [layer.register_forward_hook(self._look) for layer in self._layers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _look(self, layer: Any, inputs: Any, output: Any) -> None:
        """Take the logits of the newest token after one layer; after the last one, judge."""
        if layer is self._layers[0]:
            self._logits = []
        hidden = output[0] if isinstance(output, tuple) else output
        logits = self._head(self._norm(hidden[:, -1])).float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        self._logits.append(logits)
        if len(self._logits) == len(self._layers):
            self._judge(torch.stack(self._logits, 1))

    def _judge(self, logits: torch.Tensor) -> None:
        """Find every row's exit in logits, Tensor[B, L, V]."""
        logs = logits.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        steady = (entropy[:, 1:] - entropy[:, :-1]).abs() < self.exit.change
        may = torch.zeros_like(entropy, dtype=torch.bool)
        may[:, 1:] = (entropy[:, 1:] < self.exit.entropy) & steady
        may[:, : self.exit.after] = False
        may[:, -1] = True  # the last layer decides what no other did
        depth = may.int().argmax(-1)
        rows = torch.arange(len(logits), device=logits.device)
        exited = depth < logits.shape[1] - 1
        agreed = logits[rows, depth].argmax(-1) == logits[:, -1].argmax(-1)
        self._tokens += len(logits)
        self._exited += int(exited.sum())
        self._agreed += int((agreed & exited).sum())
        self._depth += int((depth + 1).sum())
        self.latest = logits[rows, depth], exited

    def report(self) -> LensReport:
        """Return what was seen since the lens was made."""
        return LensReport(
            tokens=self._tokens,
            exited=self._exited,
            agreed=self._agreed,
            layers=len(self._layers),
            depth=self._depth / self._tokens if self._tokens else float("nan"),
        )


class _ExitLogits(LogitsProcessor):
    """Puts the exit's logits in place of the last layer's."""

    def __init__(self, lens: LogitLens) -> None:
        self._lens = lens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Replace the scores of rows that exited."""
        if self._lens.latest is None or len(self._lens.latest[1]) != len(scores):
            raise ValueError(
                "LogitLens.processor: expected a lens that saw this step, got none; generate "
                "inside `with LogitLens(model) as lens`, without beams."
            )
        logits, exited = self._lens.latest
        replaced: Any = torch.where(exited[:, None].to(scores.device), logits.to(scores), scores)
        return replaced
