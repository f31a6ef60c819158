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
    """Name the passes that provide what the given ones lack; nothing if there are none."""
    provided = program.facts.kinds.union(*(step.provides for step in passes))
    lacking = {fact for step in passes for fact in step.requires if fact not in provided}
    offers = {
        fact: [name for name in BUILT_IN if fact in find_pass(name).provides]
        for fact in sorted(lacking, key=lambda kind: kind.name)
    }
    return ", ".join(
        f"{' or '.join(names)} before it makes the program {fact.done}"
        for fact, names in offers.items()
        if names
    )


def _first_problem(facts: set[type[Fact]], passes: Sequence[Pass]) -> str | None:
    for index, current in enumerate(passes):
        missing = [fact for fact in current.requires if fact not in facts]
        if missing:
            lacking = " and ".join(kind.done for kind in missing)
            return f"{current.name} (pass {index + 1}) requires a program that is {lacking}, which nothing before it makes"
        present = [fact for fact in current.excludes if fact in facts]
        if present:
            done = ", ".join(kind.done for kind in present)
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
    require_judgeable(step, context)
    began = time.perf_counter()
    given = plan is not None
    if plan is None:
        plan = _planned(program, step, context)
    else:
        plan = plan.as_given()
    seconds["plan"] = time.perf_counter() - began
    if not plan.sites and not step.allow_no_match:
        raise PassRefusedError(
            f"{step.name} matched nothing" + _reasons(plan),
            hint="allow_no_match=true lets the pipeline go on",
        )
    written = _versions(program)
    if given and plan.sites:
        _look(program, step)

    def attempt(chosen: Plan) -> tuple[Program, PassReport]:
        return _attempt(program, step, chosen, seconds, verify_with, inputs, planned=not given)

    settled = settle(plan, attempt, together=step.together)
    settled.plan.trial = None
    _untouched(program, written)
    if settled.error is not None and settled.result is None and not step.allow_no_match:
        raise settled.error
    plan = settled.plan
    try:
        working, entry = settled.result or attempt(plan)
    except SiteError as problem:
        raise problem.error from problem
    entry.refused = [Refusal(r.block, r.reason, r.source) for r in plan.refused]
    entry.given = given
    if settled.failed:
        for refusal in entry.refused[-len(settled.failed) :]:
            refusal.rolled_back = True
        context.log(
            f"a fault of {step.name}: {len(settled.failed)} sites were rolled back, first "
            f"{settled.failed[0].block}: {settled.failed[0].reason}; please report it"
        )
    if verify_with != "off" and plan.sites:
        began = time.perf_counter()
        judge(program, working, step, context, entry)
        seconds["contract"] = seconds.get("contract", 0.0) + time.perf_counter() - began
    working.facts.discard(*step.invalidates)
    # a pass that was kept from its work has provided nothing; one that found none to do has
    if plan.sites or not (given or plan.refused):
        working.facts.provide(step.provides)
    entry.change = _change(program, working)
    plan.told = step.told(program, plan)
    entry.notes = [*plan.told, *plan.notes, *context.notes]
    working.history.append(_record(step, plan, entry, context))
    working.edit.end()
    return working, entry


def _planned(program: Program, step: Pass, context: Context) -> Plan:
    """Return a pass's plan; one that refuses everything is a plan without sites where the pipeline may go on."""
    try:
        with refusing_guards(program.mode):
            return step.plan(program, context)
    except PassRefusedError as error:
        if not step.allow_no_match:
            raise
        return Plan(refused=[Refused(error.node or step.name, error.message, error.source or "")])


def _look(program: Program, step: Pass) -> None:
    """Let a pass whose plan was given find its places before the program is copied, so that no attempt does it again."""
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
    """Do what a plan says on a copy and check it; times of several attempts add up.

    Raises:
        SiteError: it failed in a way that leaving sites out may mend.
    """
    began = time.perf_counter()

    def count(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[what] = seconds.get(what, 0.0) + now - began
        began = now

    # what planning had to try is what goes on: it is not made a second time
    tried = plan.trial.take(step, program, plan.sites) if plan.trial is not None else None
    working = step.copied(program) if tried is None else tried
    contract = step.promises()
    entry = PassReport(step.name, str(step), str(contract), [s.block for s in plan.sites], seconds=seconds)
    try:
        with refusing_guards(program.mode):
            if tried is None:
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


def _change(before: Program, after: Program) -> dict[str, tuple[float, float]]:
    first, second = run_totals(before), run_totals(after)
    return {name: (float(value), float(second[name])) for name, value in first.items()}


def _record(step: Pass, plan: Plan, entry: PassReport, context: Context) -> dict[str, Any]:
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
