"""How far greedy decoding follows the reasoner's script under a cache, found by reading the script.

The script's chain is fed `CHUNK` tokens at a time, and a row leaves the batch at the first token
that greedy decoding would choose otherwise. So a chain counts as right where greedy decoding writes
it to the letter. Evictions fall at the end of the chunk that exceeds budget and buffer, which is
what decoding with `CHUNK` more tokens of buffer does. That takes a fraction of the time, most of
all under caches that fail early.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Cache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model.reasoner.problems import make_problems
from examples.real_model.reasoner.train import Example, encode
from examples.research.chains import Arm, about_model, digest, fill, held_by_row
from hf_reasoncache.evaluation.fidelity import CHUNK
from hf_reasoncache.releases import cache_kwarg


@dataclass(frozen=True)
class Reading:
    """What became of a chain: a line of the journal.

    Attributes
    ----------
    task, seed, number : str, int, int
        Of the problem.
    cache, budget, digest : str, int or float or None, str
        See `chains.Chain`.
    right : int
        Tokens before the first that greedy decoding would choose otherwise.
    length : int
        Tokens of the chain, the one that ends it included.
    held : float
        Tokens held per KV head, on average over the forwards of the row, layers and heads.
    """

    task: str
    seed: int
    number: int
    cache: str
    budget: int | float | None
    digest: str
    right: int
    length: int
    held: float

    @property
    def key(self) -> tuple[str, int, int, str, int | float | None]:
        """What no two lines of a journal have in common."""
        return self.task, self.seed, self.number, self.cache, self.budget

    @property
    def correct(self) -> bool:
        """Whether greedy decoding would write the chain to the letter."""
        return self.right == self.length


@torch.inference_mode()
def read(
    model: PreTrainedModel, examples: Sequence[Example], cache: Cache
) -> list[tuple[int, float]]:
    """Return `Reading.right` and `Reading.held` of problems, read in one batch with a new cache."""
    longest = max(each.start for each in examples)
    prompts = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(prompts)
    lengths = torch.tensor([len(each.ids) - each.start for each in examples])
    # What follows the end of a shorter chain is fed as well, and not looked at.
    chains = torch.zeros(len(examples), int(lengths.max()) + CHUNK, dtype=torch.long)
    for row, each in enumerate(examples):
        prompts[row, longest - each.start :] = torch.tensor(each.ids[: each.start])
        mask[row, longest - each.start :] = 1
        chains[row, : lengths[row]] = torch.tensor(each.ids[each.start :])
    found, held = [0] * len(examples), [list[float]() for _ in examples]
    live = torch.arange(len(examples))
    logits = _forward(model, prompts, mask, cache)[:, -1:]
    done = 0
    while True:
        steps = logits.shape[1]
        same = logits.argmax(-1) == chains[live, done : done + steps]
        same &= torch.arange(done, done + steps) < lengths[live, None]
        agreed = same.cumprod(-1).sum(-1)
        for row, count, tokens in zip(
            live.tolist(), agreed.tolist(), held_by_row(cache, mask).tolist(), strict=True
        ):
            found[row] += count
            held[row].append(tokens)
        done += steps
        goes_on = (agreed == steps) & (lengths[live] > done)
        if not bool(goes_on.any()):
            break
        if not bool(goes_on.all()):
            cache.batch_select_indices(goes_on.nonzero()[:, 0])
            live, mask = live[goes_on], mask[goes_on]
        some = chains[live, done - 1 : done - 1 + CHUNK]
        mask = torch.cat([mask, torch.ones_like(some)], -1)
        logits = _forward(model, some, mask, cache)
    return [(right, statistics.mean(own)) for right, own in zip(found, held, strict=True)]


def _forward(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """Tensor[B, T, V]; of a prompt, only the last logits."""
    first = cache.get_seq_length() == 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(
        ids,
        attention_mask=mask,
        position_ids=positions,
        **cache_kwarg(cache),
        use_cache=True,
        logits_to_keep=1 if first else 0,
    ).logits


def read_arms(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    arms: Sequence[Arm],
    tasks: Sequence[str],
    seed: int,
    path: Path,
    batch_size: int = 50,
) -> list[list[Reading]]:
    """Read the problems of all arms, as far as the journal at `path` has no lines on them.

    Returns
    -------
    list of list of Reading
        Of each arm, by task and number.

    Raises
    ------
    ValueError
        If the journal is of another model or version, or has lines of other settings under the
        same names.
    """
    most = max(arm.problems for arm in arms)
    examples = {
        task: [encode(tokenizer, problem) for problem in make_problems(task, most, seed)]
        for task in tasks
    }

    def make(arm: Arm, task: str, numbers: Sequence[int]) -> list[Reading]:
        own = {
            (task, seed, number, arm.spec.name, arm.budget): examples[task][number]
            for number in numbers
        }
        return _readings(model, own, arm)

    return fill(model, path, Reading, about_model(model), arms, tasks, seed, batch_size, make)


def _readings(
    model: PreTrainedModel,
    examples: Mapping[tuple[str, int, int, str, int | float | None], Example],
    arm: Arm,
) -> list[Reading]:
    model.set_attn_implementation(arm.spec.attention)
    some = list(examples.values())
    seed = next(iter(examples))[1]
    results = read(model, some, arm.spec.make(model.config, arm.budget, None, seed))
    return [
        Reading(
            *key,
            digest=digest(arm.spec),
            right=right,
            length=len(example.ids) - example.start,
            held=round(held, 2),
        )
        for (key, example), (right, held) in zip(examples.items(), results, strict=True)
    ]
