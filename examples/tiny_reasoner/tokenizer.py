"""The tokenizer of a family: one token per word, loadable with ``AutoTokenizer``."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .families import get_family


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family.

    It adds no special tokens: prompts spell out ``<bos>`` and ``<think>``. Batches are padded on
    the left, as generation needs them.

    Parameters
    ----------
    family
        ``llama`` or ``qwen3``.
    """
    words = {word: index for index, word in enumerate(get_family(family).vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
