"""Running a pipeline: order, plans, rewriting on a copy, verification, contracts, report, rollback."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..ir.collector import settled_objects
from ..ir.cost import run_totals
from ..ir.errors import ContractError, GraphoptError, PassRefusedError, PipelineError, VerificationError
from ..ir.program import Program
from ..ir.report import PassReport, Refusal, Report
from ..ir.sites import LIMIT, changed_values, check_sites
from ..ir.verify import compare_programs, verify
from ..ir.weights import InMemory
from .base import Pass
from .context import Context
from .contracts import AddsOutputs, Approximate, Exact, ExactAt, ExactInChunks, NewFunction
from .pipeline import format_pipeline
from .plan import Plan
from .registry import BUILT_IN, find_pass

Verify = Literal["sites", "full", "off"]


def check_order(program: Program, passes: Sequence[Pass]) -> None:
    """Refuse an order of passes that cannot work, and name one that can.

    Raises:
        PipelineError: a pass would lack a fact it requires, or meet one it excludes.
    """
    problem = _first_problem(set(program.facts), passes)
    if problem is None:
        return
    hint = ""
    if len(passes) <= 6:
        for order in itertools.permutations(passes):
            if _first_problem(set(program.facts), order) is None:
                hint = f"this order works: {format_pipeline(order)}"
                break
    raise PipelineError(
        problem, hint=hint or _who_provides(program, passes) or "no order of these passes works"
    )


def _who_provides(program: Program, passes: Sequence[Pass]) -> str:
    """Name the passes that provide what the given ones lack; nothing if there are none."""
    provided = set(program.facts).union(*(step.provides for step in passes))
    lacking = {fact for step in passes for fact in step.requires if fact not in provided}
    offers = {
        fact: [name for name in BUILT_IN if fact in find_pass(name).provides] for fact in sorted(lacking)
    }
    return ", ".join(
        f"{' or '.join(names)} before it provides {fact}" for fact, names in offers.items() if names
    )


def _first_problem(facts: set[str], passes: Sequence[Pass]) -> str | None:
    for index, current in enumerate(passes):
        missing = [fact for fact in current.requires if fact not in facts]
        if missing:
            lacking = ", ".join(missing)
            return f"{current.name} (pass {index + 1}) requires {lacking}, which nothing before it provides"
        present = [fact for fact in current.excludes if fact in facts]
        if present:
            return f"{current.name} (pass {index + 1}) cannot run on a program that is {', '.join(present)}"
        facts = (facts - set(current.invalidates)) | set(current.provides)
    return None


def run_pipeline(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    *,
    plans: Sequence[Plan] | None = None,
    verify_with: Verify = "sites",
    dump: Callable[[int, str, Program], None] | None = None,
    inputs: dict[str, Any] | None = None,
) -> Program:
    """Run passes in order and return a new program; the given one stays as it is.

    Args:
        program: where to start.
        passes: what to run.
        context: data and services.
        plans: one per pass, to obey instead of planning.
        verify_with: compare rewritten sites ("sites"), whole programs as well ("full"), or nothing ("off").
        dump: called with the number, name and program after each pass.
        inputs: for "full": flat inputs by name.

    Raises:
        PassRefusedError: a pass matched nothing, and was not allowed to.
        ContractError: a pass changed more than it promises.
        VerificationError: a pass broke the graph.
    """
    check_order(program, passes)
    if plans is not None and len(plans) != len(passes):
        raise PipelineError(f"{len(plans)} plans for {len(passes)} passes")
    report = Report([*(program.report.passes if program.report else [])])
    current = program
    for index, step in enumerate(passes):
        plan = plans[index] if plans is not None else None
        try:
            current, entry = run_pass(
                current, step, context, plan=plan, verify_with=verify_with, inputs=inputs
            )
        except GraphoptError as error:
            error.add_note(f"pass {index + 1} of {len(passes)}: {step}")
            raise
        report.passes.append(entry)
        if dump is not None:
            dump(index + 1, step.name, current)
    current.report = report
    return current


def run_pass(
    program: Program,
    step: Pass,
    context: Context,
    *,
    plan: Plan | None = None,
    verify_with: Verify = "sites",
    inputs: dict[str, Any] | None = None,
) -> tuple[Program, PassReport]:
    """Run one pass on a copy; the copy counts only when it has passed its checks."""
    with settled_objects():
        return _run_pass(program, step, context, plan, verify_with, inputs)


def _run_pass(
    program: Program,
    step: Pass,
    context: Context,
    plan: Plan | None,
    verify_with: Verify,
    inputs: dict[str, Any] | None,
) -> tuple[Program, PassReport]:
    seconds: dict[str, float] = {}
    context.notes = []
    began = time.perf_counter()
    given = plan is not None
    if plan is None:
        plan = step.plan(program, context)
    seconds["plan"] = time.perf_counter() - began
    if not plan.sites and not step.allow_no_match:
        raise PassRefusedError(
            f"{step.name} matched nothing" + _reasons(plan),
            hint="allow_no_match=true lets the pipeline go on",
        )
    began = time.perf_counter()
    working = program.copy()
    written = _versions(program)
    working.edit.author = step.name
    try:
        step.rewrite(working, plan)
    except KeyError as error:
        if not given:
            raise
        raise PipelineError(
            f"the plan of {step.name} names {error.args[0]!r}, which this program does not have",
            hint="graphopt plan lists the sites there are",
        ) from error
    touched = [n for n in working.edit.touched if not n._erased]
    seconds["rewrite"] = time.perf_counter() - began
    began = time.perf_counter()
    verify(working, touched)
    new_function = isinstance(step.promises(), NewFunction)
    verify(working, [new for _, new in changed_values(program, working, may_lose=new_function)])
    _untouched(program, written)
    seconds["verify"] = time.perf_counter() - began
    contract = step.promises()
    entry = PassReport(step.name, str(step), str(contract), [s.block for s in plan.sites])
    entry.refused = [Refusal(r.block, r.reason, r.source) for r in plan.refused]
    entry.seconds = seconds
    if verify_with != "off" and plan.sites:
        began = time.perf_counter()
        _hold(program, working, step, context, entry, verify_with, inputs)
        seconds["contract"] = time.perf_counter() - began
    for fact in step.invalidates:
        working.facts.pop(fact, None)
    working.facts.update(dict.fromkeys(step.provides, True))
    entry.change = _change(program, working)
    entry.notes = [*plan.notes, *context.notes]
    working.history.append(_record(step, plan, contract, entry, context))
    working.edit.author = ""
    working.edit.journal.clear()
    working.edit.touched.clear()
    return working, entry


def _versions(program: Program) -> dict[str, int]:
    held = ((name, weight.source) for name, weight in program.weights.items())
    tensors = {name: source.tensor for name, source in held if isinstance(source, InMemory)}
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}


def _untouched(program: Program, versions: dict[str, int]) -> None:
    """Check that nobody wrote to the tensors that all copies of a program, and the model, share."""
    for name, version in _versions(program).items():
        if name in versions and versions[name] != version:
            raise VerificationError(
                f"the values of weight {program.weights[name].name} were written to in place",
                hint="weights are shared with the model; give the weight another source instead",
            )


def _reasons(plan: Plan) -> str:
    if not plan.refused:
        return ": there is nothing of the kind it looks for"
    lines = [
        f"\n    {r.block}: {r.reason}" + (f"  [{r.source}]" if r.source else "") for r in plan.refused[:8]
    ]
    more = f"\n    and {len(plan.refused) - 8} more" if len(plan.refused) > 8 else ""
    return "".join(lines) + more


def _hold(
    before: Program,
    after: Program,
    step: Pass,
    context: Context,
    entry: PassReport,
    how: Verify,
    inputs: dict[str, Any] | None,
) -> None:
    contract = step.promises()
    if isinstance(contract, (Exact, ExactAt, AddsOutputs)):
        checks = check_sites(before, after)
        entry.checks = len(checks)
        entry.error = max((c.error for c in checks), default=0.0)
        broken = [c for c in checks if not c.holds]
        if broken:
            worst = max(broken, key=lambda c: c.error)
            raise ContractError(
                f"{step.name} promised to be exact: {worst.new} differs from {worst.old} by "
                f"{worst.error:.2g} relative{': ' + worst.reason if worst.reason else ''} "
                f"({worst.weights} weights, limit {LIMIT:.0e}; {len(broken)} of {len(checks)} sites)",
                node=worst.old,
                source=worst.source,
                hint="the program is left as it was; print the graph around the node with --print-after-all",
            )
        if how == "full":
            _whole(before, after, step, entry, inputs)
    elif isinstance(contract, ExactInChunks):
        step.check(before, after, entry)
    elif isinstance(contract, Approximate):
        _approximate(before, after, step, context, entry)


def _whole(
    before: Program, after: Program, step: Pass, entry: PassReport, inputs: dict[str, Any] | None
) -> None:
    if inputs is None:
        raise PipelineError('verify="full" needs inputs', hint="give inputs= or data")
    errors = compare_programs(before, after, inputs)
    worst = max(errors, key=lambda name: errors[name])
    entry.metric[f"whole program, {worst}"] = errors[worst]
    # differences grow through a network; sites are held to the tighter limit
    if not errors[worst] <= 1e-8:
        raise ContractError(
            f"{step.name} promised to be exact: output {worst} differs by {errors[worst]:.2g} relative"
        )


def _approximate(before: Program, after: Program, step: Pass, context: Context, entry: PassReport) -> None:
    if not context.data and context.user_metric is None:
        entry.notes.append("not judged: no data was given")
        context.log("quality was not measured: give data to judge this pass")
        return
    contract = step.promises()
    metric = getattr(contract, "metric", "auto")
    name, value = context.evaluate(after, before, metric=metric)
    entry.metric[name] = value
    if name not in ("kl", "cosine"):
        entry.metric[f"{name} before"] = context.evaluate(before, before, metric=metric)[1]
    budget = getattr(step, "budget", None)
    if budget is not None:
        loss = context.loss(after, before, metric=metric)
        entry.metric["relative loss"] = loss
        if loss > budget * (1 + 1e-9):
            raise ContractError(
                f"{step.name} loses {loss:.3g} by {name}, its budget is {budget:g}",
                hint="raise the budget, or take fewer sites",
            )


def _change(before: Program, after: Program) -> dict[str, tuple[float, float]]:
    first, second = run_totals(before), run_totals(after)
    return {name: (float(value), float(second[name])) for name, value in first.items()}


def _record(step: Pass, plan: Plan, contract: Any, entry: PassReport, context: Context) -> dict[str, Any]:
    import torch

    return {
        "pass": str(step),
        "contract": str(contract),
        "plan": plan.as_dict(),
        "checks": entry.checks,
        "error": entry.error,
        "metric": dict(entry.metric),
        "data": context.data_hash() if context.data else "",
        "versions": {"torch": torch.__version__},
    }


def dump_to(folder: str | Path) -> Callable[[int, str, Program], None]:
    """Return a dump that writes numbered text files into a folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)

    def write(index: int, name: str, program: Program) -> None:
        (target / f"{index:02d}-{name}.txt").write_text(program.text(blocks=True) + "\n", encoding="utf-8")

    return write
