"""``graphopt verify`` and ``graphopt diff``: two programs side by side."""

from __future__ import annotations

import torch

from ..ir.errors import CheckpointError, ContractError
from ..ir.examples import example_inputs
from ..ir.program import Program
from ..ir.serialize import load_program
from ..ir.text import difference
from ..ir.verify import compare_programs, verify
from ..passes.metrics import default_metric
from .output import show_json, table, text
from .sources import read_context, read_program

# weights are rounded to their type when they are folded and stored
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def verify_programs(
    first: str, second: str, data: str | None, amount: tuple[int, int, int], as_json: bool, trust: bool
) -> None:
    """Compare a saved program with its original and say whether its contracts hold."""
    from pathlib import Path

    from ..ir.serialize.write import is_saved_program

    before = read_program(first, trust)
    if is_saved_program(Path(second)):
        load_program(second, check_hashes=True)
    after = read_program(second, trust)
    verify(after)
    context = read_context(before, data, amount, None, as_json)
    inputs = context.bound(before, context.judging()[0]) if context.data else example_inputs(before)
    missing = set(after.signature.inputs) - set(inputs)
    if missing:
        raise CheckpointError(f"{second} takes {', '.join(sorted(missing))}, which {first} does not")
    errors = compare_programs(before, after, inputs)
    if not errors:
        raise CheckpointError(f"{first} and {second} share no output")
    new = after.history[len(before.history) :]
    exact = all(str(entry.get("contract", "")).startswith(("exact", "adds")) for entry in new)
    limit = rounding(before, after)
    metrics = {}
    if context.data:
        name = default_metric(before)
        metrics[name] = context.evaluate(after, before, metric=name)[1]
        if name == "perplexity":
            metrics["perplexity before"] = context.evaluate(before, before, metric=name)[1]
    worst = max(errors.values())
    budget = _broken_budgets(new, before, after, context)
    budget += [f"{n} is no longer an output" for n in before.signature.output_names if n not in errors]
    holds = (worst <= limit if exact else True) and not budget
    judged = exact or bool(context.data) or not holds
    verdict = ("holds" if holds else "does not hold") if judged else "was not judged; give --data"
    if as_json:
        show_json(
            {"passes": [e.get("pass", e.get("recipe")) for e in new], "exact": exact, "errors": errors,
             "limit": limit if exact else None, "metrics": metrics, "verdict": verdict, "budgets": budget}
        )  # fmt: skip
    else:
        for entry in new:
            text(f"{entry.get('pass', entry.get('recipe'))}  ({entry.get('contract')})")
        table(
            "Outputs, relative error in float64",
            ("output", "error"),
            [(n, f"{e:.3g}") for n, e in errors.items()],
        )
        for name, value in metrics.items():
            text(f"{name}: {value:.6g}")
        promise = f"exact up to the rounding of stored weights, {limit:.0e}" if exact else "approximate"
        text(f"promised: {promise}\nverdict: the contract {verdict}" + "".join(f"\n  {b}" for b in budget))
    if not holds:
        raise ContractError(
            f"{second} does not keep its contract: error {worst:.3g}" + "".join(f"; {b}" for b in budget)
        )


def rounding(*programs: Program) -> float:
    """Return the largest relative error that the rounding of stored weights explains."""
    stored = {
        w.source.dtype for p in programs for w in p.weights.values() if w.source.dtype.is_floating_point
    }
    return max((ROUNDING.get(dtype, 1e-2) for dtype in stored), default=1e-4)


def _broken_budgets(
    history: list[dict[str, object]], before: Program, after: Program, context: object
) -> list[str]:
    from ..passes.context import Context
    from ..passes.pipeline import parse_pipeline

    assert isinstance(context, Context)
    if not context.data:
        return []
    broken = []
    for entry in history:
        if "pass" not in entry:
            continue
        step = parse_pipeline(str(entry.get("pass")))[0]
        budget = getattr(step, "budget", None)
        if budget is not None:
            loss = context.loss(after, before, metric=getattr(step, "metric", "auto"))
            if not loss <= budget * (1 + 1e-9):
                broken.append(f"{step.name} has a budget of {budget:g}, the loss is {loss:.3g}")
    return broken


def diff_programs(first: str, second: str, as_json: bool, trust: bool) -> None:
    """Print how two graphs differ."""
    before, after = read_program(first, trust), read_program(second, trust)
    changed = difference(before, after)
    if as_json:
        show_json(
            {
                "diff": changed.splitlines(),
                "operators": {
                    name: [before.operators.get(name, 0), after.operators.get(name, 0)]
                    for name in sorted({*before.operators, *after.operators})
                },
            }
        )
    else:
        text(changed or "the graphs are the same")
