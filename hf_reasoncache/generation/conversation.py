"""A chat, turn by turn, whose turns continue one cache wherever they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_reasoncache.releases import cache_kwarg


class Conversation:
    """A chat with a model.

    A turn continues the cache of the turn before if the chat template writes what was said so far
    as the cache has seen it. Templates that leave out earlier thoughts do not; then a new cache
    reads the whole chat again, which is right too, and slower.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer
        With a chat template.
    new_cache : Callable[[PretrainedConfig], Cache]
        Makes a cache from the model's config: `ReasonAllocCache.policy(budget=1024)`.
    system : str, optional
        What the model is told before the first turn.

    Attributes
    ----------
    messages : list of dict
        What was said, as chat templates take it.
    cache : Cache or None
        What the last turn has left; None before the first.

    Raises
    ------
    ValueError
        If the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        new_cache: Callable[[PretrainedConfig], Cache],
        system: str | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "tokenizer: expected one with a chat template, got none; chats need an "
                "instruction-tuned model."
            )
        self.model: Any = model
        self.tokenizer, self.new_cache = tokenizer, new_cache
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.restart()

    def restart(self) -> None:
        """Forget all that was said but the system's message."""
        self.messages = list(self._opening)
        self._forget()

    def _forget(self) -> None:
        self.cache: Cache | None = None
        self._fed = torch.zeros(1, 0, dtype=torch.long)

    def answer(self, text: str, **settings: Any) -> str:
        """Say something and return the answer.

        Parameters
        ----------
        text : str
        **settings
            Arguments of `generate`, a `streamer` among them.

        Raises
        ------
        BaseException
            Whatever ends `generate`, an interrupt included: then nothing was said, and the next
            turn reads the chat again.
        """
        asked = {"role": "user", "content": text}
        inputs: Any = self.tokenizer.apply_chat_template(
            [*self.messages, asked],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        inputs = inputs.to(self.model.device)
        ids = inputs["input_ids"]
        if self.cache is None or not self._continues(ids):
            self.cache = self.new_cache(self.model.config)
        try:
            out = self.model.generate(**inputs, **cache_kwarg(self.cache), **settings)
        except BaseException:
            self._forget()
            raise
        self._fed = out[:, : self.cache.get_seq_length()]
        said: Any = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages += [asked, {"role": "assistant", "content": said}]
        return str(said)

    def _continues(self, ids: torch.Tensor) -> bool:
        """Whether a text, LongTensor[1, T], begins with what the cache has seen, and goes on."""
        seen = self._fed.shape[1]
        return ids.shape[1] > seen and torch.equal(ids[:, :seen], self._fed)
