"""One of the processes that share a model, with what it is to do."""

import json
import os
import signal
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LogitsProcessor

import hf_reasoncache  # noqa: F401  (registers the attention)
from hf_reasoncache.shards import Shard
from tests.support.distributed.cases import CASES, HYBRID, LOCAL, alloc, generate, outcome

SHALLOW = {"num_hidden_layers": 2}
"""The first layers of a model: the others do nothing that these do not."""


def load(name, **arguments):
    """A model in float64: its answers must not depend on the order of a sum."""
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="reasoncache", dtype=torch.float64, **arguments
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def run_cases(model, folder):
    """Write what all cases give, of this model and of one in the folder.

    Then process 1 ends while 0 waits for it in an eviction.
    """
    rank, gather, found = dist.get_rank(), Shard.gather, {}
    models = dict.fromkeys(CASES | LOCAL, model)
    models |= dict.fromkeys(HYBRID, load(Path(folder, "hybrid"), tp_plan="auto"))
    for case, chosen in models.items():
        told = []
        Shard.gather = lambda self, own, told=told: told.append(0) or gather(self, own)
        try:
            found[case] = outcome(case, chosen)
            found[case]["told"] = len(told)
        except Exception:
            found[case] = {"error": traceback.format_exc()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    Shard.gather = gather if rank == 0 else lambda self, own: os._exit(17)
    CASES["alloc"](model)


class Pause(LogitsProcessor):
    """Stop this process, which does not end, at its tenth token."""

    def __init__(self, folder):
        self.left, self.folder = 10, folder

    def __call__(self, ids, scores):
        self.left -= 1
        if not self.left:
            Path(self.folder, "paused").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return scores


def hang(model, folder):
    """Process 1 stops between two tokens, and 0 waits for it in a layer of the model."""
    pauses = [Pause(folder)] if dist.get_rank() == 1 else []
    generate(alloc(), logits_processor=pauses)(model)


def main(what, name, folder, timeout):
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    {"cases": run_cases, "hang": hang}[what](load(name, tp_plan="auto", **SHALLOW), folder)
