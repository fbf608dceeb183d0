"""The guard on made-up error curves: who gets more, who pays, and what it never exceeds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache.risk import Damage, Risk
from hf_reasoncache.risk.guard import Guard

BUDGETS, BUFFER = 16, 8


class Heads:
    """Heads whose error falls with what they keep, at a rate of their own: exp(-rate * kept)."""

    def __init__(self, rates):
        self.rates = torch.tensor(rates)
        self.weighed = 0

    def keep(self, per_head):
        return torch.arange(BUDGETS + BUFFER) < per_head[..., None]

    def measure(self, keeps):
        self.weighed += len(keeps)
        errors = [(-self.rates * keep.sum(-1)).exp() for keep in keeps]
        return [Damage(mass=e, error=e, worst=e) for e in errors]

    def run(self, guard, spare=6):
        self.per_head = torch.full(self.rates.shape, BUDGETS)
        self.bounds = torch.full_like(self.per_head, 4), self.per_head + spare
        keep, damage = guard.choose(self, self)
        return keep.sum(-1), damage.error


def test_below_the_limit_nothing_changes_and_one_look_is_enough():
    heads = Heads([[0.5, 0.4]])
    kept, _ = heads.run(Guard(0.01))
    assert kept.tolist() == [[16, 16]] and heads.weighed == 1


def test_shrink_gives_what_it_takes_and_abstain_all_there_is():
    # exp(-0.26 * 16) = 0.0156: one step of 1 is too little, three are enough.
    rates = [[0.26, 0.5, 0.01]]
    kept, error = Heads(rates).run(Guard(0.01))
    assert kept.tolist() == [[18, 16, 22]] and error[0, 0] <= 0.01
    kept, _ = Heads(rates).run(Guard(0.01, "abstain"))
    assert kept.tolist() == [[22, 16, 22]]


def test_move_lowers_the_largest_error_and_keeps_the_sum():
    rates = [[0.02, 0.5, 0.6]]
    kept, error = Heads(rates).run(Guard(0.01, "move"))
    assert kept.sum() == 48 and kept[0, 0] == 20, "four steps of one token"
    assert error[0, 0] < torch.tensor(-0.02 * 16).exp()


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["shrink", "abstain", "move"]),
    st.floats(0.0, 0.5),
    st.integers(0, 8),
)
def test_bounds_hold_whatever_happens(rates, action, limit, spare):
    heads = Heads(rates)
    kept, error = heads.run(Guard(limit, action), spare)
    before = (-heads.rates * BUDGETS).exp()
    assert (kept <= BUDGETS + spare).all()
    assert (kept >= 4).all()
    if action == "move":
        assert (kept.sum(-1) == 4 * BUDGETS).all()
        assert (error.amax(-1) <= before.amax(-1)).all()
    else:
        assert (kept >= BUDGETS).all() and (kept[before <= limit] == BUDGETS).all()
        assert ((error <= limit) | (kept == BUDGETS + spare)).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-0.1,), "risk: expected the limit as a finite number >= 0, got -0.1"),
        ((float("nan"),), "got nan"),
        ((True,), "got True"),
        (("low",), "got 'low'"),
        ((0.1, "panic"), "risk: expected an action in .*, got 'panic'"),
        ((None, "shrink", 1), "risk: expected measure as True or False, got 1"),
        ((0.1, "shrink", False), "risk: expected measure=True beside a limit, got False"),
        ((None, "shrink", True, True), r"probes as a risk.Probes, got True; pass Probes\(\)"),
        ((None, "shrink", True, None, 0), "risk: expected queries as an integer >= 1, got 0"),
    ],
    ids=repr,
)
def test_bad_settings(arguments, said):
    with pytest.raises(ValueError, match=said):
        Risk(*arguments)
