"""Train a tiny reasoner on one CPU core.

    python -m examples.tiny_reasoner.train --output runs/qwen3 --minutes 75 --architecture qwen3

The schedule is a share of the minutes, so a slower machine sees fewer steps. A run that was stopped
goes on where its last checkpoint was when the same command is given again. The result to keep is
the copy in bfloat16. What matters, by experience: a warm-up of dense look-ups and sums (without it
neither forms in time), wired offsets in layer 0 (`initialization`), one token per key, weights on
rare words, problems that grow, and a decay of the learning rate. Needs torch 2.9 or newer, for its
Muon optimizer.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .curriculum import FIRST_READ, IGNORED, Batch, Curriculum
from .families import FAMILIES, Family, get_family
from .initialization import ARCHITECTURES, build_model
from .tokenizer import build_tokenizer
from .vocabulary import DIGITS, SIGNAL_WORDS

ATTENTION = "causal_float32"
STATE = "training_state.pt"


@dataclass(frozen=True)
class Schedule:
    """Learning rates and curriculum, as functions of progress (0 to 1)."""

    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    warmup_steps: int = 50
    warmup_end: float = 0.15
    """Until then most sequences are dense look-ups and sums."""
    growth_start: float = 0.08
    growth_end: float = 0.5
    """Between these two the problems grow to full size."""
    decay_start: float = 0.7

    def difficulty(self, progress: float) -> float:
        """Return the difficulty of the curriculum."""
        grown = (progress - self.growth_start) / (self.growth_end - self.growth_start)
        return min(1.0, max(0.0, grown))

    def warmup_share(self, progress: float) -> float:
        """Return the share of warm-up sequences."""
        return 0.6 if progress < self.warmup_end else 0.1 * (1 - progress)

    def rate(self, progress: float, step: int) -> float:
        """Return the factor of the learning rates."""
        decay = min(1.0, max(0.02, (1 - progress) / (1 - self.decay_start)))
        return min(1.0, (step + 1) / self.warmup_steps) * decay


def attend_causally(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in float32 under an autocast to bfloat16: on a CPU that is the faster one.

    No mask: sequences are padded on the right, where causal attention never looks.
    """
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), None, **kwargs
        )


class Progress:
    """Accuracies since the last report, by the kind of word to predict."""

    def __init__(self, family: Family, rows: int) -> None:
        kinds = {
            "digit": DIGITS,
            "name": family.letters,
            "word": SIGNAL_WORDS,
            "question": ["sum", *(f"{name}?" for name in family.letters)],
        }
        self.kinds = {kind: torch.zeros(rows, dtype=torch.bool) for kind in kinds}
        for kind, words in kinds.items():
            self.kinds[kind][[family.vocabulary.index(word) for word in words]] = True
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    @torch.no_grad()
    def add(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        is_warmup: torch.Tensor,
    ) -> None:
        """Count the right predictions of a batch; each argument is over its labels ``[N, ...]``."""
        right = logits.argmax(-1) == labels
        masks = {kind: members[labels] & ~is_warmup for kind, members in self.kinds.items()}
        masks |= {"warm-up": is_warmup, "first read": (weights == FIRST_READ) & ~is_warmup}
        for kind, mask in masks.items():
            self.counts[kind][0] += int(right[mask].sum())
            self.counts[kind][1] += int(mask.sum())

    def report(self) -> str:
        """Return the accuracies and start afresh."""
        text = " ".join(
            f"{kind} {right / total:.4f}" for kind, (right, total) in self.counts.items() if total
        )
        self.counts.clear()
        return text


class Trainer:
    """A model with its optimizers, stream of batches and clock."""

    def __init__(
        self, family: Family, model: PreTrainedModel, seed: int, minutes: float, schedule: Schedule
    ) -> None:
        self.family = family
        self.model = model
        self.schedule = schedule
        self.seconds = minutes * 60
        self.elapsed = 0.0
        self.step = 0
        self.seed = seed
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, weight in model.named_parameters():
            (matrices if weight.ndim == 2 and ".layers." in name else others).append(weight)
        self.muon = torch.optim.Muon(matrices, lr=schedule.muon_rate, weight_decay=0.01)
        self.adam = torch.optim.AdamW(
            others, lr=schedule.adam_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.meter = Progress(family, model.config.vocab_size)

    def run(self, output: Path, checkpoint_every: float = 180.0, report_every: int = 50) -> None:
        """Train until the time is up, saving to `output` on the way and at the end."""
        curriculum = Curriculum(self.family, seed=self.seed + 1000 * self.step)
        batches = curriculum.batches()
        started = time.monotonic() - self.elapsed
        saved = self.elapsed
        tokens, first = 0, self.elapsed
        with tqdm(total=round(self.seconds), initial=round(self.elapsed), unit="s") as bar:
            while self.elapsed < self.seconds:
                progress = self.elapsed / self.seconds
                curriculum.difficulty = self.schedule.difficulty(progress)
                curriculum.warmup_share = self.schedule.warmup_share(progress)
                batch = next(batches)
                loss = self.update(batch, self.schedule.rate(progress, self.step))
                tokens += batch.input_ids.numel()
                self.elapsed = time.monotonic() - started
                bar.update(round(self.elapsed) - bar.n)
                if self.step % report_every == 0:
                    speed = tokens / (self.elapsed - first)
                    bar.write(
                        f"step {self.step} {self.elapsed:.0f}s"
                        f" difficulty {curriculum.difficulty:.2f} loss {loss:.4f}"
                        f" {self.meter.report()} {speed:.0f} tokens/s"
                    )
                if self.elapsed - saved > checkpoint_every:
                    self.save(output)
                    saved = self.elapsed
        self.save(output)

    def update(self, batch: Batch, rate: float) -> float:
        """Take one optimizer step and return the unweighted loss."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=batch.input_ids, use_cache=False).logits
        chosen = batch.labels != IGNORED
        logits, labels, weights = (
            logits[chosen].float(),
            batch.labels[chosen],
            batch.weights[chosen],
        )
        losses = functional.cross_entropy(logits, labels, reduction="none")
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        bases = {self.muon: self.schedule.muon_rate, self.adam: self.schedule.adam_rate}
        for optimizer, base in bases.items():
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        is_warmup = (batch.weights.amax(1) == 1.0)[:, None].expand_as(chosen)[chosen]
        self.meter.add(logits, labels, weights, is_warmup)
        return losses.mean().item()

    def save(self, output: Path) -> None:
        """Write model, tokenizer and the state to resume from."""
        export(self.model, self.family, output)
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }
        torch.save(state, output / STATE)

    def resume(self, output: Path) -> None:
        """Take up optimizers and clock of a saved run, whose weights the model has already.

        Batches are drawn from a new seed.
        """
        state = torch.load(output / STATE, weights_only=True)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def export(model: PreTrainedModel, family: Family, output: Path) -> None:
    """Write a model and its tokenizer."""
    model.save_pretrained(output)
    build_tokenizer(family.name).save_pretrained(output)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train a tiny reasoner on a CPU.")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory of checkpoints and of the result"
    )
    parser.add_argument(
        "--minutes", type=float, default=75.0, help="wall clock, earlier parts of the run included"
    )
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="qwen3")
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), help="default: the architecture's name"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument(
        "--seed", type=int, default=0, help="below 1000: the seeds set aside for training"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    AttentionInterface.register(ATTENTION, attend_causally)
    family = get_family(arguments.family or arguments.architecture)
    resuming = (arguments.output / STATE).exists()
    if resuming:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.output, attn_implementation=ATTENTION, dtype=torch.float32
        )
    else:
        model = build_model(
            arguments.architecture,
            len(family.vocabulary),
            arguments.layers,
            arguments.hidden,
            ATTENTION,
        )
    trainer = Trainer(family, model.train(), arguments.seed, arguments.minutes, Schedule())
    if resuming:
        trainer.resume(arguments.output)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")
    trainer.run(arguments.output)
    export(trainer.model.to(torch.bfloat16), family, arguments.output / "bfloat16")


if __name__ == "__main__":
    main()
