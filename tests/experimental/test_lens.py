"""The logit lens against hidden states, and exits against brute force."""

import pytest
import torch

from hf_reasoncache.experimental.lens import LensExit, LogitLens
from tests.support.models import build, prompt


def brute_force(model, ids, exit):
    """Exit layer and its logits for the newest token of each row, from all hidden states."""
    decoder = model.get_decoder()
    found = []
    captured = []
    hooks = [
        layer.register_forward_hook(
            lambda m, i, o: captured.append(o[0] if isinstance(o, tuple) else o)
        )
        for layer in decoder.layers
    ]
    final = model(ids).logits[:, -1]
    for hook in hooks:
        hook.remove()
    for row in range(len(ids)):
        previous = None
        for depth, hidden in enumerate(captured):
            logits = model.lm_head(decoder.norm(hidden[row, -1]))
            entropy = float(torch.distributions.Categorical(logits=logits).entropy())
            last = depth == len(captured) - 1
            steady = previous is not None and abs(entropy - previous) < exit.change
            if last or (depth >= exit.after and entropy < exit.entropy and steady):
                found.append((depth, logits, not last))
                break
            previous = entropy
    return found, final


@pytest.mark.parametrize(
    ("exit", "exits"),
    [(LensExit(3.0, 1.5, 1), True), (LensExit(4.0, 0.5, 1), True), (LensExit(), False)],
)
@torch.no_grad()
def test_exits_are_those_of_all_hidden_states(exit, exits):
    model = build("llama", "sdpa")
    ids = prompt(batch=8, padding=(0,) * 8)["input_ids"]
    expected, final = brute_force(model, ids, exit)
    with LogitLens(model, exit) as lens:
        logits = model(ids).logits[:, -1]
    torch.testing.assert_close(logits, final)
    taken, exited = lens.latest
    for row, (_, own, early) in enumerate(expected):
        torch.testing.assert_close(taken[row], own, atol=1e-4, rtol=1e-4)
        assert bool(exited[row]) == early
    report = lens.report()
    assert (report.tokens, report.layers) == (8, 3)
    assert report.exited == sum(early for *_, early in expected)
    assert bool(report.exited) == exits
    assert report.depth == sum(depth + 1 for depth, *_ in expected) / 8
    agreed = sum(
        int(own.argmax() == final[row].argmax())
        for row, (_, own, early) in enumerate(expected)
        if early
    )
    assert report.agreed == agreed


def test_generation_goes_on_with_the_exits_logits():
    model = build("qwen3", "sdpa")
    arguments = prompt() | dict(do_sample=False, max_new_tokens=10)
    plain = model.generate(**arguments)
    never = LensExit(1e-9, 1e-9, 1)
    with LogitLens(model, never) as lens:
        assert torch.equal(model.generate(**arguments, logits_processor=[lens.processor]), plain)
    assert lens.report().exited == 0 and "nan" in str(lens.report())
    always = LensExit(100.0, 100.0, 1)
    with LogitLens(model, always) as lens:
        out = model.generate(**arguments, logits_processor=[lens.processor])
    report = lens.report()
    assert (report.tokens, report.exited, report.depth) == (20, 20, 2.0)
    assert not torch.equal(out, plain)
    assert not any(layer._forward_hooks for layer in model.get_decoder().layers)


def test_softcapped_logits_are_capped():
    model = build("gemma3", "sdpa")
    model.config.final_logit_softcapping = 2.0
    ids = prompt(padding=())["input_ids"]
    with torch.no_grad(), LogitLens(model, LensExit(1e-9, 1e-9)) as lens:
        logits = model(ids).logits[:, -1]
    torch.testing.assert_close(lens.latest[0], logits, atol=1e-5, rtol=1e-5)


def test_misuse_says_what_to_do():
    model = build("llama", "sdpa")
    lens = LogitLens(model)
    with pytest.raises(ValueError, match="inside `with LogitLens"):
        model.generate(**prompt(), max_new_tokens=2, logits_processor=[lens.processor])
    for name in ("entropy", "change"):
        with pytest.raises(ValueError, match=f"{name}: expected nats > 0"):
            LensExit(**{name: 0.0})
    with pytest.raises(ValueError, match="after: expected"):
        LensExit(after=0)
    model.model.norm = None
    with pytest.raises(ValueError, match="a final norm"):
        LogitLens(model)
