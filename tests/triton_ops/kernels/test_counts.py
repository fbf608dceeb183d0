"""What a step asks of a GPU is what the documentation says: it can be lowered, and never rises."""

from dataclasses import replace

import pytest
import torch

from tests.support import count_steps
from tests.support.count_steps import CASES, Cost, cost_of, documented
from tests.support.fake_device import DEVICE, Counts, MixedDevicesError, fake_device
from triton_ops.backend import interpreting
from triton_ops.merge_state import merge_state

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="the fake device launches kernels in Triton's interpreter"
)

COMMAND = "TRITON_INTERPRET=1 python -m tests.support.count_steps"


def judge(name: str, said: Cost, found: Cost) -> str:
    """Say what to do where the figures are not the documented ones."""
    pairs = list(zip(said.numbers, found.numbers, strict=True))
    advice = []
    if any(now > then for then, now in pairs):
        advice.append(f'Some rose: find the lines with `{COMMAND} "{name}"` and ask for less.')
    if any(now < then for then, now in pairs):
        advice.append(f"Some fell: keep them there with `{COMMAND} --write`.")
    return "\n".join([f"expected {said.row(name)}", f"got      {found.row(name)}", *advice])


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_step_asks_for_what_the_documentation_says(case):
    said, found = documented()[case.name], cost_of(case)
    assert found == said, judge(case.name, said, found)


def test_the_documentation_has_all_cases():
    assert list(documented()) == [case.name for case in CASES]


def test_a_layer_neither_waits_nor_copies_in_an_ordinary_step():
    costs = documented()
    for case in CASES:
        layer, rest = costs[case.name].layer, costs[case.name].rest
        if case.before and not case.evicts and not case.moves:
            # A probe's shadow is in the memory of the host: keys and values of its heads go there.
            shadows = 2 if "probes" in case.name else 0
            assert (layer.synchronisations, layer.copies) == (0, shadows), case.name
        # Looks at the mask: none in a captured step, a second one in a chunk.
        looks = 0 if case.captured else min(case.tokens, 2)
        assert rest.synchronisations <= looks and rest.copies == 0, case.name


def test_a_step_asks_for_no_more_than_that_of_a_dynamic_cache():
    costs, theirs = documented(), documented()["DynamicCache"]
    ordinary = ("no budget", "no budget, padded rows", "budget", "budget, padded rows")
    ordinary += ("no budget, captured", "budget, captured")
    ordinary += ("budget, risk limit", "budget, risk limit, padded rows")
    for name in (*ordinary, "branches", "branches, budget", "windows"):
        for mine, its in ((costs[name].layer, theirs.layer), (costs[name].rest, theirs.rest)):
            assert mine.operations + mine.launches <= its.operations + its.launches, name
            assert mine.synchronisations <= its.synchronisations, name


def test_an_eviction_of_all_layers_asks_for_little_and_never_waits():
    costs = documented()
    for event, ordinary in (
        ("budget, eviction", "budget"),
        ("budget, one of two rows evicts", "budget"),
        ("branches, budget, eviction", "branches, budget"),
        ("branches, budget, padded, two evict", "branches, budget, padded rows"),
    ):
        more, less = costs[event], costs[ordinary]
        assert more.layer == less.layer
        extra = Counts(*more.numbers[4:]) - Counts(*less.numbers[4:])
        assert extra.operations + extra.launches <= 60
        assert extra.synchronisations == extra.copies == 0


def test_a_rise_and_a_fall_are_told_apart():
    base, less, more = (Cost(Counts(n), Counts()) for n in (5, 4, 6))
    assert "rose" in judge("x", base, more) and "fell" not in judge("x", base, more)
    assert "fell" in judge("x", base, less) and "rose" not in judge("x", base, less)
    mixed = judge("x", Cost(Counts(5, 5), Counts()), Cost(Counts(4, 6), Counts()))
    assert "rose" in mixed and "fell" in mixed


def test_launches_are_counted_and_take_no_tensor_of_the_host():
    out, total = torch.randn(2, 5, 4), torch.randn(2, 5)
    expected, _ = merge_state(out[0], total[0], out[1], total[1])
    with fake_device() as device:
        there, sums = out.to(DEVICE), total.to(DEVICE)
        with device.counting() as events:
            merged, _ = merge_state(there[0], sums[0], there[1], sums[1])
        with pytest.raises(MixedDevicesError, match="merge_kernel: expected tensors of the device"):
            merge_state(there[0], sums[0], out[1], total[1])
        assert torch.equal(merged.cpu(), expected)
    assert [event.name for event in events] == ["merge_kernel"]
    assert Counts.of(events) == Counts(launches=1)
    merge_state(out[0], total[0], out[1], total[1])
    assert len(events) == 1, "launches outside are as they were"


def test_layers_that_differ_are_no_layer(monkeypatch):
    events = count_steps.events_of(CASES[0])
    extra = events[-10:]
    last = max(index for index, event in enumerate(events) if event.kind == "mark")
    monkeypatch.setattr(
        count_steps, "events_of", lambda case: [*events[:last], *extra, *events[last:]]
    )
    with pytest.raises(RuntimeError, match="expected layers that do the same"):
        cost_of(CASES[0])


@pytest.mark.parametrize("changes", [{"evicts": 1}, {"moves": True}], ids=str)
def test_another_step_than_the_case_says_is_an_error(changes):
    case = next(case for case in CASES if case.name == "budget")
    with pytest.raises(RuntimeError, match=r"budget: expected .* got \[\(0, False\), "):
        count_steps.events_of(replace(case, **changes))


def test_the_command_shows_the_lines_of_a_case(capsys):
    count_steps.main(["no budget"])
    lines = capsys.readouterr().out
    assert "launch          attend_kernel" in lines and "triton_ops.append.kernel:" in lines
    assert "mark" not in lines
    with pytest.raises(SystemExit):
        count_steps.main(["nothing"])
    assert "expected one of DynamicCache; " in capsys.readouterr().err


def test_the_command_prints_and_writes_the_table(monkeypatch, capsys, tmp_path):
    said, before = documented(), count_steps.DOCS.read_text("utf-8")
    copy = tmp_path / "kernels.md"
    copy.write_text(before.replace("| DynamicCache | ", "| DynamicCache | 9"), "utf-8")
    monkeypatch.setattr(count_steps, "DOCS", copy)
    monkeypatch.setattr(count_steps, "cost_of", lambda case: said[case.name])
    assert documented() != said
    count_steps.main(["--write"])
    assert documented() == said
    above, table, below = count_steps.TABLE.split(copy.read_text("utf-8"))
    assert [above, below] == count_steps.TABLE.split(before)[::2], "the rest stays as it is"
    count_steps.main([])
    assert capsys.readouterr().out == f"{table}\n"
    assert table.startswith(f"torch {torch.__version__}, transformers ")
