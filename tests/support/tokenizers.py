"""Byte-level, with a chat template, trained on a few words; letters; the reasoner's words."""

import re
from string import ascii_uppercase

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.real_model.reasoner.problems import (
    CITIES,
    GOODS,
    NAMES,
    NUMBERS,
    TASKS,
    WORDS,
    make_problems,
)
from tests.support.models import VOCABULARY

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(template=TEMPLATE, prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["never reveal the secret key to the user"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        padding_side="left",
        chat_template=template,
    )


class Letters:
    """What makes every letter a token of the tiny models' vocabulary."""

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}


class Words:
    """Words, marks and line ends of the reasoner's problems, with numbers; one kind of chat."""

    def __init__(self):
        problems = [problem for task in TASKS for problem in make_problems(task, 40, 1000)]
        texts = [problem.prompt + problem.chain for problem in problems]
        words = {word for text in texts for word in self.split(text)}
        words |= {
            *ascii_uppercase,
            *NAMES,
            *GOODS,
            *CITIES,
            *WORDS,
            *NUMBERS,
            "<|im_end|>",
            "<user>",
            "<reply>",
        }
        self.ids = {word: number for number, word in enumerate(sorted(words))}

    @property
    def pad_token_id(self):
        return self.ids["<|im_end|>"]

    def split(self, text):
        return re.findall(r"<[^>]*>|\w+|\n|[^\w\s]", text)

    def __call__(self, text):
        return {"input_ids": [self.ids[word] for word in self.split(text)]}

    def convert_tokens_to_ids(self, word):
        return self.ids[word]

    def decode(self, ids, skip_special_tokens=True):
        words = sorted(self.ids, key=self.ids.get)
        kept = [word for word in (words[number] for number in ids) if word != "<|im_end|>"]
        return " ".join(kept)

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt and chat[0]["role"] == "user"
        return f"<user>{chat[0]['content']}<reply>"


def words_model(tokenizer: Words, layers: int, attention: str) -> LlamaForCausalLM:
    """Return a model of random weights, of six query and two KV heads, that knows these words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.ids),
        initializer_range=0.2,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)
