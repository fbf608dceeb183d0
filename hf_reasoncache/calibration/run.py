"""One calibration, from prompts to profile, in as many processes as accelerate started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.calibration.checkpoint import Checkpoint
from hf_reasoncache.calibration.estimate import Estimate, Estimator, Record
from hf_reasoncache.calibration.prompts import PromptSet
from hf_reasoncache.calibration.queries import measure_queries, require_rotation
from hf_reasoncache.calibration.settings import CalibrationSettings, digest, plain, versions
from hf_reasoncache.calibration.together import Check
from hf_reasoncache.calibration.traces import Trace, generate_traces
from hf_reasoncache.calibration.tune import Tune, Tuned, choose
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.outputs import new_directory, sole_writer
from hf_reasoncache.processes import Processes
from hf_reasoncache.profiles.files import expect_place
from hf_reasoncache.profiles.fingerprint import fingerprint
from hf_reasoncache.profiles.profile import BudgetProfile
from hf_reasoncache.profiles.provenance import Calibration


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    directory: str | Path,
    settings: CalibrationSettings | None = None,
    *,
    resume: bool = True,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> BudgetProfile:
    """Measure a model and save its profile.

    Every finished prompt is written to `<directory>.partial`, which is deleted in the end; a run
    that was killed goes on from there and gives the same profile, bit for bit. One that failed
    because of the estimator's settings keeps its answers for the next. Started by `accelerate
    launch` or `torchrun`, the processes share the prompts and all of them return the profile; they
    must see the same file system.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention.
    tokenizer : PreTrainedTokenizerBase
    prompts : PromptSet
        See `read_prompts`.
    directory : str or Path
        Where the profile goes.
    settings : CalibrationSettings, optional
    resume : bool
        Whether to go on with an unfinished run; False throws it away.
    progress : bool, optional
        Show progress bars; by default where standard error is a terminal.
    say : Callable[[str], None]
        Gets a line about each part of the work, in the main process.

    Raises
    ------
    ValueError
        If a prompt is unusable, prompts are too few or their completions too short, the directory
        is something else, another run writes it, or `<directory>.partial` holds answers of another
        model, to other prompts or under other settings.
    ConnectionError
        If another process has ended.
    """
    settings = settings or CalibrationSettings()
    # Beside it go its parts and its lock, also where it is called "." or "..".
    directory = Path(os.path.abspath(directory))
    expect_place(directory)
    run = _Run(model, tokenizer, prompts, settings, directory, progress, say)
    new_directory(directory.parent)
    with sole_writer(directory, is_main=run.processes.is_main):
        return run.profile(resume)


class _Run:
    """The state that the steps of one calibration share."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptSet,
        settings: CalibrationSettings,
        directory: Path,
        progress: bool | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.settings, self.prompts = model, settings, prompts
        self.directory, self.progress, self.say = directory, progress, say
        self.ids = [each.encode(tokenizer, chat=settings.chat) for each in prompts.prompts]
        self.seen, self.held_out = list(range(len(self.ids))), list[int]()
        if settings.tune is not None:
            self.seen, self.held_out = settings.tune.split(len(self.ids))
        sizes, most = list(map(len, self.ids)), settings.traces.max_new_tokens
        settings.estimator.expect([sizes[place] for place in self.seen], most)
        if settings.tune is not None:
            settings.tune.eviction.expect_room("budget", settings.tune.budget, sizes)
        if settings.check is not None:
            settings.check.eviction.expect_room("budget", settings.check.budget, sizes)
        if settings.queries:
            require_rotation(model)
        self.geometry = Geometry.of(model.config)
        self.fingerprint = fingerprint(model)
        self.processes = Processes.of(model)
        self.checkpoint = Checkpoint(directory.with_name(f"{directory.name}.partial"))

    def profile(self, resume: bool) -> BudgetProfile:
        """Go through all steps."""
        if self.processes.is_main:
            self.checkpoint.begin(self.identity(), resume=resume)
        self.processes.wait()
        self.tell_bounds()
        traces = self.traces()
        estimator = self.settings.estimator.resolve([traces[place] for place in self.seen])
        seen = {place: traces[place] for place in self.seen}
        records, found = self.estimate(estimator, seen)
        if self.settings.queries:
            more = self.queries(seen)
            records = [{**record, **other} for record, other in zip(records, more, strict=True)]
        settings = replace(self.settings, estimator=estimator).to_json()
        if self.settings.tune is not None:
            held = {place: traces[place] for place in self.held_out}
            tuned, report = self.tuned(self.settings.tune.resolve(traces), found, held)
            found, settings = replace(found, rule=tuned.rule), settings | {"tune": report}
        if self.settings.check is not None:
            settings |= {"check": self.checked(self.settings.check, found, seen)}
        by_head = found.head_demand
        profile = BudgetProfile(
            base_model=_name(self.model),
            base_model_revision=getattr(self.model.config, "_commit_hash", None),
            fingerprint=self.fingerprint,
            geometry=self.geometry,
            estimator=estimator.name,
            demand=tuple(found.demand.tolist()),
            standard_error=tuple(found.standard_error.tolist()),
            head_demand=None if by_head is None else tuple(map(tuple, by_head.tolist())),
            rule=found.rule,
            calibration=Calibration(
                data=self.prompts.name,
                data_revision=self.prompts.revision,
                prompts=self.digests(self.seen),
                seed=self.settings.traces.seed,
                tokens=sum(len(traces[place].completion) for place in self.seen),
                settings=settings | self.precision(),
                versions=versions(),
            ),
            statistics={name: torch.stack([r[name] for r in records]) for name in records[0]},
        )

        def finish() -> None:
            profile.save_pretrained(self.directory)
            self.checkpoint.remove()

        # Not earlier: until all are here, another process may still read the checkpoint.
        self.processes.main_only(finish)
        return profile

    def traces(self) -> list[Trace]:
        """Complete all prompts; the processes share the batches."""
        size = self.settings.traces.batch_size
        batches = [range(i, min(i + size, len(self.ids))) for i in range(0, len(self.ids), size)]
        mine = self.processes.share(list(enumerate(batches)))
        total = sum(len(batch) for _, batch in mine)
        with self.processes.bar(total, "prompt", "answers", self.progress) as bar:
            for index, batch in mine:
                if any(self.checkpoint.load(f"trace-{place:06d}") is None for place in batch):
                    prompts = [self.ids[place] for place in batch]
                    made = generate_traces(self.model, prompts, self.settings.traces, stream=index)
                    for place, trace in zip(batch, made, strict=True):
                        part = {"completion": torch.tensor(trace.completion)}
                        self.checkpoint.save(f"trace-{place:06d}", part)
                bar.update(len(batch))
        self.processes.wait()
        completions = (
            self.checkpoint.require(f"trace-{place:06d}")["completion"].tolist()
            for place in range(len(self.ids))
        )
        return [Trace(ids, tuple(c)) for ids, c in zip(self.ids, completions, strict=True)]

    def estimate(
        self, estimator: Estimator, traces: Mapping[int, Trace]
    ) -> tuple[list[Record], Estimate]:
        """Measure these prompts, by their place, and join what was found."""
        records = self.records(
            f"{estimator.name}-{digest(plain(estimator))}",
            traces,
            lambda trace: estimator.measure(self.model, trace),
            lambda some: estimator.cost(some, self.geometry),
        )
        return records, estimator.estimate(records, list(traces.values()))

    def queries(self, traces: Mapping[int, Trace]) -> list[Record]:
        """Measure the queries of these prompts, by their place."""
        return self.records(
            "queries",
            traces,
            lambda trace: measure_queries(self.model, trace),
            lambda some: sum(trace.length - 1 for trace in some),
        )

    def tuned(
        self, tune: Tune, found: Estimate, traces: Mapping[int, Trace]
    ) -> tuple[Tuned, dict[str, Any]]:
        """Choose a rule on the prompts held out; also return what the profile says about it."""
        candidates = tune.candidates(found)
        rules = list(candidates.values())
        records = self.records(
            f"tune-{digest([plain(tune), found.demand.tolist()])}",
            traces,
            lambda trace: tune.measure(self.model, trace, found, rules),
            lambda some: tune.cost(some, len(rules)),
        )
        result = choose(torch.stack([record["divergence"] for record in records]), candidates)
        for comparison in result.comparisons:
            self.tell(f"tuned rule {comparison}")
        self.tell(f"rule: {result.rule}")
        return result, plain(tune) | {
            "prompts": self.digests(traces),
            "outcome": result.to_json(),
        }

    def checked(
        self, check: Check, found: Estimate, traces: Mapping[int, Trace]
    ) -> dict[str, Any] | None:
        """Compare with equal layers on these prompts; return what the profile says about it."""
        some = list(traces.values())
        resolved = check.resolve(some)
        if resolved is None:
            self.tell("check: left out, no text is long enough for an eviction")
            return None
        records = self.records(
            f"check-{digest([plain(resolved), found.demand.tolist(), vars(found.rule)])}",
            traces,
            lambda trace: resolved.measure(self.model, trace, found),
            resolved.cost,
        )
        outcome = resolved.outcome(records)
        self.tell(f"check: on these texts, at {resolved.budget} tokens {outcome}")
        return plain(resolved) | {"outcome": outcome.to_json()}

    def records(
        self,
        name: str,
        traces: Mapping[int, Trace],
        measure: Callable[[Trace], Record],
        cost: Callable[[Sequence[Trace]], int],
    ) -> list[Record]:
        """Measure prompts, which the processes share; the name is that of the parts."""
        places, kind = list(traces), name.partition("-")[0]
        parts = {place: f"{name}-{place:06d}" for place in places}
        self.tell(f"{kind}: {cost(list(traces.values())):,} tokens to read")
        mine = self.processes.share(places)
        todo = [place for place in mine if self.checkpoint.load(parts[place]) is None]
        with self.processes.bar(len(mine), "prompt", kind, self.progress) as bar:
            bar.update(len(mine) - len(todo))
            for count, place in enumerate(todo):
                begin = time.perf_counter()
                self.checkpoint.save(parts[place], measure(traces[place]))
                if count == 0 and len(todo) > 1:
                    rate = (time.perf_counter() - begin) / max(cost([traces[place]]), 1)
                    left = rate * cost([traces[other] for other in todo[1:]])
                    self.tell(f"{kind}: about {max(left / 60, 0.1):.1f} minutes left")
                bar.update()
        self.processes.wait()
        return [self.checkpoint.require(part) for part in parts.values()]

    def tell_bounds(self) -> None:
        """Say what the run takes at most, before there are answers."""
        most, estimator = self.settings.traces.max_new_tokens, self.settings.estimator
        sizes = [len(self.ids[place]) for place in self.seen]
        tokens = estimator.bound(sizes, most, self.geometry)
        self.tell(f"answers: at most {len(self.ids)} x {most:,} tokens to write")
        tuning = f", then tuning on {len(self.held_out)} of the texts" * bool(self.held_out)
        self.tell(f"{estimator.name}: at most {tokens:,} tokens to read{tuning}")
        if self.settings.check is not None:
            tokens = self.settings.check.cost(Trace.longest(sizes, most))
            self.tell(f"check: at most {tokens:,} tokens to read")

    def tell(self, line: str) -> None:
        """Say something once, however many processes there are."""
        if self.processes.is_main:
            self.say(line)

    def digests(self, places: Iterable[int]) -> tuple[str, ...]:
        """SHA-256 of some prompts."""
        return tuple(self.prompts.prompts[place].digest for place in places)

    def precision(self) -> dict[str, str]:
        """What rounding depends on."""
        return {"dtype": str(self.model.dtype), "device": self.model.device.type}

    def identity(self) -> dict[str, Any]:
        """All that the answers depend on."""
        return {
            "model": self.fingerprint,
            "prompts": digest(self.ids),
            **plain(self.settings.traces),
            **self.precision(),
            **versions(),
        }


def _name(model: PreTrainedModel) -> str:
    """Id on the Hub, or the name of the directory."""
    name = model.config._name_or_path
    return Path(name).resolve().name if Path(name).exists() else name or type(model).__name__
