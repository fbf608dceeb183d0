"""Prompts: every form is read, every fault names its line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from examples.tiny_reasoner import MODELS
from hf_reasoncache.calibration.prompts import Prompt, read_prompts
from hf_reasoncache.messages import LONGEST

CHAT = [{"role": "user", "content": "walk"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS["llama"])


def write(path: Path, *rows: object) -> str:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


def test_json_lines_hold_prompts_or_messages(tmp_path: Path) -> None:
    rows = [{"prompt": "a b"}, "\n", {"messages": CHAT, "prompt": "no"}, {"prompt": CHAT}]
    found = read_prompts(write(tmp_path / "x.jsonl", *rows))
    assert [prompt.content for prompt in found.prompts] == ["a b", tuple(CHAT), tuple(CHAT)]
    assert (found.name, found.revision) == ("x.jsonl", None)
    assert found.prompts[1].place.endswith("x.jsonl:3")


def test_text_holds_one_prompt_per_line(tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "x.txt", "one\n\n  two \n", "three"), limit=2)
    assert [prompt.content for prompt in found.prompts] == ["one", "two"]


def test_another_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "problem": "b"})
    assert read_prompts(path, column="problem").prompts[0].content == "b"
    with pytest.raises(ValueError, match=r"x.jsonl:1: expected a field 'question', got \['problem"):
        read_prompts(path, column="question")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": "a"}', "expected a field 'prompt' or 'messages'"),
        ('{"prompt": ""}', "text that is not empty"),
        ('{"prompt": 3}', "got 3"),
        ('{"messages": []}', "messages with role and content"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"prompt": "a", "more": ' + "[" * 50 + "]" * 50 + "}", "at most 32 levels"),
        ('{"prompt": "a \\ud800 b"}', "Unicode text, got half of a surrogate pair, '\\ud800'"),
        ('{"prompt": "a", "\\udc00": 1}', "Unicode text"),
        ('{"prompt": ' + "[1," * 30 + "1" + "]" * 30 + "}", "got [1, [1, [1"),
        ('{"messages": [{"role": "user"}]}', "messages with role and content"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "good"}, line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: ") as caught:
        read_prompts(path)
    assert message in str(caught.value)
    assert len(str(caught.value).replace(path, "")) <= LONGEST


def test_bad_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"x.txt:2: expected UTF-8"):
        read_prompts(str(tmp_path / "x.txt"))


@given(data=st.binary(max_size=200))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="expected"):
        read_prompts(str(path))


def test_no_file_and_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a file of prompts"):
        read_prompts(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="expected a file of prompts"):
        read_prompts("missing.jsonl")
    with pytest.raises(ValueError, match="at least one prompt"):
        read_prompts(write(tmp_path / "x.txt", "\n \n"))


def test_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(name: str, **arguments: object) -> list[dict]:
        asked.update(name=name, **arguments)
        return [{"problem": "1 + 1"}, {"problem": "2 + 2"}, {"problem": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_prompts("org/math", column="problem", split="test", revision="abc", limit=2)
    assert [prompt.content for prompt in found.prompts] == ["1 + 1", "2 + 2"]
    assert (found.name, found.revision) == ("org/math (test)", "abc")
    assert asked == {"name": "org/math", "split": "test", "revision": "abc", "streaming": True}
    with pytest.raises(ValueError, match=r"org/math \(train\), row 2: expected 'problem'"):
        read_prompts("org/math", column="problem")


def test_a_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-reasoncache\[calibrate\]'"):
        read_prompts("org/math")


def test_text_is_encoded_as_it_is_and_chat_by_the_template(tokenizer) -> None:
    plain, chat = Prompt("<bos> walk", "x:1"), Prompt(tuple(CHAT), "x:2")
    assert plain.encode(tokenizer, chat=False) == tuple(tokenizer("<bos> walk")["input_ids"])
    for prompt, wrap in ((chat, False), (Prompt("walk", "x:3"), True)):
        with pytest.raises(ValueError, match=f"{prompt.place}: expected a tokenizer with a chat"):
            prompt.encode(tokenizer, chat=wrap)
    templated = AutoTokenizer.from_pretrained(MODELS["llama"])
    templated.chat_template = "<bos> {{ messages[0].content }} <think>"
    expected = tuple(tokenizer("<bos> walk <think>")["input_ids"])
    assert chat.encode(templated, chat=False) == expected
    assert Prompt("walk", "x:3").encode(templated, chat=True) == expected
    templated.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"x:2: .* roles must alternate"):
        chat.encode(templated, chat=False)


def test_half_a_surrogate_pair_is_no_text(tokenizer) -> None:
    with pytest.raises(ValueError, match="x:4: expected Unicode text"):
        Prompt("a \ud800 b", "x:4").encode(tokenizer, chat=False)


def test_a_digest_tells_prompts_apart() -> None:
    same = Prompt("a", "x:1").digest, Prompt("a", "y:2").digest
    assert same[0] == same[1] != Prompt("b", "x:1").digest
    assert len(Prompt(tuple(CHAT), "x:1").digest) == 64
