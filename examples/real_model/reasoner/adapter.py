"""Low-rank adapters in the format of PEFT, without PEFT: attach, save, merge.

    python -m examples.real_model.reasoner.adapter --out build/reasoner-merged

saves the model with the adapter of this folder merged into its weights, in bfloat16: a plain model,
which the commands of hf-reasoncache read. `PeftModel.from_pretrained` reads the adapter as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.real_model import model as real_model

HERE = Path(__file__).parent
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."
"""How PEFT calls the model that an adapter belongs to."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, kept in float32.

    Parameters
    ----------
    base : nn.Linear
        The layer, whose weight is frozen here.
    rank : int
        Rank of the product, which begins as zero.
    alpha : float
        The product is scaled by ``alpha / rank``.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))  # [r, in]
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))  # [out, r]
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, self.lora_B.to(x.dtype) * self.scale)


def attach(model: PreTrainedModel, rank: int, alpha: float) -> dict[str, nn.Parameter]:
    """Freeze a model, give its `TARGETS` adapters and return those by their names in PEFT."""
    model.requires_grad_(False)
    found = {}
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in TARGETS:
            wrapped = LoraLinear(module, rank, alpha)
            setattr(model.get_submodule(parent), child, wrapped)
            found[f"{PREFIX}{name}.lora_A.weight"] = wrapped.lora_A
            found[f"{PREFIX}{name}.lora_B.weight"] = wrapped.lora_B
    return found


def save(adapter: dict[str, nn.Parameter], folder: Path, rank: int, alpha: float) -> None:
    """Write weights in bfloat16 and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: each.detach().to(torch.bfloat16) for name, each in adapter.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(TARGETS),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter's products to the weights of a model, in place, and return it."""
    config = json.loads((folder / CONFIG).read_text())
    weights = load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    for name, low in weights.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            high = weights[f"{layer}.lora_B.weight"]
            weight = model.get_parameter(f"{layer.removeprefix(PREFIX)}.weight")
            product = scale * (high.float() @ low.float())
            weight.copy_(weight.float() + product)
    return model


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Save the model with its adapter merged.")
    parser.add_argument("--folder", type=Path, default=real_model.FOLDER, help="of the model")
    parser.add_argument("--adapter", type=Path, default=HERE, help="folder of the adapter")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = real_model.saved(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged(model, arguments.adapter).to(torch.bfloat16).save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
