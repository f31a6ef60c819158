"""``graphopt verify`` and ``graphopt diff``: compare two programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.checking.verify import compare_programs, verify
from ..ir.errors import CheckpointError, ContractError, PassRefusedError
from ..ir.program import Program
from ..ir.running.examples import example_inputs
from ..ir.storage import load_program
from ..ir.storage.manifest import is_saved_program
from ..ir.text import difference
from ..measure.context import Context
from ..measure.metrics import default_metric
from ..passes.framework.pipeline import parse_pipeline
from .app import Diff, Verify
from .output import show_json, table, text
from .replaying import Replayed, is_exact, replay
from .sources import read_context, read_program

# an error below this comes from summing in another order, whatever type weights are stored in
_FINE = 1e-6

# weights are rounded to their type when they are folded and stored
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def verify_programs(args: Verify) -> None:
    """Compare a saved program with its original and print whether its contracts hold."""
    before = read_program(args.before, args)
    if is_saved_program(Path(args.after)):
        load_program(args.after, check_hashes=True)
    after = read_program(args.after, args)
    verify(after)
    context = read_context(before, args)
    inputs = context.bound(before, context.judging()[0]) if context.data else example_inputs(before)
    missing = set(after.signature.inputs) - set(inputs)
    if missing:
        raise CheckpointError(
            f"{args.after} takes {', '.join(sorted(missing))}, which {args.before} does not"
        )
    errors = compare_programs(before, after, inputs)
    if not errors:
        raise CheckpointError(f"{args.before} and {args.after} share no output")
    entries = after.history[len(before.history) :]
    if after.history[: len(before.history)] != before.history:
        entries = after.history
    replayed = replay(before, after, entries, context)
    judgement = _judge(before, after, entries, replayed, errors, context, args.budget)
    metrics = _metrics(before, after, context) if context.data else {}
    if args.as_json:
        show_json(
            {"passes": [e.get("pass", e.get("recipe")) for e in entries], "exact": judgement.limit is not None,
             "errors": errors, "limit": judgement.limit, "replayed": replayed.same, "metrics": metrics,
             "verdict": judgement.verdict, "budgets": judgement.broken}
        )  # fmt: skip
    else:
        for entry in entries:
            sites = [str(site.get("block")) for site in entry.get("plan", {}).get("sites", ())]
            sites_text = ", ".join(sites[:6]) + (f" and {len(sites) - 6} more" if len(sites) > 6 else "")
            text(
                f"{entry.get('pass', entry.get('recipe'))}  ({entry.get('contract')})  {sites_text}".rstrip()
            )
        rows = [(n, f"{e:.3g}") for n, e in errors.items()]
        table("Outputs, relative error in float64", ("output", "error"), rows)
        for name, value in metrics.items():
            text(f"{name}: {value:.6g}")
        text(f"replayed: {'the same program' if replayed.same else replayed.reason or replayed.broken}")
        text(f"contract: {judgement.promise}")
        text(
            "".join(f"  {line}\n" for line in judgement.broken) + f"verdict: the contract {judgement.verdict}"
        )
    if judgement.broken:
        raise ContractError(f"{args.after} does not keep its contract: {'; '.join(judgement.broken)}")
    if judgement.open:
        raise PassRefusedError(f"{args.after} was not judged: {judgement.open}", hint=judgement.hint)


@dataclass
class _Judgement:
    """Whether contracts hold: what is broken, and what could not be judged."""

    limit: float | None
    promise: str
    broken: list[str]
    open: str = ""
    hint: str = ""

    @property
    def verdict(self) -> str:
        return "does not hold" if self.broken else f"was not judged: {self.open}" if self.open else "holds"


def _judge(
    before: Program, after: Program, entries: Sequence[dict[str, Any]], replayed: Replayed, errors: dict[str, float],
    context: Context, budget: float | None,
) -> _Judgement:  # fmt: skip
    broken = [replayed.broken] if replayed.broken else []
    broken += [f"{n} is no longer an output" for n in before.signature.output_names if n not in errors]
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    if all(is_exact(entry) for entry in entries):
        limit = rounding(before, after)
        promise = f"exact up to the rounding of stored weights, at most {limit:.0e}"
        judgement = _Judgement(limit, promise, broken)
        if not errors[worst] <= limit:
            broken.append(f"output {worst} differs by {errors[worst]:.3g}")
        elif not replayed.same and errors[worst] > _FINE and limit > ROUNDING[torch.float32]:
            # rounding to 16 bits could hide any error of this size
            judgement.open = (
                f"{replayed.reason}, and rounding to 16 bits would hide the error {errors[worst]:.3g}"
            )
            judgement.hint = "run its passes again on the original, or on a float32 copy of it"
        return judgement
    judgement = _Judgement(None, "approximate", broken)
    budgets = _budgets(entries, budget)
    if not context.data:
        judgement.open, judgement.hint = "there is no data to judge an approximation on", "give --data FILE"
    elif not budgets:
        judgement.open = "no pass has a budget, so its contract does not limit the loss"
        judgement.hint = "--budget NUMBER sets the allowed loss"
    for name, metric, allowed in budgets if context.data else []:
        loss = context.loss(after, before, metric=metric)
        if not loss <= allowed * (1 + 1e-9):
            broken.append(f"{name} has a budget of {allowed:g}, the loss is {loss:.3g}")
    return judgement


def _metrics(before: Program, after: Program, context: Context) -> dict[str, float]:
    name = default_metric(before)
    metrics = {name: context.evaluate(after, before, metric=name)[1]}
    if name == "perplexity":
        metrics["perplexity before"] = context.evaluate(before, before, metric=name)[1]
    return metrics


def _budgets(history: Sequence[dict[str, Any]], budget_of_call: float | None) -> list[tuple[str, str, float]]:
    """Return each budget: where it comes from, the metric it applies to, and its value."""
    budgets = [] if budget_of_call is None else [("this call", "auto", budget_of_call)]
    steps = (parse_pipeline(str(entry["pass"]))[0] for entry in history if "pass" in entry)
    for step in steps:
        budget = getattr(step, "budget", None)
        if budget is not None:
            budgets.append((step.name, str(getattr(step, "metric", "auto")), float(budget)))
    return budgets


def rounding(*programs: Program) -> float:
    """Return the largest relative error that the rounding of stored weights explains."""
    stored = {w.source.dtype for program in programs for w in program.weights.values()}
    return max((ROUNDING.get(dtype, 1e-2) for dtype in stored if dtype.is_floating_point), default=1e-4)


def diff_programs(args: Diff) -> None:
    """Print the differences of two graphs."""
    before, after = (read_program(source, args) for source in (args.first, args.second))
    changed = difference(before, after)
    if args.as_json:
        names = sorted({*before.operators, *after.operators})
        counts = {name: [p.operators.get(name, 0) for p in (before, after)] for name in names}
        show_json({"diff": changed.splitlines(), "operators": counts})
    else:
        text(changed or "the graphs are the same")
