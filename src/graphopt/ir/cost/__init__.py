"""Cost of a program: FLOPs, bytes, peak memory and time, as numbers and as expressions of its sizes."""

from __future__ import annotations

from ..operators.work import Call, Operand, Size, Work, moved
from .collectives import (
    ALL_REDUCE,
    LINKS,
    Link,
    all_gather,
    all_reduce,
    double_tree,
    find_link,
    in_switch,
    one_shot,
    ring,
    star,
    tree,
    two_shot,
)
from .communication import Sync, communication, sent_bytes
from .devices import DEVICES, Device, find_device
from .formulas import known, work
from .liveness import Peak, peak_memory
from .registry import FORMULAS, Formula, formula
from .roofline import Bound, Timing, time_call, total
from .summary import BlockCost, Cost, cost, expressions, run_totals, works_by_node
from .survey import VIEWS, Survey, survey
from .weights import WeightCount, count_weights

__all__ = [
    "ALL_REDUCE",
    "DEVICES",
    "FORMULAS",
    "LINKS",
    "VIEWS",
    "BlockCost",
    "Bound",
    "Call",
    "Cost",
    "Device",
    "Formula",
    "Link",
    "Operand",
    "Peak",
    "Size",
    "Survey",
    "Sync",
    "Timing",
    "WeightCount",
    "Work",
    "all_gather",
    "all_reduce",
    "communication",
    "cost",
    "count_weights",
    "double_tree",
    "expressions",
    "find_device",
    "find_link",
    "formula",
    "in_switch",
    "known",
    "moved",
    "one_shot",
    "peak_memory",
    "ring",
    "run_totals",
    "sent_bytes",
    "star",
    "survey",
    "time_call",
    "total",
    "tree",
    "two_shot",
    "work",
    "works_by_node",
]
