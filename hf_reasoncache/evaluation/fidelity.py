"""How near the predictions of a compressed cache stay to those of the full one, on any text.

No question is answered: every token of the text is known, and each cache is asked how likely it
found the next one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from transformers import (
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_reasoncache.arguments import require_int
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.settings import digest, versions
from hf_reasoncache.evaluation.journal import Journal
from hf_reasoncache.evaluation.specs import FULL, Budget, CacheSpec, control
from hf_reasoncache.evaluation.statistics import Estimate
from hf_reasoncache.messages import shown
from hf_reasoncache.outputs import new_directory, sole_writer
from hf_reasoncache.processes import Processes
from hf_reasoncache.profiles.fingerprint import fingerprint
from hf_reasoncache.protection import Spans
from hf_reasoncache.releases import cache_kwarg

CHUNK = 8
"""Tokens per forward: evictions fall between two of them, as they do between single tokens."""

BLOCK = 64
"""Tokens that are resampled together: neighbours are not independent."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a text.

    Attributes
    ----------
    name : str
        File and number, unique within a run.
    ids : tuple of int
        Its tokens.
    prompt : int or None
        How many of them are read in one forward, as a prompt, and not counted; None takes a chunk.
    spans : Spans or None
        Of the prompt, for caches that protect them.
    """

    name: str
    ids: tuple[int, ...]
    prompt: int | None = None
    spans: Spans | None = None

    def digest(self, spec: CacheSpec) -> str:
        """Identify what a cache reads."""
        return digest((self.ids, self.prompt, spec))


@dataclass(frozen=True)
class Reading:
    """What a cache made of a piece of text: a line of the journal.

    Tokens after the prompt, or the first chunk, are counted, in blocks of `BLOCK`, the last of
    which may be shorter. Lists have a sum for each block.

    Attributes
    ----------
    piece, cache, budget
        Which reading this is.
    digest : str
        Of the tokens and of the cache's settings, which the key only names.
    tokens : int
        Of the piece, without a prompt.
    sizes : list of int
        Tokens of each block.
    losses : list of float
        Of the tokens of the text, in nats.
    divergences : list of float
        KL divergence of the next token's distribution from the full cache's, in nats.
    agreed : list of int
        Tokens at which the likeliest next token is that of the full cache.
    until : int
        How many of `tokens` were read before the likeliest next token differed for the first time;
        all if it never did.
    held : float
        Tokens held per KV head at the end.
    evicted : int
        By the whole batch, layers and heads counted.
    """

    piece: str
    cache: str
    budget: int | float | None
    digest: str
    tokens: int
    sizes: list[int]
    losses: list[float]
    divergences: list[float]
    agreed: list[int]
    until: int
    held: float
    evicted: int

    @property
    def key(self) -> tuple[str, str, int | float | None]:
        """What no two readings of a run have in common."""
        return self.piece, self.cache, self.budget


@torch.inference_mode()
def forwards(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    chunk: int = CHUNK,
    prompt: int | None = None,
) -> Iterator[torch.Tensor]:
    """Feed texts to a cache, one chunk after the other.

    A cache evicts between two forwards. The first chunk is its prompt; it then holds up to
    `chunk - 1` tokens more than budget and buffer before it evicts.

    Parameters
    ----------
    model : PreTrainedModel
    ids : LongTensor[B, T]
    cache : Cache
        New.
    chunk : int
        Tokens of a forward.
    prompt : int, optional
        Tokens of the first one instead, of which only the last has logits.

    Yields
    ------
    Tensor[B, n, V]
        Logits of the next `chunk` tokens, in the end of what is left.
    """
    edges = [0, *range(prompt or chunk, ids.shape[1], chunk), ids.shape[1]]
    for start, end in pairwise(edges):
        last = {"logits_to_keep": 1} if prompt is not None and not start else {}
        yield model(ids[:, start:end], **cache_kwarg(cache), use_cache=True, **last).logits


def losses(ids: torch.Tensor, chunks: Iterable[torch.Tensor], chunk: int = CHUNK) -> torch.Tensor:
    """Return the loss of every token after the first chunk, in nats.

    Parameters
    ----------
    ids : LongTensor[B, T]
    chunks : iterable of Tensor[B, n, V]
        What `forwards` yields.
    chunk : int

    Returns
    -------
    Tensor[B, T - chunk]
    """
    found = [
        _loss(logits, ids[:, start + 1 : start + chunk + 1])
        for start, logits in zip(range(0, ids.shape[1], chunk), chunks, strict=True)
    ]
    return torch.cat(found, 1)[:, chunk - 1 :]


def divergence(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) in nats, from logits ``[..., V]`` to ``[...]``."""
    logs = full.float().log_softmax(-1)
    return (logs.exp() * (logs - other.float().log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class TextGrid:
    """Pieces of text x caches x budgets: what is to be read.

    The full cache is always among the caches.

    Attributes
    ----------
    pieces : sequence of Piece
        All of one length and without prompts, unless they are read one at a time.
    specs : sequence of CacheSpec
    budgets : sequence of int or float
    controls : bool
        Whether each cache has random eviction under the same settings beside it.
    chunk : int
        Tokens of a forward, see `forwards`.
    batch_size : int
        Pieces that are read together; it changes no reading.
    seed : int
        Of random scorers.
    """

    pieces: Sequence[Piece]
    specs: Sequence[CacheSpec]
    budgets: Sequence[Budget]
    controls: bool = True
    chunk: int = CHUNK
    batch_size: int = 8
    seed: int = 0
    cells: list[tuple[CacheSpec, Budget | None]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Check; raises ValueError."""
        require_int("chunk", self.chunk, low=1)
        require_int("batch_size", self.batch_size, low=1)
        specs = {spec.name: spec for spec in self.specs if not spec.is_full}
        for name, values in (
            ("pieces", [piece.name for piece in self.pieces]),
            ("caches", [spec.name for spec in self.specs]),
            ("budgets", self.budgets),
        ):
            if not values or len(set(values)) != len(values):
                raise ValueError(
                    f"{name}: expected at least one, and no two alike, got {shown(values)}."
                )
        lengths = {len(piece.ids) for piece in self.pieces}
        alike = len(lengths) == 1 and all(piece.prompt is None for piece in self.pieces)
        short = any(len(piece.ids) <= (piece.prompt or self.chunk) for piece in self.pieces)
        if short or not (alike or self.batch_size == 1):
            raise ValueError(
                f"pieces: expected all of one length of more than a chunk of {self.chunk} tokens, "
                f"or more than a prompt and batch_size=1, got {shown(sorted(lengths))}."
            )
        for spec in list(specs.values()) if self.controls else []:
            specs.setdefault(control(spec).name, control(spec))
        cells: list[tuple[CacheSpec, Budget | None]] = [(FULL, None)]
        cells += [(spec, budget) for budget in self.budgets for spec in specs.values()]
        object.__setattr__(self, "cells", cells)


def pieces_of(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None
) -> list[Piece]:
    """Cut a file of text into pieces of as many tokens; what is left at its end is not read.

    Parameters
    ----------
    path : Path
        In UTF-8.
    tokenizer : PreTrainedTokenizerBase
        Each piece begins with the tokens that it puts before a text.
    length : int
        Tokens of a piece, those included.
    most : int, optional
        How many pieces are taken, from the beginning.

    Raises
    ------
    ValueError
        If the file is not text in UTF-8, or shorter than a piece.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got: {error}.") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(text, verbose=False)["input_ids"]
    before = whole[: next(n for n in range(len(whole) + 1) if whole[n : n + len(ids)] == ids)]
    step = length - len(before)
    starts = range(0, len(ids) - step + 1, step) if step > 0 else []
    if not starts:
        raise ValueError(
            f"{path}: expected text of {length} tokens or more, got {len(ids) + len(before)}; "
            "choose shorter pieces (--tokens)."
        )
    return [
        Piece(f"{path.name}/{number}", (*before, *ids[start : start + step]))
        for number, start in enumerate(starts[:most])
    ]


def read_texts(
    model: PreTrainedModel,
    grid: TextGrid,
    path: Path,
    *,
    progress: bool | None = None,
) -> list[Reading]:
    """Read all pieces of a grid with all its caches, as far as they are not read yet.

    All caches of a batch are fed side by side, so that they take memory together; no logits stay.
    Several processes share the batches, as in `evaluate`.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention meanwhile.
    grid : TextGrid
    path : Path
        The journal: a run that was killed goes on from it, and more caches, budgets or texts add
        to it.
    progress : bool, optional
        Whether to show a bar; by default on a terminal.

    Returns
    -------
    list of Reading
        Those of this grid, by cell, then by piece.

    Raises
    ------
    ValueError
        If the journal is of another model, chunk, length or release, or one of its readings is of
        another text or cache under the same name; or a cache does not take its budget.
    """
    processes = Processes.of(model)
    about = {
        "fingerprint": fingerprint(model),
        "model": Path(model.config._name_or_path).name,
        "chunk": grid.chunk,
        "block": BLOCK,
        "seed": grid.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **versions(),
    }
    for spec, budget in grid.cells:
        _require_room(model.config, spec, budget, grid)
    size = grid.batch_size
    batches = [grid.pieces[n : n + size] for n in range(0, len(grid.pieces), size)]
    attention = model.config._attn_implementation
    lock = sole_writer(new_directory(path.parent) / path.name, is_main=processes.is_main)
    with lock, Journal(path, Reading, about, processes) as journal:
        missing = [(batch, cells) for batch in batches if (cells := _missing(grid, batch, journal))]
        mine = processes.share(missing)
        total = sum(len(batch) * len(cells) for batch, cells in mine)
        # Foreign caches are attended to by its base, which is what the full one wants.
        model.set_attn_implementation("reasoncache")
        try:
            with processes.bar(total, "reading", None, progress) as bar:
                for batch, cells in mine:
                    journal.add(_read(model, batch, cells, grid.chunk, grid.seed))
                    bar.update(len(batch) * len(cells))
        finally:
            model.set_attn_implementation(attention)
        keys = [
            (piece.name, spec.name, budget) for spec, budget in grid.cells for piece in grid.pieces
        ]
        journal.join(keys)
        return [journal.records[key] for key in keys]


@dataclass(frozen=True)
class Fidelity:
    """One cache at one budget over all pieces of text.

    Attributes
    ----------
    cache, budget
    loss : Estimate
        Of the text, in nats per token; `loss.exp()` is the perplexity.
    above_full, above_control : Estimate or None
        Difference of the loss from the full cache's, and from that of random eviction under the
        same settings, on the same tokens.
    divergence : Estimate
        KL(full || cache) of the next token's distribution, in nats.
    agreement : float
        Share of tokens after which the likeliest next token is that of the full cache.
    until : float
        Mean number of tokens that were read before that differed for the first time.
    never : int
        Pieces in which it never did; they count with their length.
    held : float
        Tokens held per KV head at the end of a piece.
    nothing_evicted : bool
    """

    cache: str
    budget: Budget | None
    loss: Estimate
    above_full: Estimate | None
    above_control: Estimate | None
    divergence: Estimate
    agreement: float
    until: float
    never: int
    held: float
    nothing_evicted: bool


def sum_up(readings: Iterable[Reading], controls: Mapping[str, str]) -> list[Fidelity]:
    """Sum up readings, one line for each cache and budget.

    Parameters
    ----------
    readings : iterable of Reading
        Each cell with all pieces, in the same order.
    controls : Mapping of str to str
        By a cache's name, that of the one which it is compared with at the same budget.
    """
    cells: dict[tuple[str, Budget | None], list[Reading]] = {}
    for each in readings:
        cells.setdefault((each.cache, each.budget), []).append(each)
    full = cells[FULL.name, None]
    found = []
    for (cache, budget), mine in cells.items():
        other = cells.get((controls[cache], budget)) if cache in controls else None
        found.append(
            Fidelity(
                cache=cache,
                budget=budget,
                loss=_estimate(mine, lambda each: each.losses),
                above_full=None if budget is None else _difference(mine, full),
                above_control=None if other is None else _difference(mine, other),
                divergence=_estimate(mine, lambda each: each.divergences),
                agreement=sum(sum(each.agreed) for each in mine)
                / sum(sum(each.sizes) for each in mine),
                until=statistics.mean(each.until for each in mine),
                never=sum(each.until == each.tokens for each in mine),
                held=statistics.mean(each.held for each in mine),
                nothing_evicted=budget is not None and not any(each.evicted for each in mine),
            )
        )
    return found


def _require_room(
    config: PretrainedConfig, spec: CacheSpec, budget: Budget | None, grid: TextGrid
) -> None:
    """Raise ValueError where a cache does not take its budget, or cannot hold the first chunk."""
    # Settings are the same for all pieces: one cache checks them.
    prompt = max(piece.prompt or grid.chunk for piece in grid.pieces)
    try:
        cache = spec.make(config, budget, grid.pieces[0].spans, grid.seed)
        for layer in getattr(cache, "own_layers", ()):
            if layer.policy is not None:
                layer.policy.require_room(prompt, 0)
    except ValueError as error:
        raise ValueError(f"{shown(spec.name, 60)} at {budget}: {error}") from error


def _missing(
    grid: TextGrid, batch: Sequence[Piece], journal: Journal[Reading]
) -> list[tuple[CacheSpec, Budget | None]]:
    """Which caches have not read all of a batch; ValueError for readings of another text."""
    found = []
    for spec, budget in grid.cells:
        readings = [journal.records.get((piece.name, spec.name, budget)) for piece in batch]
        for piece, reading in zip(batch, readings, strict=True):
            if reading is not None and reading.digest != piece.digest(spec):
                raise ValueError(
                    f"{journal.path}: expected the reading of {shown(piece.name)} with "
                    f"{shown(spec.name)} to be of the same text and settings as now, got others "
                    "under these names; choose another file, or other names."
                )
        if None in readings:
            found.append((spec, budget))
    return found


def _read(
    model: PreTrainedModel,
    batch: Sequence[Piece],
    cells: Sequence[tuple[CacheSpec, Budget | None]],
    chunk: int,
    seed: int,
) -> list[Reading]:
    """Read a batch with some caches, side by side with the full one."""
    ids = torch.tensor([piece.ids for piece in batch], device=model.device)
    # A batch of several pieces has neither.
    prompt, spans = batch[0].prompt, batch[0].spans
    full = DynamicCache(config=model.config)
    # The full cell is read once, as what the others are compared with.
    caches = [
        full if spec.is_full else spec.make(model.config, budget, spans, seed)
        for spec, budget in cells
    ]
    feeds = [forwards(model, ids, cache, chunk, prompt) for cache in caches if cache is not full]
    measured: list[list[torch.Tensor]] = [[] for _ in caches]
    place = 1 if prompt is None else prompt
    for first in forwards(model, ids, full, chunk, prompt):
        after = ids[:, place : place + first.shape[1]]
        place += first.shape[1]
        others = iter([next(feed) for feed in feeds])
        for cache, found in zip(caches, measured, strict=True):
            found.append(_measure(first, first if cache is full else next(others), after))
    return [
        reading
        for (spec, budget), cache, found in zip(cells, caches, measured, strict=True)
        for reading in _readings(batch, spec, budget, cache, torch.cat(found, -1), chunk)
    ]


def _readings(
    batch: Sequence[Piece],
    spec: CacheSpec,
    budget: Budget | None,
    cache: Cache,
    measured: torch.Tensor,
    chunk: int,
) -> Iterator[Reading]:
    """Sum up over blocks what `_measure` has found, ``[3, B, n]``, for every piece."""
    held, evicted = [float(len(batch[0].ids))] * len(batch), 0
    if isinstance(cache, ReasonCache):
        report = cache.report()
        counts = torch.tensor([layer.held for layer in report.layers])
        held, evicted = counts.float().mean((0, 2)).tolist(), report.evicted
    for row, piece in enumerate(batch):
        skipped, read = (chunk - 1, 1) if piece.prompt is None else (0, 0)
        blocks = measured[..., skipped:].split(BLOCK, -1)
        tokens = len(piece.ids) - (piece.prompt or 0)
        losses, divergences, agreed = (
            [float(block[kind, row].sum()) for block in blocks] for kind in range(3)
        )
        apart = (measured[2, row] == 0).nonzero()
        yield Reading(
            piece=piece.name,
            cache=spec.name,
            budget=budget,
            digest=piece.digest(spec),
            tokens=tokens,
            sizes=[block.shape[-1] for block in blocks],
            losses=losses,
            divergences=divergences,
            agreed=[round(each) for each in agreed],
            until=int(apart[0]) + read if len(apart) else tokens,
            held=held[row],
            evicted=evicted,
        )


def _measure(full: torch.Tensor, logits: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Loss, divergence and agreement at every token that another one follows, ``[3, B, n]``."""
    count = after.shape[1]
    full, logits = full[:, :count], logits[:, :count]
    agreed = full.argmax(-1) == logits.argmax(-1)
    found = torch.stack([_loss(logits, after), divergence(full, logits), agreed.float()])
    return found.double().cpu()


def _loss(logits: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Loss of the tokens that follow, in nats; the last ones may have none that does."""
    logs = logits[:, : after.shape[1]].float().log_softmax(-1)
    return -logs.gather(-1, after[..., None])[..., 0]


def _estimate(readings: Sequence[Reading], values: Callable[[Reading], list[float]]) -> Estimate:
    sums = [value for each in readings for value in values(each)]
    return Estimate.of_blocks(sums, [size for each in readings for size in each.sizes])


def _difference(readings: Sequence[Reading], others: Sequence[Reading]) -> Estimate:
    """Difference of the losses on the same blocks."""
    pairs = [
        one - other
        for mine, its in zip(readings, others, strict=True)
        for one, other in zip(mine.losses, its.losses, strict=True)
    ]
    return Estimate.of_blocks(pairs, [size for each in readings for size in each.sizes])
