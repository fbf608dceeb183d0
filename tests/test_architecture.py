"""The import direction of the packages, and what package code and tests never do.

Everything is read from the syntax tree, so an import inside a function, under `TYPE_CHECKING` or in
a branch for another platform counts like any other. A module that the tables do not name fails:
where it stands is a decision, and this file is where the decision is written down.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hf_reasoncache", "triton_ops")
MAX_DEPTH = 2
"""Classes of ours from one that inherits from none of them to its farthest child, both counted."""

BROAD = {"Exception", "BaseException"}

CACHES = {"cache", "caches"}
LAYERS = {"layer", "observers", "policies", "storage"}

# Part of hf_reasoncache (a top-level module or package), or one module of a part where the rest may
# do more -> the parts it may import besides its own.
# "triton_ops" is the other package; "profiles.profile" is that one module, not its neighbours.
PARTS: dict[str, set[str]] = {
    "budgets": set(),
    "protection": {"budgets"},
    "risk": {"shards"},
    "scorers": {"triton_ops"},
    "geometry": set(),
    "shards": set(),
    "version": set(),
    "releases": set(),
    "messages": set(),
    "outputs": set(),
    "processes": set(),
    "precision": set(),
    "guards": set(),
    # Storage knows no policy and no model, policies no keys and values; a layer joins them.
    "storage": {"shards", "triton_ops"},
    "policies": {"budgets", "protection", "risk", "scorers", "shards"},
    "observers": {"risk", "shards", "storage"},
    "layer": {
        "guards",
        "observers",
        "policies",
        "precision",
        "risk",
        "scorers",
        "shards",
        "storage",
        "triton_ops",
    },
    "joint_evictions": {"layer", "policies", "precision", "scorers", "storage", "triton_ops"},
    "keep_rates": {"layer", "protection"},
    "base_attention": set(),
    "latents": {"precision"},
    "weights_and_gradients": {"layer"},
    "report_html": set(),
    "report": {"layer", "report_html", "risk", "sliding", "storage", "triton_ops"},
    "attention": {"base_attention", "weights_and_gradients", "geometry", "guards", "latents"}
    | {"layer", "precision", "shards", "sliding", "storage"},
    "arguments": {"scorers", "budgets", "observers", "risk", "profiles.profile", "storage"},
    "sliding": set(),
    "graph_use": set(),
    "graphs": CACHES
    | {"graph_use", "layer", "precision", "releases", "shards", "sliding", "triton_ops"},
    "model_graphs": CACHES | {"graphs", "releases", "triton_ops"},
    "pipeline": {"attention", "model_graphs", "releases"},
    "warm_up": CACHES | LAYERS | {"geometry", "scorers", "triton_ops"},
    "branching": CACHES | {"arguments", "geometry", "releases"},
    "experimental": CACHES
    | {"arguments", "geometry", "layer", "observers", "releases", "report", "storage"}
    | {"triton_ops"},
    # A profile, which caches read, must not lead back to them; measuring needs whole caches.
    "profiles": {"budgets", "geometry", "outputs"},
    "calibration": LAYERS
    | {"scorers", "budgets", "geometry", "profiles", "triton_ops", "version"}
    | {"arguments", "outputs", "processes", "releases"}
    | CACHES,
    # Bytes follow from how layers allocate; which cache has them does not matter.
    "planning": LAYERS | {"geometry", "shards", "sliding"},
    "generation": {"branching", "evaluation", "planning", "processes", "releases", "report"}
    # Prompts are read as for a calibration.
    | {"calibration.prompts"},
    "evaluation": CACHES
    | {"arguments", "branching", "outputs", "processes", "protection", "releases", "report"}
    | {"scorers", "storage"}
    # Prompts, weights and releases are named as in a calibration.
    | {"calibration.prompts", "calibration.settings", "profiles.fingerprint"}
    # What TriAttention and ExpectedAttention know of a model is read where a run is described.
    | {"calibration.queries", "geometry"},
}
for _cache in CACHES:
    # The caches turn settings into layers, so they know every policy, but of calibration only the
    # result: a cache that reaches the hub would put the network between a user and their tokens.
    PARTS[_cache] = LAYERS | CACHES | {"budgets", "guards", "keep_rates", "precision", "protection"}
    PARTS[_cache] |= {"arguments", "geometry", "profiles.profile", "report", "risk", "scorers"}
    PARTS[_cache] |= {"graph_use", "joint_evictions", "shards", "sliding"}
for _allowed in PARTS.values():
    # How a value is echoed in an error is the same everywhere.
    _allowed.add("messages")
# "cli" and the package's own __init__ may import every part but "experimental"; only "__main__"
# imports "cli".
PARTS["cli"] = PARTS["__init__"] = {*PARTS, "triton_ops"} - {"experimental"}
PARTS["__main__"] = {"cli"}

# Third-party modules, by the longest prefix of the importing module that is named here.
LIBRARIES: dict[str, set[str]] = {
    "triton_ops": {"torch", "triton"},
    "hf_reasoncache": {"torch"},
    "hf_reasoncache.budgets": {"torch", "numpy"},
    "hf_reasoncache.storage": {"torch", "numpy"},
    "hf_reasoncache.attention": {"torch", "transformers"},
    "hf_reasoncache.base_attention": {"torch", "transformers"},
    "hf_reasoncache.geometry": {"transformers"},
    "hf_reasoncache.releases": {"transformers"},
    "hf_reasoncache.arguments": {"transformers"},
    "hf_reasoncache.processes": {"torch", "accelerate", "tqdm"},
    "hf_reasoncache.layer": {"torch", "transformers"},
    "hf_reasoncache.sliding": {"torch", "transformers"},
    "hf_reasoncache.graphs": {"torch", "transformers"},
    "hf_reasoncache.pipeline": {"transformers"},
    "hf_reasoncache.branching": {"torch", "transformers"},
    "hf_reasoncache.experimental": {"torch", "transformers"},
    "hf_reasoncache.calibration": {"torch", "transformers", "safetensors"},
    "hf_reasoncache.profiles": {"torch", "transformers", "safetensors"},
    "hf_reasoncache.calibration.prompts": {"transformers", "datasets"},
    "hf_reasoncache.profiles.profile": {"torch", "transformers"},
    "hf_reasoncache.profiles.hub": {"huggingface_hub"},
    "hf_reasoncache.profiles.card": {"huggingface_hub"},
    "hf_reasoncache.profiles.plot": {"matplotlib"},
    "hf_reasoncache.evaluation": {
        "torch",
        "transformers",
        "datasets",
        "lm_eval",
        "math_verify",
        "regex",
        "scipy",
    },
    "hf_reasoncache.evaluation.plot": {"matplotlib"},
    "hf_reasoncache.planning": {"torch", "transformers"},
    "hf_reasoncache.generation": {"torch", "transformers", "tqdm"},
    "hf_reasoncache.planning.plot": {"matplotlib"},
    "hf_reasoncache.cli": {"torch", "transformers", "accelerate", "typer", "rich", "tqdm"}
    | {"hf_reasoncache_cli"}
    | {"safetensors"},
    **{f"hf_reasoncache.{name}": {"torch", "transformers"} for name in CACHES},
}


def module_name(path: Path) -> str:
    """Dotted name of a file below the root; a package carries its `.__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {module_name(p): p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))}
TESTS = {module_name(p): p for p in sorted((ROOT / "tests").rglob("*.py"))}


def imports(module: str, tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `module` imports.

    `from a import b` is `a.b` where that is a module in `known`, else `a`.
    """
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield node.lineno, name if {name, f"{name}.__init__"} & known else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else ""
            called = function.id if isinstance(function, ast.Name) else called
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def part_of(module: str) -> str:
    """`hf_reasoncache.storage.pool` -> `storage`; the package itself -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def parts_of(module: str) -> set[str]:
    """What the module's own entry in PARTS allows, or else that of its part."""
    return PARTS.get(".".join(module.split(".")[1:3]), PARTS[part_of(module)])


def libraries_of(module: str) -> set[str]:
    prefixes = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    return next(LIBRARIES[p] for p in prefixes if p in LIBRARIES)


def import_violations(module: str, source: str, known: set[str]) -> list[str]:
    """What `module` imports and may not, one sentence each."""
    own, part = module.split(".")[0], part_of(module)
    if own == "hf_reasoncache" and part not in PARTS:
        return [f"{module}: `{part}` has no place in PARTS; decide who may import whom"]
    found = []
    for line, name in imports(module, ast.parse(source), known):
        top, target = name.split(".")[0], part_of(name)
        if module.endswith("kernel") and {"reference", "cpu"} & set(name.split(".")):
            allowed = False
        elif top in sys.stdlib_module_names:
            allowed = True
        elif top not in PACKAGES:
            allowed = top in libraries_of(module)
        elif own == "triton_ops":
            allowed = top == "triton_ops"
        elif top == "triton_ops":
            allowed = "triton_ops" in parts_of(module)
        elif target == "experimental":
            allowed = part == "experimental"  # not even the public face relies on it
        elif target == "cli":
            allowed = part in {"cli", "__main__"}
        elif part in {"cli", "__init__"}:
            allowed = True
        elif target == "__init__":
            allowed = False  # the public face imports every part, so this is a loop
        else:
            exact = ".".join(name.split(".")[1:3])
            allowed = target == part or {target, exact} & parts_of(module) != set()
        if not allowed:
            found.append(f"{module}:{line} may not import {name}")
    return found


def shared_test_violations(module: str, source: str, known: set[str]) -> list[str]:
    """What `module` takes from modules of tests: what several need has a place of its own."""
    return [
        f"{module}:{line} imports {name}; move what both need to tests/support"
        for line, name in imports(module, ast.parse(source), known)
        if name.startswith("tests.") and name.split(".")[-1].startswith("test_")
    ]


def style_violations(module: str, source: str) -> list[str]:
    """What package code never does, one sentence each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(f"{module}:{node.lineno} assert vanishes under -O; raise an exception")
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(isinstance(c, ast.Name) and c.id in BROAD for c in caught)
            silent = all(
                isinstance(s, (ast.Pass, ast.Continue))
                or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            if node.type is None:
                found.append(f"{module}:{node.lineno} bare except")
            elif broad and silent:
                found.append(f"{module}:{node.lineno} swallows every exception")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_walk_sees_the_package(package: str) -> None:
    assert f"{package}.__init__" in FILES
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("module", FILES)
def test_imports(module: str) -> None:
    assert import_violations(module, FILES[module].read_text("utf-8"), set(FILES)) == []


EXAMPLES = {
    module_name(path): path
    for path in sorted((ROOT / "examples").rglob("*.py"))
    if "research" not in path.parts
}


@pytest.mark.parametrize("module", EXAMPLES)
def test_only_research_uses_what_is_experimental(module: str) -> None:
    found = imports(module, ast.parse(EXAMPLES[module].read_text("utf-8")), set(FILES))
    assert [name for _, name in found if part_of(name) == "experimental"] == []


@pytest.mark.parametrize("module", FILES)
def test_style(module: str) -> None:
    assert style_violations(module, FILES[module].read_text("utf-8")) == []


def test_tests_share_nothing_but_their_support() -> None:
    assert {"tests.test_architecture", "tests.support.models"} <= set(TESTS)
    found = [
        violation
        for module, path in TESTS.items()
        for violation in shared_test_violations(module, path.read_text("utf-8"), set(TESTS))
    ]
    assert found == []


# The rest holds the checks themselves to account, on sources that never were files.

KNOWN = {
    "hf_reasoncache.__init__",
    "hf_reasoncache.cli",
    "hf_reasoncache.cache",
    "hf_reasoncache.policies.base",
    "hf_reasoncache.storage.pool",
    "hf_reasoncache.profiles.__init__",
    "hf_reasoncache.profiles.hub",
    "hf_reasoncache.profiles.profile",
    "hf_reasoncache.experimental.__init__",
    "hf_reasoncache.experimental.steps",
    "triton_ops.__init__",
    "triton_ops.compact.__init__",
    "triton_ops.compact.kernel",
    "triton_ops.compact.reference",
}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("triton_ops.compact.__init__", "import transformers"),
        ("triton_ops.compact.__init__", "import numpy as np"),
        ("triton_ops.compact.__init__", "from hf_reasoncache.storage import pool"),
        ("triton_ops.compact.kernel", "from triton_ops.compact.reference import compact"),
        ("triton_ops.compact.kernel", "from .reference import compact"),
        ("triton_ops.compact.kernel", "from . import reference"),
        ("hf_reasoncache.budgets.layers", "import triton_ops"),
        ("hf_reasoncache.budgets.layers", "from transformers import Cache"),
        ("hf_reasoncache.protection", "from .storage import pool"),
        ("hf_reasoncache.scorers.base", "def f():\n    from transformers.cache_utils import Cache"),
        (
            "hf_reasoncache.scorers.base",
            "import importlib\nimportlib.import_module('transformers')",
        ),
        ("hf_reasoncache.scorers.base", "from hf_reasoncache import policies"),
        ("hf_reasoncache.storage.pool", "from ..cache import ReasonCache"),
        ("hf_reasoncache.storage.pool", "from .. import cache"),
        ("hf_reasoncache.storage.pool", "from hf_reasoncache import ReasonAllocCache"),
        ("hf_reasoncache.policies.base", "from ..storage import pool"),
        ("hf_reasoncache.policies.base", "from transformers import Cache"),
        ("hf_reasoncache.cache", "from hf_reasoncache.profiles.hub import pull"),
        ("hf_reasoncache.cache", "from hf_reasoncache.profiles import hub"),
        ("hf_reasoncache.cache", "import huggingface_hub"),
        ("hf_reasoncache.profiles.profile", "import huggingface_hub"),
        ("hf_reasoncache.profiles.profile", "from ..cache import ReasonCache"),
        ("hf_reasoncache.evaluation.report", "from ..cli import app"),
        ("hf_reasoncache.branching.exit", "from ..experimental.steps import Step"),
        ("hf_reasoncache.cli.plan", "from ..experimental import least_budget"),
        ("hf_reasoncache.__init__", "from .experimental import StepShareCache"),
        ("hf_reasoncache.__init__", "from . import cli"),
        ("hf_reasoncache.__init__", "import transformers"),
        ("hf_reasoncache.undecided", ""),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(import_violations(module, source, KNOWN)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("triton_ops.compact.__init__", "import os, torch\nfrom .reference import compact"),
        ("triton_ops.compact.__init__", "import triton.language as tl\nfrom . import kernel"),
        ("hf_reasoncache.budgets.layers", "import math\nimport torch.nn.functional as F"),
        ("hf_reasoncache.scorers.snapkv", "from .base import Scorer\nimport triton_ops.compact"),
        ("hf_reasoncache.policies.base", "from ..scorers.base import Scorer\nimport torch"),
        ("hf_reasoncache.storage.aside", "from . import pool\nfrom .pool import Pool"),
        ("hf_reasoncache.cache", "from .profiles.profile import Profile"),
        ("hf_reasoncache.cache", "from hf_reasoncache.profiles import profile"),
        ("hf_reasoncache.caches.shared_branch", "from .cache import ReasonCache"),
        ("hf_reasoncache.calibration.collect", "import transformers\nfrom ..scorers import rkv"),
        ("hf_reasoncache.evaluation.harness", "from ..branching.prefill import prefill"),
        ("hf_reasoncache.cli", "import typer\nfrom .profiles.hub import push"),
        ("hf_reasoncache.__init__", "from .cache import ReasonCache"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert import_violations(module, source, KNOWN) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from tests.contract.test_masks import padded", True),
        ("from tests.contract import test_masks", True),
        ("from . import test_masks", True),
        ("from .test_masks import padded", True),
        ("def f():\n    import tests.contract.test_masks", True),
        ("from tests.support.models import build", False),
        ("from tests.support import models", False),
        ("from hf_reasoncache.branching.test_time import scale", False),
    ],
)
def test_a_test_that_is_imported_is_found(source: str, wrong: bool) -> None:
    known = {"tests.contract.test_masks", "tests.support.models"}
    assert len(shared_test_violations("tests.contract.test_risk", source, known)) == wrong


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    assert x",
        "try:\n    f()\nexcept:\n    raise",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (ValueError, BaseException):\n    ...",
    ],
)
def test_bad_style_is_found(source: str) -> None:
    assert len(style_violations("m", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept ValueError:\n    pass",
        "try:\n    f()\nexcept Exception as error:\n    raise ValueError('no') from error",
    ],
)
def test_good_style_is_not(source: str) -> None:
    assert style_violations("m", source) == []


def own_bases(sources: dict[str, str]) -> dict[str, list[str]]:
    """Of every class, which of the others it names as bases; interfaces are none."""
    bases = {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for source in sources.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }
    objects = {name for name, found in bases.items() if not {"ABC", "Protocol"} & set(found)}
    return {name: [base for base in found if base in objects] for name, found in bases.items()}


def inheritance_violations(bases: dict[str, list[str]]) -> list[str]:
    """Objects that are put together from several of our classes, or from a long line of them."""

    def depth(name: str) -> int:
        return 1 + max(map(depth, bases[name]), default=0)

    return [f"{name}: several bases of ours" for name in bases if len(bases[name]) > 1] + [
        f"{name}: {depth(name)} classes deep" for name in bases if depth(name) > MAX_DEPTH
    ]


def test_objects_are_composed() -> None:
    """An object's methods are found in one class, or in the few that it extends."""
    sources = {module: path.read_text() for module, path in FILES.items()}
    assert inheritance_violations(own_bases(sources)) == []


def test_mixins_and_long_lines_are_found() -> None:
    source = "class A: ...\nclass B: ...\nclass C(A, m.B): ...\nclass D(C): ...\nclass E(B): ...\n"
    source += "class F(Protocol): ...\nclass G(F, A): ...\nclass H(ABC): ...\nclass I(G, H): ..."
    found = inheritance_violations(own_bases({"m": source}))
    assert found == ["C: several bases of ours", "D: 3 classes deep", "I: 3 classes deep"]


def role_violations(module: str, source: str, roles: set[str]) -> list[str]:
    """Where `module` asks which class an object of a role has, one sentence each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asked = node.args[1:] if node.func.id in {"isinstance", "issubclass"} else []
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            asked = node.comparators
        names = {name for each in asked for name in re.findall(r"\w+", ast.unparse(each))}
        found += [f"{module}:{node.lineno} asks for {name}" for name in sorted(names & roles)]
    return found


def test_nobody_asks_which_store_policy_or_observer_it_is() -> None:
    """What differs between them is behind their interfaces."""
    sources = {module: path.read_text() for module, path in FILES.items()}
    composed = [m for m in sources if part_of(m) in LAYERS]
    roles = {
        node.name
        for module in composed
        for node in ast.walk(ast.parse(sources[module]))
        if isinstance(node, ast.ClassDef)
    }
    assert {"CacheLayer", "PoolStore", "BudgetPolicy", "RowWindows", "Shadow"} <= roles
    assert [each for m in sources for each in role_violations(m, sources[m], roles)] == []


def test_a_question_for_a_class_is_found() -> None:
    source = "isinstance(x, a.Pool | int)\ntype(x) is Pool\nisinstance(x, int)\ntype(x) is str"
    assert role_violations("m", source, {"Pool"}) == ["m:1 asks for Pool", "m:2 asks for Pool"]
