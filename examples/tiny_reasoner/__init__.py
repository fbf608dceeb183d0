"""Tiny trained reasoners: tasks with long chains of thought, a checker, and models for them.

Importing this package needs neither torch nor transformers; `tokenizer`, `train` and `evaluate` do.
"""

from pathlib import Path

from .families import FAMILIES, TASKS
from .tasks import (
    DEFAULT_FAMILY,
    DEVELOPMENT_SEEDS,
    TEST_SEEDS,
    TRAINING_SEEDS,
    Outcome,
    Problem,
    check,
    make_problems,
    read_answer,
)

#: Directories of the trained models, by the family of problems each one understands.
MODELS = {name: Path(__file__).parent / name for name in FAMILIES}
DEFAULT_MODEL = MODELS[DEFAULT_FAMILY]

__all__ = [
    "DEFAULT_FAMILY",
    "DEFAULT_MODEL",
    "DEVELOPMENT_SEEDS",
    "FAMILIES",
    "MODELS",
    "TASKS",
    "TEST_SEEDS",
    "TRAINING_SEEDS",
    "Outcome",
    "Problem",
    "check",
    "make_problems",
    "read_answer",
]
