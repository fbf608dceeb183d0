"""What a decode step moves when a model's weights are not all on one device.

    python -m examples.benchmarks.devices

A tiny reasoner answers with its weights in memory, offloaded to the CPU, offloaded to files, and
with two GPUs where there are two, over one cache after another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from examples.benchmarks.machine import Machine
from examples.benchmarks.moves import Moves
from examples.benchmarks.options import new_parser
from examples.tiny_reasoner import MODELS
from hf_reasoncache import ReasonAllocCache, SharedBranchCache, SlidingWindowCompressCache
from hf_reasoncache.releases import cache_kwarg

SEED = 0
PROMPT = 48

CACHES: dict[str, Callable[[Any], Cache]] = {
    "DynamicCache": lambda config: DynamicCache(config=config),
    "ReasonAllocCache": partial(ReasonAllocCache, budget=64, buffer=16),
    "SlidingWindowCompressCache": partial(SlidingWindowCompressCache, window=16, recent=4),
    "SharedBranchCache": partial(
        SharedBranchCache, suffix=ReasonAllocCache.policy(budget=64, buffer=16)
    ),
}


def two_gpus(model: PreTrainedModel) -> PreTrainedModel:
    """The first half of the layers on one GPU, the second on another."""
    layers = model.config.num_hidden_layers
    places: dict[str, Any] = {f"model.layers.{i}": 2 * i // layers for i in range(layers)}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    return dispatch_model(model, device_map=places)


def ways(
    folder: str, where: torch.device
) -> dict[str, Callable[[PreTrainedModel], PreTrainedModel]]:
    """How the weights are spread, by name."""
    found = {
        "in memory": lambda model: model.to(where),
        "offloaded to the CPU": lambda model: cpu_offload(model, execution_device=where),
        "offloaded to files": lambda model: disk_offload(model, folder, execution_device=where),
    }
    return found | ({"two GPUs": two_gpus} if torch.cuda.device_count() > 1 else {})


@torch.no_grad()
def measure(
    model: PreTrainedModel, make: Callable[[Any], Cache], place: torch.device, steps: int
) -> tuple[torch.Tensor, Moves]:
    """Decode two rows greedily, one of them padded, and count what the steps move."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(4, model.config.vocab_size, (2, PROMPT), generator=generator).to(place)
    mask = torch.ones(2, PROMPT + steps, dtype=torch.long, device=place)
    mask[1, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, moves, found = make(model.config), Moves(), []

    def forward(tokens: torch.Tensor, seen: int) -> torch.Tensor:
        out = model(
            input_ids=tokens,
            attention_mask=mask[:, :seen],
            position_ids=positions[:, seen - tokens.shape[1] : seen],
            **cache_kwarg(cache),
            use_cache=True,
        )
        return out.logits[:, -1:].argmax(-1).to(place)

    token = forward(ids, PROMPT)
    with moves:
        for step in range(steps):
            found.append(token)
            token = forward(token, PROMPT + step + 1)
    return torch.cat(found, 1).cpu(), moves


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = new_parser("What a decode step moves between devices.")
    parser.add_argument("--family", choices=sorted(MODELS), default="llama")
    parser.add_argument("--steps", type=int, default=80, help="tokens to decode")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    machine = Machine.here(SEED)
    where = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    expected: dict[str, torch.Tensor] = {}
    print(f"{'weights':22}{'cache':28}{'tensors':>8}{'KB':>9}  a step; tokens")
    with tempfile.TemporaryDirectory() as folder:
        for way, spread in ways(folder, where).items():
            model = spread(
                AutoModelForCausalLM.from_pretrained(
                    MODELS[chosen.family], attn_implementation="reasoncache"
                ).eval()
            )
            for name, make in CACHES.items():
                tokens, moves = measure(model, make, where, chosen.steps)
                same = torch.equal(expected.setdefault(name, tokens), tokens)
                count, size = moves.tensors.total() / chosen.steps, moves.bytes / chosen.steps / 1e3
                print(f"{way:22}{name:28}{count:8.1f}{size:9.1f}  {'same' if same else 'OTHER'}")
    print(machine)


if __name__ == "__main__":
    main()
