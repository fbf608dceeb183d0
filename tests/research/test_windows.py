"""The examples of the windows run as their page says, and count what the cache does."""

import sys

import torch

from examples.research import window_picture, window_recall
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import SlidingWindowCompressCache
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import Random


def test_words_that_survive_are_drawn(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "words.png"
    monkeypatch.setattr(sys, "argv", ["window_picture", "--output", str(picture)])
    window_picture.main()
    out = capsys.readouterr().out
    assert out.startswith("answer right after ")
    assert max(len(line) for line in out.splitlines() if "picture in" not in line) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_recall_is_a_table_that_an_oracle_leads(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["window_recall", "--problems", "3"])
    window_recall.main()
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80
    all_layers = {
        name: int(next(line for line in out if line.startswith(name))[22:].split()[4])
        for name in window_recall.CHOICES
    }
    assert max(all_layers, key=all_layers.get) == "oracle, tokens"
    assert abs(all_layers["random, tokens"] - 30) < 8, "the ratio"


@torch.inference_mode()
def test_recall_counts_the_windows_and_budgets_of_the_cache(monkeypatch):
    model, tokenizer = load(MODELS["llama"])
    problem = make_problems("chain", 1, DEVELOPMENT_SEEDS[100], "llama")[0]
    reading, prompt = window_recall.read(model, tokenizer, problem)
    kept = []
    monkeypatch.setattr(window_recall, "CHOICES", {"random": (lambda _: Random(), 0.5)})
    monkeypatch.setattr(
        window_recall.Tally,
        "add",
        lambda self, name, column, needed, keep: kept.append(keep) if column == "all" else None,
    )
    window_recall.count(reading, prompt, 0.3, window_recall.Tally())
    model.set_attn_implementation("reasoncache")
    cache = SlidingWindowCompressCache(
        model.config,
        window=window_recall.WINDOW,
        recent=window_recall.RECENT,
        ratio=0.3,
        scorer=Random(),
    )
    ids = tokenizer(f"{problem.prompt} {problem.solution}", return_tensors="pt")["input_ids"]
    for part in [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]:
        model(input_ids=part, **cache_kwarg(cache))
    for layer in range(4):
        spans = list(window_recall.windows(prompt, ids.shape[1], layer, 4))
        assert len(spans) > 3
        for low, high in spans:
            marks = kept.pop(0)
            for head, held in enumerate(cache.held_positions(layer)[0]):
                assert {at for at in held if low <= at < high} == {
                    low + place for place in marks[head].nonzero()[:, 0].tolist()
                }
    assert not kept
