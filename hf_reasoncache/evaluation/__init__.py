"""Evaluation: tasks x caches x budgets x seeds, and audits of several instructions.

`evaluate` answers the questions of a `Grid` and keeps every answer on disk; `tabulate` compares the
caches. `audit` does so for a `Suite` of instructions, `read_texts` without
questions. Needs the extra `hf-reasoncache[eval]`.
"""

from hf_reasoncache.evaluation.audit import analyse, audit
from hf_reasoncache.evaluation.audit_result import Audit
from hf_reasoncache.evaluation.certify import Certificate, certificates, certify
from hf_reasoncache.evaluation.checks import CHECKS, Check
from hf_reasoncache.evaluation.fidelity import (
    Fidelity,
    Piece,
    Reading,
    TextGrid,
    read_texts,
    sum_up,
)
from hf_reasoncache.evaluation.grid import Grid, Settings
from hf_reasoncache.evaluation.harness import evaluate
from hf_reasoncache.evaluation.limits import Limits
from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.rouge import rouge_l_recall
from hf_reasoncache.evaluation.specs import FULL, CacheSpec, baseline, parse_spec
from hf_reasoncache.evaluation.statistics import Estimate, Paired, Share
from hf_reasoncache.evaluation.suite import Suite, load_suite
from hf_reasoncache.evaluation.table import tabulate
from hf_reasoncache.evaluation.task_files import FileTask, load_task
from hf_reasoncache.evaluation.tasks import Judgement, Question, Task

__all__ = [
    "CHECKS",
    "FULL",
    "Audit",
    "CacheSpec",
    "Certificate",
    "Check",
    "Estimate",
    "Fidelity",
    "FileTask",
    "Grid",
    "Judgement",
    "Limits",
    "Paired",
    "Piece",
    "Question",
    "Reading",
    "Record",
    "Settings",
    "Share",
    "Suite",
    "Task",
    "TextGrid",
    "analyse",
    "audit",
    "baseline",
    "certificates",
    "certify",
    "evaluate",
    "load_suite",
    "load_task",
    "parse_spec",
    "read_texts",
    "rouge_l_recall",
    "sum_up",
    "tabulate",
]
