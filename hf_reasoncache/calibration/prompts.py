"""Prompts for a calibration: JSON lines, plain text, or a data set of the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_reasoncache.messages import shown
from hf_reasoncache.profiles.schema import everything_in

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt: text, or the messages of a conversation.

    Attributes
    ----------
    content : str or tuple of dict
    place : str
        Where it stands, for errors.
    """

    content: str | tuple[Message, ...]
    place: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text, or of the messages as JSON, in hexadecimal."""
        text = self.content if isinstance(self.content, str) else json.dumps(self.content)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> tuple[int, ...]:
        """Token ids.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
        chat : bool
            Whether a text is the message of a user. Messages get the chat template in any case.

        Raises
        ------
        ValueError
            If the tokenizer has no chat template, the template refuses the messages, the text is
            not Unicode, or there is no token.
        """
        if isinstance(self.content, str) and not chat:
            text, settings = self.content, {}
        else:
            # A template writes the special tokens itself.
            text, settings = self._conversation(tokenizer), {"add_special_tokens": False}
        require_unicode(self.place, text)
        encoded = tokenizer(text, **settings)
        ids = tuple(encoded["input_ids"])
        if not ids:
            raise ValueError(f"{self.place}: expected at least one token, got none.")
        return ids

    def _conversation(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the chat template, up to where the model begins."""
        messages = self.content
        if isinstance(messages, str):
            messages = ({"role": "user", "content": messages},)
        if not tokenizer.chat_template:
            raise ValueError(
                f"{self.place}: expected a tokenizer with a chat template, got one without; give "
                "prompts as plain text."
            )
        # A template is a program of the model's author and may raise anything.
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=False
                )
            )
        except Exception as error:
            raise ValueError(
                f"{self.place}: expected messages that the chat template accepts, got: "
                f"{shown(error, 160)}."
            ) from error


@dataclass(frozen=True)
class PromptSet:
    """Prompts and where they come from.

    Attributes
    ----------
    name : str
        The file's name, or the data set's id and split.
    revision : str or None
        What was asked for of a data set.
    prompts : tuple of Prompt
    """

    name: str
    revision: str | None
    prompts: tuple[Prompt, ...]


def read_prompts(
    source: str,
    *,
    limit: int | None = None,
    split: str = "train",
    column: str | None = None,
    revision: str | None = None,
) -> PromptSet:
    """Read prompts from a file, or else from a data set of the Hub.

    Parameters
    ----------
    source : str
        A file that exists: `.jsonl` holds one object with `prompt` (text or messages) or `messages`
        per line, any other one prompt per line; empty lines are skipped. Otherwise the id of a data
        set, which needs the extra `hf-reasoncache[calibrate]`.
    limit : int, optional
        Take the first so many.
    split : str
        Of a data set.
    column : str, optional
        Field of the prompt, instead of `messages` or `prompt`.
    revision : str, optional
        Of a data set.

    Raises
    ------
    ValueError
        If there is no prompt or one has a wrong form; names file and line.
    FileNotFoundError
        If `source` looks like a file and there is none.
    ModuleNotFoundError
        If a data set is asked for and `datasets` is not installed.
    """
    path = Path(source)
    if path.is_file():
        read = _objects(path, column) if path.suffix == ".jsonl" else _text_lines(path)
        name, revision = path.name, None
    elif path.suffix or path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(f"{source}: expected a file of prompts, got none.")
    else:
        read = _data_set(source, split, column, revision)
        name = f"{source} ({split})"
    prompts = []
    for prompt in read:
        prompts.append(prompt)
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"{source}: expected at least one prompt, got none.")
    return PromptSet(name, revision, tuple(prompts))


def _text_lines(path: Path) -> Iterator[Prompt]:
    for place, line in _lines(path):
        yield Prompt(line, place)


def _objects(path: Path, column: str | None) -> Iterator[Prompt]:
    for place, row in json_lines(path):
        yield _from_row(row, column, place)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and object of each line of a file; empty lines are skipped.

    Raises
    ------
    ValueError
        If a line is not a JSON object, is nested more deeply than 32 levels or has half a
        surrogate pair, or there is no line; names the line.
    """
    place = ""
    for place, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{place}: expected a JSON object, got: {shown(error, 120)}."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}.")
        for each in everything_in(place, row):
            if isinstance(each, str):
                require_unicode(place, each)
        yield place, row
    if not place:
        raise ValueError(f"{path}: expected JSON lines, got none.")


def require_unicode(name: str, text: str) -> None:
    """Raise ValueError for text with half a surrogate pair, which neither tokens nor files hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected Unicode text, got half of a surrogate pair, "
            f"{shown(text[error.start])}."
        ) from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                line = data.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: expected UTF-8, got: {shown(error)}.") from error
            if line:
                yield place, line


def _data_set(name: str, split: str, column: str | None, revision: str | None) -> Iterator[Prompt]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}: expected a file, or the package datasets to load a data set of this id, got "
            "neither; check the path, or pip install 'hf-reasoncache[calibrate]'.",
            name=error.name,
        ) from error
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        name, split=split, revision=revision, streaming=True
    )
    for index, row in enumerate(rows):
        yield _from_row(row, column, f"{name} ({split}), row {index}")


def _from_row(row: Mapping[str, Any], column: str | None, place: str) -> Prompt:
    field = column or ("messages" if "messages" in row else "prompt")
    if field not in row:
        wanted = shown(column) if column else "'prompt' or 'messages'"
        raise ValueError(f"{place}: expected a field {wanted}, got {shown(sorted(row))}.")
    content = row[field]
    if isinstance(content, str) and content.strip():
        return Prompt(content, place)
    if isinstance(content, list) and content and all(map(_is_message, content)):
        return Prompt(tuple(dict(message) for message in content), place)
    raise ValueError(
        f"{place}: expected {shown(field)} to be text that is not empty, or messages with role and "
        f"content, got {shown(content)}."
    )


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value
