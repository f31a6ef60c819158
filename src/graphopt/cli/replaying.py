"""Replays the history of a saved program on the original: the same passes with the same plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.errors import ContractError, GraphoptError
from ..ir.program import Program
from ..ir.running.fold import fold
from ..ir.text import difference
from ..measure.context import Context
from ..passes.framework.manager import run_pass
from ..passes.framework.pipeline import parse_pipeline
from ..passes.framework.plan import Plan


@dataclass
class Replayed:
    """Result of a replay.

    Attributes:
        same: the passes produce exactly this program.
        reason: why they do not, or why it cannot be determined.
        broken: a contract that does not hold, or a weight that differs.
    """

    same: bool
    reason: str = ""
    broken: str = ""


def is_exact(entry: Mapping[str, Any]) -> bool:
    """Tell whether the contract of an entry of a program's history is exact."""
    return str(entry.get("contract", "")).startswith(("exact", "adds"))


def replay(
    before: Program, after: Program, history: Sequence[Mapping[str, Any]], context: Context
) -> Replayed:
    """Run the passes of a history again, check exact ones site by site, and compare the result with the stored program.

    Comparing whole outputs cannot distinguish a change of one percent from rounding weights to 16 bits; this can.

    Args:
        before: the original.
        after: the program made from it, as stored.
        history: the passes that were run, each entry with its plan.
        context: of the run.
    """
    current = before
    for entry in history:
        if "pass" not in entry:
            return Replayed(False, f"{entry.get('recipe', 'training')} cannot be replayed")
        try:
            (step,) = parse_pipeline(str(entry["pass"]))
            plan = Plan.from_dict(entry.get("plan") or {})
            verify_with: Any = "sites" if is_exact(entry) else "off"
            current, result = run_pass(current, step, context, plan=plan, verify_with=verify_with)
        except ContractError as error:
            return Replayed(False, broken=error.message)
        except GraphoptError as error:
            return Replayed(False, f"{entry['pass']} cannot be replayed: {error.message}")
        failed = next((r for r in result.refused if r.rolled_back), None)
        if failed is not None:
            return Replayed(False, broken=f"{entry['pass']} at {failed.block}: {failed.reason}")
    folded = fold(current, to_store=True)
    if difference(folded, after):
        return Replayed(False, "its graph differs from what its passes now make of the original")
    for name, weight in after.weights.items():
        recomputed, stored = folded.weights[name].source.load(), weight.source.load()
        if not _nearly_equal(recomputed, stored):
            return Replayed(
                False, broken=f"weight {weight.name} differs from what its passes make of the original"
            )
    return Replayed(True)


def _nearly_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether two tensors are equal up to one rounding step: sums on another machine may round differently."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if torch.equal(first, second):
        return True
    if not first.is_floating_point():
        return False
    step = torch.finfo(first.dtype).eps
    a, b = first.double(), second.double()
    # a sum with cancellation is only as exact as its terms
    return bool(((a - b).abs() <= step * torch.maximum(a.abs(), a.abs().mean())).all())
