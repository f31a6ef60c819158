"""What a saved program says of its making, done again on the original: the same passes by the same plans."""

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
    """What came of it.

    Attributes:
        same: the passes make exactly this program.
        reason: why not, or why that cannot be told.
        broken: a contract that does not hold, or a weight that is another one.
    """

    same: bool
    reason: str = ""
    broken: str = ""


def is_exact(entry: Mapping[str, Any]) -> bool:
    """Tell whether an entry of a program's history promises that nothing changes."""
    return str(entry.get("contract", "")).startswith(("exact", "adds"))


def replay(
    before: Program, after: Program, history: Sequence[Mapping[str, Any]], context: Context
) -> Replayed:
    """Run the passes of a history again, hold exact ones to their contract site by site, and compare what is stored.

    Whole outputs cannot tell a change of a hundredth from the rounding of weights to 16 bits; this can.

    Args:
        before: the original.
        after: what was made of it, as stored.
        history: what was done, each entry with its plan.
        context: of the run.
    """
    current = before
    for entry in history:
        if "pass" not in entry:
            return Replayed(False, f"{entry.get('recipe', 'training')} cannot be done again")
        try:
            (step,) = parse_pipeline(str(entry["pass"]))
            plan = Plan.from_dict(entry.get("plan") or {})
            verify_with: Any = "sites" if is_exact(entry) else "off"
            current, result = run_pass(current, step, context, plan=plan, verify_with=verify_with)
        except ContractError as error:
            return Replayed(False, broken=error.message)
        except GraphoptError as error:
            return Replayed(False, f"{entry['pass']} cannot be done again: {error.message}")
        failed = next((r for r in result.refused if r.rolled_back), None)
        if failed is not None:
            return Replayed(False, broken=f"{entry['pass']} at {failed.block}: {failed.reason}")
    folded = fold(current, to_store=True)
    if difference(folded, after):
        return Replayed(False, "its graph is not what its passes make of the original today")
    for name, weight in after.weights.items():
        recomputed, stored = folded.weights[name].source.load(), weight.source.load()
        if not _nearly_equal(recomputed, stored):
            return Replayed(False, broken=f"weight {weight.name} is not what its passes make of the original")
    return Replayed(True)


def _nearly_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal, or next to one another: sums on another machine may round the other way."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if torch.equal(first, second):
        return True
    if not first.is_floating_point():
        return False
    step = torch.finfo(first.dtype).eps
    a, b = first.double(), second.double()
    # a sum that cancels is as exact as what was added
    return bool(((a - b).abs() <= step * torch.maximum(a.abs(), a.abs().mean())).all())
