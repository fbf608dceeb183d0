"""Options that several commands have."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hf_reasoncache.evaluation.specs import CACHES, EXPECTED_ATTENTION, TRI_ATTENTION
from hf_reasoncache.scorers import SCORERS


class Dtype(str, Enum):
    """Of the model's weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or ORG/NAME.")]
Caches = Annotated[
    list[str],
    typer.Option(
        "--cache",
        metavar="NAME[:SETTING,...]",
        help="What is tried, beside the full cache; give it several times. NAME: "
        f"{', '.join(name for name, cache in CACHES.items() if cache)}, or a scorer: "
        f"{', '.join(SCORERS)}. Also {EXPECTED_ATTENTION}, and {TRI_ATTENTION} with "
        "queries=FILE.pt|PROFILE. SETTING: "
        "scorer=NAME, profile=DIR, heads=on|off, "
        "prompt=keep|evict, protect (the spans of a question), fair=0.5, fair_window=128, "
        "window=8, buffer=128, min_budget=128, storage=fp8; of sliding-window also ratio=0.3, "
        "recent=32.",
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        metavar="N,N,...",
        help="Tokens per KV head (for sliding-window its bound), or, below 1, shares of the tokens "
        "seen.",
    ),
]
OneCache = Annotated[
    str, typer.Option(metavar="NAME[:SETTING,...]", help="full, or as for evaluate.")
]
OneBudget = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens per KV head (for sliding-window its bound), or, below 1, a share of the "
        "tokens seen.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 is greedy.", show_default="as the model's generation config says"),
]
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Every answer, and the results; a second run goes on.")
]
Window = Annotated[int, typer.Option(min=1, help="Newest tokens, never evicted.")]
Buffer = Annotated[int, typer.Option(min=1, help="Tokens between two compactions.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts answered together.")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap plain prompts in the chat template.")]
Revision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of MODEL.", show_default=False)
]
Dtypes = Annotated[Dtype, typer.Option(help="Of the weights.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda:0, ..., or auto to spread layers over all.", show_default="one per process"
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=4096, help="Of a CPU.", show_default="torch's choice")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
