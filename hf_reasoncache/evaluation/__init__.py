"""Evaluation: tasks x caches x budgets x seeds, and audits of several instructions.

`evaluate` answers the questions of a `Grid` and keeps every answer on disk; `tabulate` compares the
caches. `audit` does so for a `Suite` of instructions. Needs the extra
`hf-reasoncache[eval]`.
"""

from hf_reasoncache.evaluation.audit import analyse, audit
from hf_reasoncache.evaluation.audit_result import Audit
from hf_reasoncache.evaluation.certify import Certificate, certificates, certify
from hf_reasoncache.evaluation.checks import CHECKS, Check
from hf_reasoncache.evaluation.grid import Grid, Settings
from hf_reasoncache.evaluation.harness import evaluate
from hf_reasoncache.evaluation.limits import Limits
from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.rouge import rouge_l_recall
from hf_reasoncache.evaluation.specs import FULL, CacheSpec, baseline, parse_spec
from hf_reasoncache.evaluation.statistics import Paired, Share
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
    "FileTask",
    "Grid",
    "Judgement",
    "Limits",
    "Paired",
    "Question",
    "Record",
    "Settings",
    "Share",
    "Suite",
    "Task",
    "analyse",
    "audit",
    "baseline",
    "certificates",
    "certify",
    "evaluate",
    "load_suite",
    "load_task",
    "parse_spec",
    "rouge_l_recall",
    "tabulate",
]
