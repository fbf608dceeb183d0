"""Show where a tiny reasoner looks: how broad its attention is, and which layers it needs.

    python -m examples.tiny_reasoner.anatomy --model llama

The model reads reference solutions with the full cache. For every layer this prints

- how many words hold 95% of the attention of a head, and the share that is older than the window;
- how often the next word stays the same when this layer sees only the first words and a window of
  the latest, and when it is the only layer that sees everything.

A layer that can be cut to the window for free does not retrieve anything the task needs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import DEFAULT_FAMILY, MODELS, TASKS, make_problems
from .tasks import DEVELOPMENT_SEEDS

ATTENTION = "tiny_reasoner_anatomy"


@dataclass
class Probe:
    """An attention function that hides old words from some layers and measures the others.

    Attributes
    ----------
    window, sinks
        Latest and first words that a narrowed layer still sees.
    narrowed
        Indices of the narrowed layers.
    breadth, old
        Per layer, one measurement for every sequence: words that hold 95% of the mass, and the
        share of the mass that is older than the window; means over heads and later words.
    """

    window: int
    sinks: int = 4
    narrowed: frozenset[int] = frozenset()
    breadth: dict[int, list[float]] = field(default_factory=dict)
    old: dict[int, list[float]] = field(default_factory=dict)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend causally in one sequence: queries ``[1, H, T, D]``, keys ``[1, H_kv, T, D]``."""
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        places = torch.arange(query.shape[2])
        age = places[:, None] - places[None, :]
        recent = (age < self.window) | (places[None, :] < self.sinks)
        layer = int(module.layer_idx)
        visible = (age >= 0) & recent if layer in self.narrowed else age >= 0
        logits = (query @ key.transpose(-1, -2)) * scaling
        mass = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        if not self.narrowed:
            late = mass[0, :, 2 * self.window :]
            cumulative = late.sort(-1, descending=True).values.cumsum(-1)
            words = (cumulative < 0.95).sum(-1) + 1
            self.breadth.setdefault(layer, []).append(words.float().mean().item())
            old = (late * ~recent[2 * self.window :]).sum(-1)
            self.old.setdefault(layer, []).append(old.mean().item())
        return (mass @ value).transpose(1, 2).contiguous(), None


@torch.inference_mode()
def examine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe, texts: list[list[str]]
) -> list[tuple[float, float, float, float]]:
    """Return breadth, old mass, agreement when narrowed, agreement when alone, for every layer.

    Parameters
    ----------
    model
        Must run with the attention of `probe`.
    tokenizer
        Of the model.
    probe
        Sees every forward pass.
    texts
        Pairs of a prompt and its solution.
    """
    layers = model.config.num_hidden_layers
    every = frozenset(range(layers))
    settings = [frozenset({layer}) for layer in range(layers)]
    settings += [every - {layer} for layer in range(layers)]
    same = [0] * len(settings)
    total = 0
    for prompt, solution in texts:
        ids = tokenizer(f"{prompt} {solution}", return_tensors="pt")["input_ids"]
        predictions = []
        for probe.narrowed in (frozenset[int](), *settings):
            logits = model(input_ids=ids, use_cache=False).logits
            predictions.append(logits[0, len(prompt.split()) - 1 : -1].argmax(-1))
        total += len(predictions[0])
        for index, prediction in enumerate(predictions[1:]):
            same[index] += int((prediction == predictions[0]).sum())
    return [
        (
            sum(probe.breadth[layer]) / len(texts),
            sum(probe.old[layer]) / len(texts),
            same[layer] / total,
            same[layers + layer] / total,
        )
        for layer in range(layers)
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Show where a tiny reasoner looks.")
    parser.add_argument("--model", choices=sorted(MODELS), default=DEFAULT_FAMILY)
    parser.add_argument("--count", type=int, default=20, help="problems of each task")
    parser.add_argument("--seed", type=int, default=DEVELOPMENT_SEEDS[0])
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(MODELS[arguments.model])
    for task in TASKS:
        probe = Probe(arguments.window)
        AttentionInterface.register(ATTENTION, probe.attend)
        model = AutoModelForCausalLM.from_pretrained(
            MODELS[arguments.model], attn_implementation=ATTENTION, dtype=torch.float32
        )
        problems = make_problems(task, arguments.count, arguments.seed, arguments.model)
        texts = [[problem.prompt, problem.solution] for problem in problems]
        print(f"{task}: layer, words for 95%, older than {arguments.window}, narrowed, alone")
        for layer, row in enumerate(examine(model, tokenizer, probe, texts)):
            breadth, old, narrowed, alone = row
            print(f"  {layer}  {breadth:6.1f}  {old:.3f}  {narrowed:.3f}  {alone:.3f}", flush=True)


if __name__ == "__main__":
    main()
