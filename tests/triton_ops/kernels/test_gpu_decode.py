"""The benchmark of decoding with graphs, at toy size, with a tape in place of CUDA graphs."""

import csv
from dataclasses import replace

import pytest

from examples.benchmarks import decoders, gpu_decode
from hf_reasoncache.storage.pool import RaggedPool
from tests.support.ops.tape import TapeRecorder
from triton_ops.backend import interpreting

DECODERS = "exact-graphs,moving-graphs,unequal-graphs,floor-graph"
ROUNDS, BUFFER = 3, 4


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="a GPU records graphs, not tapes")
def test_decoders_with_graphs_record_once_however_heads_move(tmp_path, monkeypatch):
    moves, move = [], RaggedPool._move
    monkeypatch.setattr(RaggedPool, "_move", lambda pool, to: moves.append(move(pool, to)))
    monkeypatch.setattr(decoders, "WARM_UP_ROUNDS", ROUNDS - 2)
    options, _ = gpu_decode.parse(
        ["--toy", "--decoders", DECODERS, "--cases", "2x24", "--largest", "0"]
    )
    options = replace(options, work=replace(options.work, recorder=TapeRecorder))
    gpu_decode.run(options, tmp_path, lambda line: None)
    with (tmp_path / "gpu_decode.csv").open(newline="") as file:
        rows = {row["kind"]: row for row in csv.DictReader(file)}
    assert {kind for kind, row in rows.items() if row["ms"]} == {
        "UncompressedGraphs",
        "MovingGraphs",
        "UnequalGraphs",
        "NoCacheGraphs",
    }

    def counts(kind):
        return tuple(int(rows[kind][name]) for name in ("recorded", "replayed", "eager"))

    # A warm-up and a round of two steps on one pool; a round is one eviction.
    assert counts("UncompressedGraphs") == (1, 2, 1)
    for kind in ("MovingGraphs", "UnequalGraphs"):
        assert counts(kind) == (1, ROUNDS * BUFFER - 2, 1)
    assert len(moves) >= 2 * options.work.shape.layers
