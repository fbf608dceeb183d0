"""What latents in 8 bits cost: attention to random ones, and a random model of real widths.

    python -m examples.research.fp8_latents --threads 1

There is no trained model with latents among the weights that these scripts use. The first table
compares what a token may be held as; the rotary numbers get ever larger, as those of trained models
are larger than the latents. The second one reads random text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import DeepseekV2ForCausalLM, DynamicCache

from examples.benchmarks.latents import LatentShape
from examples.research.arguments import parse, plain_parser
from examples.research.fp8 import Fidelity
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation.fidelity import CHUNK, forwards
from triton_ops.fp8 import dequantise, quantise

RANK, ROPE, HEADS = 512, 64, 16
SCALING = 192**-0.5
TOKENS, SEEDS = 1024, 8
SPREAD = 4.0
"""Standard deviation of the logits, half of their variance from the rotary part."""
LARGER = (1, 10, 100, 1_000, 10_000)
"""Sizes of the rotary numbers in those of the latents."""

SHAPE = LatentShape(layers=4, intermediate=1024)
TEXTS, LENGTH = 2, 512
SHARPER = 4.0
"""Factor on the random queries, so that attention is not nearly even."""


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return rows `[N, D]` as 8 bits and a scale for each leave them."""
    codes, scales = quantise(x[None, None])
    return dequantise(codes[0, 0], scales[0, 0])


def one_scale(latents: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Latent and rotary key under one scale."""
    return rounded(torch.cat([latents, rotary], -1))


def two_scales(latents: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """A scale for each."""
    return torch.cat([rounded(latents), rounded(rotary)], -1)


def rotary_kept(latents: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """The rotary key as it comes."""
    return torch.cat([rounded(latents), rotary], -1)


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "one scale, 578 bytes": one_scale,
    "two scales, 580 bytes": two_scales,
    "rotary key in bfloat16, 642 bytes": rotary_kept,
}


def errors(larger: float, seed: int) -> list[float]:
    """Relative error of attention to random latents, for each way of holding them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    latents, rotary = draw(TOKENS, RANK).bfloat16(), (larger * draw(TOKENS, ROPE)).bfloat16()
    parts = []
    for keys in (latents.double(), rotary.double()):
        query = draw(HEADS, keys.shape[1]).double()
        parts.append(query * SPREAD * 0.5**0.5 / (SCALING * (query @ keys.T)).std())
    query = torch.cat(parts, -1)

    def attend(held: torch.Tensor) -> torch.Tensor:
        held = held.double()
        return (SCALING * (query @ held.T)).softmax(-1) @ held[:, :RANK]

    exact = attend(torch.cat([latents, rotary], -1))
    return [
        float((attend(way(latents, rotary)) - exact).norm() / exact.norm()) for way in WAYS.values()
    ]


def compare_ways() -> list[dict[str, str]]:
    """Return the first table."""
    rows = []
    for larger in LARGER:
        found = torch.tensor([errors(larger, seed) for seed in range(SEEDS)]).mean(0).tolist()
        cells = (f"{each:.1%}" for each in found)
        rows.append({"rotary numbers": f"{larger:,}x", **dict(zip(WAYS, cells, strict=True))})
        print(*rows[-1].values(), sep="  ", flush=True)
    return rows


@torch.no_grad()
def sharpened(model: DeepseekV2ForCausalLM) -> DeepseekV2ForCausalLM:
    """Make the queries of a random model larger."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(SHARPER)
    return model


def read_texts() -> list[dict[str, str]]:
    """Return the second table."""
    model = sharpened(SHAPE.build(seed=0)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SHAPE.vocabulary, (TEXTS, LENGTH), generator=generator)
    full = list(forwards(model, ids, DynamicCache(config=model.config)))
    model.set_attn_implementation("reasoncache")
    rows = []
    for storage in (None, "fp8"):
        cache = ReasonAllocCache(model.config, budget=None, storage=storage)
        fidelity, apart, size = Fidelity(full), 0.0, 0.0
        for chunk, wanted in zip(fidelity.passed(forwards(model, ids, cache)), full, strict=True):
            apart += float((chunk - wanted).float().square().sum())
            size += float(wanted.float().square().sum())
        rows.append(
            {
                "storage": "as it comes" if storage is None else f'`"{storage}"`',
                "bytes of a token": str(cache.report().layers[0].token_bytes),
                "relative error of the logits": f"{(apart / size) ** 0.5:.2%}",
                "KL": f"{fidelity.divergence / fidelity.tokens:.1e}",
                "same best token": f"{fidelity.alike / fidelity.tokens:.1%}",
            }
        )
        print(*rows[-1].values(), sep="  ", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both tables, print and write them."""
    given = parse(plain_parser(__doc__, "fp8.md"), arguments)
    made = f"`python -m examples.research.fp8_latents --threads 1`, {versions()}."
    note = (
        f"Relative error of attention (norm, mean of {SEEDS} seeds): {HEADS} queries, {TOKENS:,} "
        f"random latents of {RANK} and {ROPE} numbers in bfloat16, logits with a standard "
        f"deviation of {SPREAD:g}, half of their variance from the rotary part; bytes of a token "
        f"beside each way of holding it. {made}"
    )
    publish(compare_ways(), note, "fp8-latents", given.output, given.document)
    note = (
        f"Random DeepSeek-V2 of the widths of V2-Lite ({SHAPE.layers} layers, MLP of "
        f"{SHAPE.intermediate}, queries {SHARPER:g} times as large as drawn, seed 0) in bfloat16, "
        f"{TEXTS} random texts of {LENGTH} tokens in chunks of {CHUNK}, against `DynamicCache`; KL "
        f"of the next token in nats. {made}"
    )
    publish(read_texts(), note, "fp8-latents-model", given.output, given.document)


if __name__ == "__main__":
    main()
