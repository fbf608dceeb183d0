"""Two processes that share a model give what one gives, and do not outlive each other."""

import json
import os
import time
from itertools import chain

import pytest
from filelock import FileLock

from tests.support.distributed.cases import CASES, LOCAL, outcome
from tests.support.distributed.launch import MODEL, RANKS, start
from tests.support.distributed.worker import SHALLOW, load
from tests.support.models import build

LIMIT = 240  # seconds that all cases together may take on a busy machine
UNTOLD = ("exact", "exact kara", "alloc equal heads", "alloc share demand", "kara")
"""Cases in which no process needs to know anything of the other."""


@pytest.fixture(scope="module")
def one():
    return load(MODEL, **SHALLOW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all workers that share the tests."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="module")
def ended(folder):
    """Both processes after all cases: exit codes, what they printed, and what they found.

    They run once, also where several workers share the tests.
    """
    known = folder / "ended.json"
    with FileLock(f"{known}.lock"):
        if not known.exists():
            build("gemma3").save_pretrained(folder / "hybrid")
            processes = start("cases", MODEL, folder, 120)
            try:
                for process in processes:
                    process.wait(LIMIT)
            finally:
                for process in processes:
                    process.kill()
            printed = [process.stdout + process.stderr for process in processes]
            files = [folder / f"{rank}.json" for rank in range(RANKS)]
            assert all(file.exists() for file in files), "\n".join(printed)
            found = [json.loads(file.read_text()) for file in files]
            codes = [process.returncode for process in processes]
            known.write_text(json.dumps([codes, printed, found]))
    return json.loads(known.read_text())


def joined(parts):
    """Per layer and row, the heads of both processes one after the other."""
    return [
        [list(chain(*rows)) for rows in zip(*layers, strict=True)]
        for layers in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(case, ended, one):
    compare(case, [found[case] for found in ended[2]], outcome(case, one))


def test_layers_of_transformers_stay_between_ours(ended, folder):
    """Sliding windows, of which each process has its heads too."""
    parts = [found["hybrid"] for found in ended[2]]
    compare("hybrid", parts, outcome("hybrid", load(folder / "hybrid")))


def compare(case, parts, expected):
    assert [part.get("error") for part in parts] == [None] * RANKS
    assert [part["tokens"] for part in parts] == [expected["tokens"]] * RANKS
    assert joined([part["held"] for part in parts]) == expected["held"]
    heads = 1 if case == "hybrid" else 2
    assert [part["shard"] for part in parts] == [[at, heads, 2 * heads] for at in (0, heads)]
    assert expected["shard"] is None
    assert [part["evictions"] for part in parts] == [expected["evictions"]] * RANKS
    evicted = [sum(layer) for layer in zip(*(part["evicted"] for part in parts), strict=True)]
    assert evicted == expected["evicted"]
    assert bool(sum(evicted)) != case.startswith("exact")
    assert joined([part["risk"] for part in parts]) == nearly(expected["risk"])
    assert joined([part["probes"] for part in parts]) == nearly(expected["probes"])
    assert all((part["told"] == 0) == (case in UNTOLD) for part in parts)


def nearly(layers):
    """Errors up to rounding: each is a sum, and they are added up in another order."""
    return [
        [[pytest.approx(head, rel=1e-4, abs=1e-6) for head in row] for row in x] for x in layers
    ]


def sums(found):
    """Tokens that the heads of one process hold together, by layer and row."""
    return [sum(len(head) for head in row) for layer in found["held"] for row in layer]


def test_heads_share_a_budget_across_processes(ended):
    """Otherwise the cases would say nothing about agreement."""
    assert sums(ended[2][0]["alloc random"]) != sums(ended[2][1]["alloc random"])


@pytest.mark.parametrize("case", LOCAL)
def test_processes_that_decide_alone_tell_each_other_nothing(case, ended):
    """Their heads share a budget, each process its own part of it."""
    parts = [found[case] for found in ended[2]]
    assert [part.get("error") for part in parts] == [None] * RANKS
    assert [part["told"] for part in parts] == [0] * RANKS
    # The last event left the budget, after it the same tokens came to all heads.
    assert all(sum(part["evicted"]) for part in parts)
    held = [
        [len(head) for layer in part["held"] for row in layer for head in row] for part in parts
    ]
    assert any(len(set(each)) > 1 for each in held)


def test_the_others_end_when_a_process_dies(ended):
    codes, printed, _ = ended
    assert codes[1] == 17
    assert codes[0] not in (0, None), printed[0]
    assert "expected 2 processes to agree on an eviction" in printed[0]
    assert "see the log of each" in printed[0]


def test_the_others_end_when_a_process_hangs(tmp_path):
    """Not before the timeout of the group, which is 15 seconds here, and not long after."""
    waiting, paused = start("hang", MODEL, tmp_path, 15)
    try:
        assert waiting.wait(120) not in (0, None), waiting.stderr
        ended = time.time()
        assert "Timed out waiting 15000ms" in waiting.stderr
        assert 14 < ended - (tmp_path / "paused").stat().st_mtime < 45
    finally:
        waiting.kill()
        paused.kill()
