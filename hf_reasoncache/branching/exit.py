"""Stops branches that are done, weak, or no longer needed: a stopping criterion for generate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from hf_reasoncache.arguments import require_int
from hf_reasoncache.branching.confidence import ConfidenceRecorder
from hf_reasoncache.branching.exit_monitor import ExitMonitor
from hf_reasoncache.branching.recording import Recording, read_answer
from hf_reasoncache.branching.rules import ExitRules
from hf_reasoncache.branching.vote import Reason, VoteResult, Weight, majority, vote


class ConfidentExit(StoppingCriteria):
    """Early exit for several branches of each problem; a row of generate is a branch.

    Parameters
    ----------
    answer : Callable
        Reads the answer of a branch: gets what the branch has generated (text, special tokens
        included; without a tokenizer, the ids as a LongTensor[T] on the CPU) and returns a string,
        or None where there is no answer yet. Equal strings are equal answers, so normalise here.
    branches : int
        Branches of each problem: `num_return_sequences`. Rows of a problem stand beside each other,
        as generate puts them.
    tokenizer : PreTrainedTokenizerBase, optional
        Decodes the text for `answer`.
    eos_token_id : int or iterable of int, optional
        Ids that end a branch. Pass `model.generation_config.eos_token_id`: many models end on more
        ids than the default, which is `tokenizer.eos_token_id`.
    rules : ExitRules
        By default, certain consensus only.
    top_k : int
        See `ConfidenceRecorder`.

    Attributes
    ----------
    recorder : ConfidenceRecorder
        Goes to the same generate call as a logits processor. Rules that look at confidence need
        it; without them it is optional.

    Raises
    ------
    ValueError
        If an argument is out of range; and while generating, if the rows are no multiple of
        `branches`, are reordered (beams), grow by more than one token at a time (assisted
        decoding), come from another generation than before, or a rule needs the recorder and
        generate does not run it.

    Examples
    --------
    >>> exit = ConfidentExit(read_answer, branches=16, tokenizer=tokenizer)
    >>> model.generate(**inputs, do_sample=True, num_return_sequences=16, max_new_tokens=4096,
    ...                stopping_criteria=[exit], logits_processor=[exit.recorder])
    >>> exit.results()[0].answer

    Notes
    -----
    From RKSC (arXiv 2606.09937): the thresholds of `DecodeExit`. From DeepConf (arXiv 2508.15260):
    group confidence. Ours: an exit needs an answer, consensus, and thresholds calibrated to an
    error rate (`calibrate_exit`). generate goes on with padding in rows that have stopped, so time
    is saved only when all rows of a batch have; tokens are counted until a row stopped.
    """

    def __init__(
        self,
        answer: Callable[[Any], str | None],
        *,
        branches: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        rules: ExitRules | None = None,
        top_k: int = 20,
    ) -> None:
        require_int("branches", branches, low=1)
        require_int("top_k", top_k, low=2)
        if eos_token_id is None:
            eos_token_id = None if tokenizer is None else tokenizer.eos_token_id
        if eos_token_id is None:
            raise ValueError(
                "eos_token_id: expected the ids that end a branch, got None and no tokenizer that "
                "has one; pass model.generation_config.eos_token_id."
            )
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self.answer, self.tokenizer, self.branches = answer, tokenizer, branches
        self.rules = ExitRules() if rules is None else rules
        self.recorder = ConfidenceRecorder(top_k)
        self._ends = torch.tensor(ends)
        self.reset()

    def reset(self) -> None:
        """Get ready for another generation."""
        self.recorder.reset()
        self._prompt = 0
        self._ids: torch.Tensor | None = None
        self._monitor: ExitMonitor | None = None
        self._confidences: list[torch.Tensor] = []

    def __call__(
        self, input_ids: torch.LongTensor, scores: Any = None, **kwargs: Any
    ) -> torch.BoolTensor:
        """Judge the newest token of every row.

        Parameters
        ----------
        input_ids : LongTensor[B, T]
        scores
            Not used; see `ConfidenceRecorder`.

        Returns
        -------
        BoolTensor[B]
            Rows that have stopped.
        """
        monitor = self._follow(input_ids)
        confidence = self.recorder.take(input_ids.shape[1] - 1, len(input_ids))
        if confidence is not None:
            self._confidences.append(confidence)
        complete = len(self._confidences) == monitor.steps + 1
        if not complete and (self._confidences or self.rules.needs_confidence):
            raise ValueError(
                "expected the confidence of every step, got a step without; pass "
                "logits_processor=[exit.recorder] together with stopping_criteria=[exit]."
            )
        ended = torch.isin(input_ids[:, -1].cpu(), self._ends)
        monitor.step(ended, confidence)
        stopped: Any = ~monitor.running
        return stopped.to(input_ids.device)

    def _follow(self, input_ids: torch.LongTensor) -> ExitMonitor:
        """Check that the ids are the last ones and one more token."""
        rows, tokens = input_ids.shape
        if self._monitor is None:
            if rows % self.branches:
                raise ValueError(
                    f"expected {self.branches} rows per problem, got a batch of {rows}; set "
                    f"branches to num_return_sequences, or repeat every prompt {self.branches} "
                    "times."
                )
            self._prompt = tokens - 1
            self._monitor = ExitMonitor(self.rules, rows, self.branches, self._read)
        elif (
            self._ids is None
            or not bool(self._monitor.running.any())
            or self._ids.shape != (rows, tokens - 1)
            or not torch.equal(self._ids, input_ids[:, :-1])
        ):
            raise ValueError(
                f"expected the {self._monitor.steps} tokens of before and one more, got other ids "
                f"of shape {list(input_ids.shape)}: a new generation (call reset() first), "
                "reordered rows (beam search), or several tokens at a time (assisted decoding), "
                "which are not supported."
            )
        self._ids = input_ids
        return self._monitor

    def _generated(self) -> torch.Tensor:
        if self._ids is None:
            raise ValueError("expected a generation, got none; pass this object to generate first.")
        return self._ids[:, self._prompt :]

    def _read(self, row: int) -> str | None:
        return read_answer(self.answer, self._generated()[row].cpu(), self.tokenizer)

    def results(self, weight: Weight = majority) -> list[VoteResult]:
        """Return the vote of every problem, in the order of the prompts.

        Parameters
        ----------
        weight : Callable[[Branch], float]
            See `vote`. Certain consensus is certain for `majority`; other weights may decide
            otherwise.

        Raises
        ------
        ValueError
            If nothing was generated, or as `vote`.
        """
        if self._monitor is None:
            raise ValueError("results: expected a generation, got none; pass this to generate.")
        return [vote(branches, weight) for branches in self._monitor.results()]

    def recordings(self) -> list[Recording]:
        """Return every problem's branches token by token, for `calibrate_exit` and `replay`.

        Raises
        ------
        ValueError
            If nothing was generated, a rule stopped a branch, or the recorder did not run.
        """
        found = self.results()
        if not self._confidences or any(result.stopped for result in found):
            raise ValueError(
                "recordings: expected a run with the recorder in which no rule stopped a branch, "
                "got another; use rules=ExitRules(consensus=None) and "
                "logits_processor=[exit.recorder]."
            )
        ids = self._generated().cpu()
        confidence = torch.stack(self._confidences, 1)
        recordings = []
        for problem, result in enumerate(found):
            first = problem * self.branches
            rows = [(first + i, branch.tokens) for i, branch in enumerate(result.branches)]
            recordings.append(
                Recording(
                    ids=tuple(ids[row, :tokens] for row, tokens in rows),
                    confidence=tuple(confidence[row, :tokens] for row, tokens in rows),
                    answers=tuple(branch.answer for branch in result.branches),
                    ended=tuple(branch.reason is Reason.END for branch in result.branches),
                )
            )
        return recordings
