"""What the compiler makes of every kernel: the table in docs/kernels.md.

Compiles what the launchers launch in all configurations, a minute or two if nothing is cached.
"""

from __future__ import annotations

import argparse
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import triton

from examples.research.tables import insert
from hf_reasoncache.evaluation.table import markdown_table
from tests.support.ops.launches import CASES
from tests.support.ops.offline import SHARED_MEMORY, Binary, compiling

DOCS = Path(__file__).parents[3] / "docs" / "kernels.md"
ROW = re.compile(r"^\| (?P<case>\w.*?) \| `(?P<kernel>\w+)` \| (?P<cells>.*) \|$", re.MULTILINE)

SHOWN = ("attend_kernel", "cumulative_kernel", "scores_kernel", "search_kernel")
"""Kernels that read keys; `sums_kernel` is like `scores_kernel`."""


@cache
def compiled(case: str, capability: int) -> tuple[Binary, ...]:
    """Return what a case launches on GPUs of a compute capability."""
    with compiling(capability) as kernels:
        CASES[case][1]()
    with TemporaryDirectory() as folder:
        return tuple(Binary.of(kernel, Path(folder)) for kernel in kernels)


def rows(case: str, capability: int) -> dict[str, str]:
    """Return the cell of each kernel of a case: registers, KB of shared memory, programs."""
    return {
        each.name: f"{each.registers} / {each.shared / 1024:.0f} / {each.programs(capability)}"
        for each in compiled(case, capability)
        if each.name in SHOWN and each.types.get("query", each.types["keys"]) != "*fp32"
    }


def documented(version: str) -> dict[tuple[str, str], list[str]]:
    """Return the cells of the documentation's table for a version of triton, by case and kernel."""
    marked = re.search(
        f"<!-- compiled {version} -->(.*?)<!-- end compiled {version} -->",
        DOCS.read_text("utf-8"),
        re.DOTALL,
    )
    found = ROW.finditer(marked[1]) if marked else ()
    return {(row["case"], row["kernel"]): row["cells"].split(" | ") for row in found}


def summary() -> str:
    """Say how many programs were compiled, and which keep registers in memory."""
    spilled, total = [], 0
    for capability in SHARED_MEMORY:
        found = [(case, each) for case in CASES for each in compiled(case, capability)]
        total += len(found)
        spilled += [
            f"- sm_{capability}, `{each.name}` of *{case}*: {each.stack} bytes, instructions in "
            f"loops that use them: {each.spilled_in_loops}"
            for case, each in found
            if each.stack
        ]
    said = ", ".join(f"sm_{capability}" for capability in SHARED_MEMORY)
    head = f"triton {triton.__version__}, {total} programs for {said}. Registers in memory:"
    return f"{head}\n\n" + "\n".join(spilled) if spilled else f"{head} none."


def table() -> str:
    """Return the table of all cases in half precision."""
    lines = []
    for case in CASES:
        cells = {f"sm_{capability}": rows(case, capability) for capability in SHARED_MEMORY}
        for kernel in cells["sm_80"]:
            each = {name: column[kernel] for name, column in cells.items()}
            lines.append({"configuration": case, "kernel": f"`{kernel}`", **each})
    return markdown_table(list(lines[0]), lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="only what spills, without the table")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"put it into docs/{DOCS.name}, between the markers of this version of triton",
    )
    chosen = parser.parse_args(arguments)
    text = summary() if chosen.brief else f"{summary()}\n\n{table()}"
    if chosen.write:
        insert(DOCS, f"compiled {triton.__version__}", f"{text}\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
