"""Running a pipeline: order, plans, rewriting on a copy, verification, contracts, report, rollback."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...ir.checking.report import PassReport, Refusal, Report
from ...ir.checking.sites import changed_values
from ...ir.checking.verify import verify
from ...ir.compat import refusing_guards
from ...ir.cost import run_totals
from ...ir.errors import GraphoptError, PassRefusedError, PipelineError, VerificationError
from ...ir.facts import Fact
from ...ir.program import Program
from ...ir.running.collector import settled_objects
from ...ir.weights import InMemory
from ...measure.context import Context
from .base import Pass
from .contracts import Approximate, NewFunction
from .holding import Verify, hold, judge, require_judgeable
from .pipeline import format_pipeline
from .plan import Plan, Refused
from .registry import BUILT_IN, find_pass
from .rollback import SiteError, may_be_left_out, settle


def check_order(program: Program, passes: Sequence[Pass]) -> None:
    """Refuse an order of passes that cannot work, and name one that can.

    Raises:
        PipelineError: a pass would lack a fact it requires, or meet one it excludes.
    """
    problem = _first_problem(program.facts.kinds, passes)
    if problem is None:
        return
    hint = ""
    if len(passes) <= 6:
        for order in itertools.permutations(passes):
            if _first_problem(program.facts.kinds, order) is None:
                hint = f"this order works: {format_pipeline(order)}"
                break
    raise PipelineError(
        problem, hint=hint or _who_provides(program, passes) or "no order of these passes works"
    )


def _who_provides(program: Program, passes: Sequence[Pass]) -> str:
    """Return a hint naming the passes that provide the facts these passes lack; empty if there are none."""
    provided = program.facts.kinds.union(*(step.provides for step in passes))
    lacking = {fact for step in passes for fact in step.requires if fact not in provided}
    providers = {
        fact: [name for name in BUILT_IN if fact in find_pass(name).provides]
        for fact in sorted(lacking, key=lambda kind: kind.name)
    }
    return ", ".join(
        f"{' or '.join(names)} before it makes the program {fact.done}"
        for fact, names in providers.items()
        if names
    )


def _first_problem(facts: set[type[Fact]], passes: Sequence[Pass]) -> str | None:
    for index, current in enumerate(passes):
        missing = [fact for fact in current.requires if fact not in facts]
        if missing:
            required = " and ".join(kind.done for kind in missing)
            return f"{current.name} (pass {index + 1}) requires a program that is {required}, which nothing before it makes"
        unwanted = [fact for fact in current.excludes if fact in facts]
        if unwanted:
            done = ", ".join(kind.done for kind in unwanted)
            return f"{current.name} (pass {index + 1}) cannot run on a program that is {done}"
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
    """Run passes in order and return a new program; the original is not changed.

    Args:
        program: the program to start from.
        passes: the passes to run.
        context: data and services.
        plans: one per pass, to follow instead of planning.
        verify_with: compare rewritten sites ("sites"), whole programs as well ("full"), or nothing ("off").
        dump: called with the number, name and program after each pass.
        inputs: for "full": flat inputs by name.

    Raises:
        PassRefusedError: a pass matched nothing, and ``allow_no_match`` is not set.
        ContractError: a pass changed more than its contract allows.
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
    """Run one pass on a copy and return the copy once it has passed its checks, with a report."""
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
    require_judgeable(step, context)
    began = time.perf_counter()
    from_file = plan is not None
    if plan is None:
        plan = _plan(program, step, context)
    else:
        plan = plan.to_follow()
    seconds["plan"] = time.perf_counter() - began
    if not plan.sites and not step.allow_no_match:
        raise PassRefusedError(
            f"{step.name} matched nothing" + _reasons(plan),
            hint="allow_no_match=true lets the pipeline go on",
        )
    versions = _versions(program)
    if from_file and plan.sites:
        _find_sites(program, step)

    def attempt(chosen: Plan) -> tuple[Program, PassReport]:
        return _attempt(program, step, chosen, seconds, verify_with, inputs, planned=not from_file)

    outcome = settle(plan, attempt, together=step.together)
    outcome.plan.trial = None
    _require_unwritten(program, versions)
    if outcome.error is not None and outcome.result is None and not step.allow_no_match:
        raise outcome.error
    plan = outcome.plan
    try:
        working, entry = outcome.result or attempt(plan)
    except SiteError as problem:
        raise problem.error from problem
    entry.refused = [Refusal(r.block, r.reason, r.source) for r in plan.refused]
    entry.given = from_file
    if outcome.failed:
        for refusal in entry.refused[-len(outcome.failed) :]:
            refusal.rolled_back = True
        context.log(
            f"a fault of {step.name}: {len(outcome.failed)} sites were rolled back, first "
            f"{outcome.failed[0].block}: {outcome.failed[0].reason}; please report it"
        )
    if verify_with != "off" and plan.sites:
        began = time.perf_counter()
        judge(program, working, step, context, entry)
        seconds["contract"] = seconds.get("contract", 0.0) + time.perf_counter() - began
    working.facts.discard(*step.invalidates)
    # a pass that refused its sites provides no facts; one that found nothing to do still does
    if plan.sites or not (from_file or plan.refused):
        working.facts.provide(step.provides)
    entry.change = _cost_change(program, working)
    plan.told = step.told(program, plan)
    entry.notes = [*plan.told, *plan.notes, *context.notes]
    working.history.append(_history_entry(step, plan, entry, context))
    working.edit.end()
    return working, entry


def _plan(program: Program, step: Pass, context: Context) -> Plan:
    """Return a pass's plan; an empty one if the pass refuses the whole program and ``allow_no_match`` is set."""
    try:
        with refusing_guards(program.mode):
            return step.plan(program, context)
    except PassRefusedError as error:
        if not step.allow_no_match:
            raise
        return Plan(refused=[Refused(error.node or step.name, error.message, error.source or "")])


def _find_sites(program: Program, step: Pass) -> None:
    """Find a pass's sites before the program is copied, so that no attempt on a copy searches again."""
    if type(step).find is not Pass.find:
        with refusing_guards(program.mode):
            step.findings(program)


def _attempt(
    program: Program,
    step: Pass,
    plan: Plan,
    seconds: dict[str, float],
    verify_with: Verify,
    inputs: dict[str, Any] | None,
    *,
    planned: bool,
) -> tuple[Program, PassReport]:
    """Carry out a plan on a copy and check the result; the times of several attempts add up.

    Raises:
        SiteError: it failed in a way that leaving out sites may fix.
    """
    began = time.perf_counter()

    def count(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[what] = seconds.get(what, 0.0) + now - began
        began = now

    # reuse the program that planning already rewrote instead of rewriting again
    trial_program = plan.trial.take(step, program, plan.sites) if plan.trial is not None else None
    working = step.copied(program) if trial_program is None else trial_program
    contract = step.promises()
    entry = PassReport(step.name, str(step), str(contract), [s.block for s in plan.sites], seconds=seconds)
    try:
        with refusing_guards(program.mode):
            if trial_program is None:
                step.rewrite(working, plan)
        count("rewrite")
        verify(working, [n for n in working.edit.touched if not n._erased])
        lossy = isinstance(contract, NewFunction)
        verify(working, [new for _, new in changed_values(program, working, may_lose=lossy)])
    except KeyError as error:
        if planned:
            raise SiteError(error) from error
        raise PipelineError(
            f"the plan of {step.name} names {error.args[0]!r}, which this program does not have",
            hint="graphopt plan lists the sites there are",
        ) from error
    except Exception as error:
        if may_be_left_out(error):
            raise SiteError(error) from error
        raise
    count("verify")
    if verify_with != "off" and plan.sites and not isinstance(contract, Approximate):
        hold(program, working, step, entry, verify_with, inputs)
        count("contract")
    return working, entry


def _versions(program: Program) -> dict[str, int]:
    sources = ((name, weight.source) for name, weight in program.weights.items())
    tensors = {name: source.tensor for name, source in sources if isinstance(source, InMemory)}
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}


def _require_unwritten(program: Program, versions: dict[str, int]) -> None:
    """Check that nothing wrote to the tensors that all copies of a program share with the model."""
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
    remainder = f"\n    and {len(plan.refused) - 8} more" if len(plan.refused) > 8 else ""
    return "".join(lines) + remainder


def _cost_change(before: Program, after: Program) -> dict[str, tuple[float, float]]:
    first, second = run_totals(before), run_totals(after)
    return {name: (float(value), float(second[name])) for name, value in first.items()}


def _history_entry(step: Pass, plan: Plan, entry: PassReport, context: Context) -> dict[str, Any]:
    import torch

    return {
        "pass": str(step),
        "contract": entry.contract,
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
