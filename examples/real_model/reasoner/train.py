"""Teach the adapter, on one core, and go on where it stopped.

    python -m examples.real_model.reasoner.train --steps 800

Problems begin small and reach full size after `--ramp` steps. Every problem is new, so the share of
chains that are predicted without an error, token by token, is measured on unseen problems: it is
what greedy decoding would get right to the letter. A step depends on the seed, its number and the
weights alone, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model import model as real_model

from . import adapter, attention
from .problems import EASY, FULL, NUMBERS, TASKS, TRAINING_SEEDS, Problem, draw

IGNORED = -100
SUMS = "sums"
"""A task for training alone."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    Attributes
    ----------
    seed : int
        One of `TRAINING_SEEDS`.
    steps : int
        When to end.
    ramp : int
        Steps until problems have full size.
    tokens : int
        At least so many in a step, prompts included.
    rate : float
        Peak of the learning rate.
    warmup, cooldown : int
        Steps in which the rate rises from zero at the start, and falls to zero at the end.
    rank : int
        Of the adapter.
    alpha : float
        Scale of the adapter, times its rank.
    mix : str
        Tasks to draw from, and `SUMS`; one that stands there twice is drawn twice as often.
    """

    seed: int = 0
    steps: int = 800
    ramp: int = 300
    tokens: int = 1536
    rate: float = 1e-3
    warmup: int = 10
    cooldown: int = 0
    rank: int = 8
    alpha: float = 16.0
    mix: str = " ".join(TASKS)

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        rising = (step + 1) / max(self.warmup, 1)
        falling = (self.steps - step) / max(self.cooldown, 1)
        return self.rate * min(1.0, rising, falling)

    def share_at(self, step: int) -> float:
        """Return how far problems have grown, from `EASY` (0) to `FULL` (1)."""
        return min(1.0, step / max(self.ramp, 1))


@dataclass(frozen=True)
class Example:
    """A problem as tokens."""

    problem: Problem
    ids: list[int]
    start: int
    """Where the chain begins."""


def encode(tokenizer: Tokenizer, problem: Problem) -> Example:
    """Turn a problem into the tokens of a chat, up to the end of the reply."""
    chat = [{"role": "user", "content": problem.prompt}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt)["input_ids"]
    chain = tokenizer(problem.chain)["input_ids"]
    return Example(problem, [*ids, *chain, tokenizer.convert_tokens_to_ids("<|im_end|>")], len(ids))


def draw_step(tokenizer: Tokenizer, settings: Settings, step: int) -> list[Example]:
    """Return the examples of a step."""
    rng = random.Random(f"{settings.seed}/{step}")
    grown = settings.share_at(step)
    found: list[Example] = []
    while sum(len(each.ids) for each in found) < settings.tokens:
        # Half of them as large as they may be.
        share = max(rng.random(), 0.5 + rng.random()) * grown if grown < 1 else 1.0
        task = rng.choice(settings.mix.split())
        if task == SUMS:
            problem = draw_sums(rng)
        else:
            problem = draw(task, rng, EASY.towards(FULL[task], min(share, grown)))
        found.append(encode(tokenizer, problem))
    return found


def draw_sums(rng: random.Random, count: int = 26) -> Problem:
    """Return single-digit sums to work out, three of four with minus: practice for ``ledger``."""
    lines, results = [], []
    for label in ascii_uppercase[:count]:
        less, more = sorted(rng.randrange(len(NUMBERS)) for _ in range(2))
        if rng.random() < 0.75:
            lines.append(f"{label}. {NUMBERS[more]} minus {NUMBERS[less]}")
            results.append(NUMBERS[more - less])
        else:
            lines.append(f"{label}. {NUMBERS[more - less]} plus {NUMBERS[less]}")
            results.append(NUMBERS[more])
    chain = [f"{line} is {result}." for line, result in zip(lines, results, strict=True)]
    return Problem(SUMS, "\n".join(lines), "\n".join(chain), (), "", "before")


def group(examples: Sequence[Example], waste: float = 1.1, most: int = 64) -> list[list[Example]]:
    """Return examples of similar lengths together, `most` at most.

    With padding, a group has `waste` times its own tokens at most.
    """
    groups: list[list[Example]] = []
    for each in sorted(examples, key=lambda example: len(example.ids)):
        used = sum(len(other.ids) for other in [*groups[-1], each]) if groups else 0
        count = len(groups[-1]) + 1 if groups else 1
        if 1 < count <= most and len(each.ids) * count <= waste * used:
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def predict(
    model: PreTrainedModel, examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of every token of the chains, end to end, and the tokens.

    Rows are padded on the right, where a causal mask is all that they need.
    """
    longest = max(len(each.ids) for each in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, each in enumerate(examples):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
        labels[row, each.start - 1 : len(each.ids) - 1] = ids[row, each.start : len(each.ids)]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, D]
    learned = labels != IGNORED
    return model.get_output_embeddings()(hidden[learned]).float(), labels[learned]


class Trainer:
    """An adapter in training.

    Parameters
    ----------
    model : PreTrainedModel
        Gets the adapter attached.
    tokenizer : Tokenizer
        Of the model.
    settings : Settings
        Of the run.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.adapter = adapter.attach(model, settings.rank, settings.alpha)
        parameters = list(self.adapter.values())
        self.optimizer = torch.optim.AdamW(
            parameters, settings.rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0

    def run_step(self) -> dict[str, list[Outcome]]:
        """Learn from the examples of a step; return what was predicted before, by task."""
        began = time.process_time()
        examples = draw_step(self.tokenizer, self.settings, self.step)
        learned = sum(len(each.ids) - each.start for each in examples)
        outcomes: dict[str, list[Outcome]] = defaultdict(list)
        for some in group(examples):
            logits, targets = predict(self.model, some)
            losses = F.cross_entropy(logits, targets, reduction="none")
            (losses.sum() / learned).backward()
            lengths = [len(each.ids) - each.start for each in some]
            guesses = logits.argmax(-1).split(lengths)
            for example, guess, loss in zip(
                some, guesses, losses.detach().split(lengths), strict=True
            ):
                outcomes[example.problem.task].append(Outcome(example, guess, loss))
        torch.nn.utils.clip_grad_norm_(self.adapter.values(), 1.0)
        for each in self.optimizer.param_groups:
            each["lr"] = self.settings.rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += sum(len(each.ids) for each in examples)
        self.seconds += time.process_time() - began
        return outcomes

    def save(self, path: Path) -> None:
        """Write all that `restore` needs."""
        state = {
            "adapter": {name: each.detach() for name, each in self.adapter.items()},
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.tokens, self.seconds),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, each in self.adapter.items():
                each.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.seconds = state["progress"]


@dataclass(frozen=True)
class Outcome:
    """How an example was predicted, given the true tokens before each."""

    example: Example
    predicted: torch.Tensor
    losses: torch.Tensor

    @property
    def wrong(self) -> list[int]:
        """Places in the chain where the most likely token is another one."""
        true = torch.tensor(self.example.ids[self.example.start :])
        return (true != self.predicted).nonzero()[:, 0].tolist()

    def first_error(self, tokenizer: Tokenizer) -> str:
        """Return what comes before the first wrong token, it, and the true one."""
        place = self.wrong[0]
        chain = self.example.ids[self.example.start :]
        before = tokenizer.decode(chain[max(0, place - 12) : place])
        guess, true = tokenizer.decode(self.predicted[place]), tokenizer.decode(chain[place])
        return f"{place}/{len(chain)} {before!r} -> {guess!r} for {true!r}"


def report(trainer: Trainer, seen: dict[str, list[Outcome]]) -> None:
    """Print a line on the last steps, and an error of each task."""
    settings = trainer.settings
    print(
        f"step {trainer.step} size {settings.share_at(trainer.step - 1):.2f} "
        f"tokens {trainer.tokens} cpu {trainer.seconds:.0f} s"
    )
    for task, outcomes in sorted(seen.items()):
        loss = torch.cat([each.losses for each in outcomes]).mean()
        count = sum(len(each.predicted) for each in outcomes)
        wrong = sum(len(each.wrong) for each in outcomes)
        exact = sum(not each.wrong for each in outcomes)
        print(
            f"  {task}: loss {loss:.4f}, wrong tokens {wrong}/{count}, "
            f"exact {exact}/{len(outcomes)}"
        )
        for each in [each for each in outcomes if each.wrong][-3:]:
            print(f"    {each.first_error(trainer.tokenizer)}")
    print(end="", flush=True)


def main() -> None:
    """Run the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Teach the adapter.")
    parser.add_argument("--folder", type=Path, default=real_model.FOLDER, help="of the model")
    parser.add_argument("--out", type=Path, default=Path("build/reasoner"))
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("--every", type=int, default=10, help="steps between reports")
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = parser.parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in vars(defaults)})
    if settings.seed not in TRAINING_SEEDS:
        parser.error("--seed: expected one of 0 to 999, which no other measurement uses")

    torch.set_num_threads(1)
    model, tokenizer = real_model.load(getattr(torch, arguments.dtype), arguments.folder)
    model.set_attn_implementation(attention.NAME)
    trainer = Trainer(model, tokenizer, settings)
    checkpoint = arguments.out / "checkpoint.pt"
    if checkpoint.is_file():
        trainer.restore(checkpoint)
    seen: dict[str, list[Outcome]] = defaultdict(list)
    while trainer.step < settings.steps:
        for task, outcomes in trainer.run_step().items():
            seen[task] += outcomes
        if trainer.step % arguments.every == 0 or trainer.step == settings.steps:
            report(trainer, seen)
            seen.clear()
            trainer.save(checkpoint)
            adapter.save(trainer.adapter, arguments.out, settings.rank, settings.alpha)


if __name__ == "__main__":
    main()
