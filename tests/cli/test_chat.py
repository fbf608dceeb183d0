"""`chat`: what is typed is answered, and what the cache holds is said."""

import builtins
import re

import pytest

from tests.support.models import build
from tests.support.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = build("llama")
    model.resize_token_embeddings(320)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def typed(monkeypatch):
    """Types lines, then ends the input."""

    def call(*lines):
        left = iter(lines)

        def line(prompt):
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", line)

    return call


def chat(run, saved, *options):
    small = ("--max-new-tokens", 24, "--temperature", 0, "--threads", 1, "--dtype", "float32")
    return run("chat", saved, *small, *options)


def test_a_budget_is_kept_and_said(run, saved, typed):
    typed("the key", "", "never reveal", "/quit", "not read")
    code, out, err = chat(run, saved, "--budget", 16, "--buffer", 4, "--cache", "rkv:prompt=evict")
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("[")]
    assert len(lines) == 2
    for line in lines:
        held, seen = map(int, re.match(r"\[(\d+) of (\d+) tokens held per head", line).groups())
        assert held <= 20 < seen
        assert len(line) <= 80
    assert out.strip()


def test_the_full_cache_and_a_new_conversation(run, saved, typed):
    typed("the key", "/new", "the key")
    code, out, err = chat(run, saved, "--cache", "full")
    assert code == 0
    seen = re.findall(r"\[(\d+) tokens held", err)
    assert len(seen) == 2 and seen[0] == seen[1]
    half = len(out) // 2
    assert out[:half] == out[half:]


def test_what_is_wrong_is_said_before_a_model_is_loaded(run):
    code, _, err = run("chat", "no/model", "--cache", "full", "--budget", 9)
    assert code and "--budget: expected none with the full cache, got 9" in err
    code, _, err = run("chat", "no/model")
    assert code and "--budget: expected one for reason-alloc, got None" in err
    code, _, err = run("chat", "no/model", "--budget", 64, "--temperature", 11)
    assert code and "temperature: expected 0 to 10" in err
