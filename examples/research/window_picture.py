"""Which words of a chain of thought survive when each window is compressed once.

    python -m examples.research.window_picture

Solves one problem with `SlidingWindowCompressCache` and draws its text: what one head still holds
at the end, and how many of all heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, check, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import SlidingWindowCompressCache
from hf_reasoncache.releases import cache_kwarg

WORDS_PER_LINE = 24


def draw_text(
    panel: Axes, words: Sequence[str], shares: Sequence[float], prompt: int, title: str
) -> None:
    """Write words in lines, on a colour that says which share of the heads holds each one."""
    for place, (word, share) in enumerate(zip(words, shares, strict=True)):
        row, column = divmod(place, WORDS_PER_LINE)
        color = "0.85" if place < prompt else colormaps["Blues"](0.6 * share)
        panel.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="none"))
        panel.text(
            column + 0.5,
            row + 0.5,
            word,
            ha="center",
            va="center",
            fontsize=6,
            color="black" if share > 0 else "0.6",
        )
    panel.set_xlim(0, WORDS_PER_LINE)
    panel.set_ylim(-(-len(words) // WORDS_PER_LINE), 0)
    panel.set_title(title, fontsize=8, loc="left")
    panel.axis("off")


def draw(
    path: Path, words: Sequence[str], held: torch.Tensor, prompt: int, one: tuple[int, int]
) -> None:
    """Draw one head and all heads; `held` is BoolTensor[layers, heads, words]."""
    lines = -(-len(words) // WORDS_PER_LINE)
    # Without pyplot: no window system is asked for, and nothing global is left behind.
    figure = Figure(figsize=(11, 0.17 * 2 * lines + 1))
    above, below = figure.subplots(2, 1)
    layer, head = one
    single = held[layer, head].float().tolist()
    everyone = held.float().mean((0, 1)).tolist()
    draw_text(above, words, single, prompt, f"layer {layer}, head {head}: held (blue) or evicted")
    draw_text(below, words, everyone, prompt, "all layers and heads: the darker, the more hold it")
    figure.suptitle("grey: the prompt, which no window contains", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--family", choices=sorted(MODELS), default="llama")
    parser.add_argument("--task", choices=TASKS, default="walk")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--recent", type=int, default=16)
    parser.add_argument("--chunk-share", type=float, default=0.5)
    parser.add_argument("--layer", type=int, default=1, help="of the head that is drawn alone")
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("window_picture.png"))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Solve a problem, print what the cache held, draw the words."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(MODELS[arguments.family])
    model.set_attn_implementation("reasoncache")
    problem = make_problems(arguments.task, 1, DEVELOPMENT_SEEDS[500], arguments.family)[0]
    inputs = tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False)
    cache = SlidingWindowCompressCache(
        model.config,
        window=arguments.window,
        ratio=arguments.ratio,
        recent=arguments.recent,
        chunk_share=arguments.chunk_share,
    )
    output = model.generate(
        **inputs,
        **cache_kwarg(cache),
        do_sample=False,
        max_new_tokens=problem.max_new_tokens,
    )
    prompt = inputs["input_ids"].shape[1]
    outcome = check(problem, tokenizer.decode(output[0, prompt:]))
    print(f"answer {'right' if outcome.correct else 'wrong'} after {outcome.length} words")
    print(cache.report())
    # The last word was never fed back.
    words = tokenizer.convert_ids_to_tokens(output[0, :-1])
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    held = torch.zeros(layers, heads, len(words), dtype=torch.bool)
    for layer in range(layers):
        for head, positions in enumerate(cache.held_positions(layer)[0]):
            held[layer, head, positions] = True
    draw(arguments.output, words, held, prompt, (arguments.layer, arguments.head))
    print(f"picture in {arguments.output}")


if __name__ == "__main__":
    main()
