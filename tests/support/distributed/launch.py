"""Start processes that share a model, as torchrun does, on this machine."""

import socket
from pathlib import Path

from tests.support.copies import Copy
from tests.support.distributed import worker

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "examples" / "tiny_reasoner" / "llama"
RANKS = 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments):
    """Start the worker with these arguments, once for each rank."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(RANKS),
    }
    return [
        Copy(
            worker.main,
            *arguments,
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]
