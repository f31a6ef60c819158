"""Checking the contract of a pass: exact ones site by site, approximate ones by a metric and a budget."""

from __future__ import annotations

from typing import Any, Literal

from ...ir.checking.report import PassReport
from ...ir.checking.sites import LIMIT, SiteCheck, check_sites
from ...ir.checking.verify import compare_programs
from ...ir.errors import ContractError, PipelineError
from ...ir.inputs import standing_at
from ...ir.option import refuse_set
from ...ir.program import Program
from ...ir.running.execute import release, return_memory
from ...measure.context import Context
from ...measure.metrics import default_metric, relative_loss
from .base import Pass
from .contracts import AddsOutputs, Approximate, Exact, ExactAt, ExactInChunks
from .rollback import SiteError

Verify = Literal["sites", "full", "off"]


def hold(
    before: Program,
    after: Program,
    step: Pass,
    entry: PassReport,
    how: Verify,
    inputs: dict[str, Any] | None,
) -> None:
    """Check a contract that concerns values, and record the largest error.

    Raises:
        SiteError: the contract is broken; it names the first values that differ.
    """
    contract = step.promises()
    if isinstance(contract, (Exact, ExactAt, AddsOutputs)):
        checks = check_sites(before, after)
        entry.checks = len(checks)
        entry.error = max((c.error for c in checks), default=0.0)
        failed = [c for c in checks if not c.holds]
        if failed:
            raise _contract_error(step, failed, len(checks))
        if how == "full":
            _compare_whole_programs(before, after, step, entry, inputs)
    elif isinstance(contract, ExactInChunks):
        try:
            step.check(before, after, entry)
        except ContractError as error:
            raise SiteError(error) from error


def _contract_error(step: Pass, failed: list[SiteCheck], count: int) -> SiteError:
    failed_names = {c.old for c in failed}
    # a fault shows up again in every value computed from a faulty one
    first = [c for c in failed if not failed_names & set(c.through)] or failed
    worst = max(first, key=lambda c: c.error)
    error = ContractError(
        f"{step.name} broke its contract to be exact: {worst.new} differs from {worst.old} by "
        f"{worst.error:.2g} relative{': ' + worst.reason if worst.reason else ''} "
        f"({worst.weights} weights, limit {LIMIT:.0e}; {len(failed)} of {count} sites)",
        node=worst.old,
        source=worst.source,
        hint="the program was not changed; print the graph around the node with --print-after-all",
    )
    return SiteError(
        error,
        {
            c.old: f"contract broken at {c.old}, which differs by {c.error:.2g} relative"
            + (f": {c.reason}" if c.reason else "")
            for c in first
        },
    )


def _compare_whole_programs(
    before: Program, after: Program, step: Pass, entry: PassReport, inputs: dict[str, Any] | None
) -> None:
    if inputs is None:
        raise PipelineError('verify="full" needs inputs', hint="give inputs= or data")
    errors = compare_programs(before, after, inputs)
    worst = max(errors, key=lambda name: errors[name])
    entry.metric[f"whole program, {worst}"] = errors[worst]
    # differences grow through a network; the tighter limit applies to single sites
    if not errors[worst] <= 1e-8:
        raise SiteError(
            ContractError(
                f"{step.name} broke its contract to be exact: output {worst} differs by {errors[worst]:.2g} relative"
            )
        )


def require_judgeable(step: Pass, context: Context) -> None:
    """Refuse options on how a loss is judged where nothing judges it.

    Raises:
        PipelineError: a budget or a metric was given, and there is no data, or a metric of the user's judges.
    """
    if not context.data and context.user_metric is None:
        refuse_set(
            step.name, step, ("budget", "metric"), "there is no data to measure the loss on",
            hint="give data= in Python or --data FILE on the command line, or a metric of your own",
        )  # fmt: skip
    if context.user_metric is not None and not step.metric_calibrates:
        refuse_set(
            step.name, step, ("metric",), "a metric of your own judges",
            hint="leave metric out, or evaluate= (--evaluate)",
        )  # fmt: skip


def judge(before: Program, after: Program, step: Pass, context: Context, entry: PassReport) -> None:
    """Measure the loss of an approximate pass, or of one whose contract names a value at which it is judged.

    Raises:
        ContractError: the loss exceeds the pass's budget.
    """
    contract = step.promises()
    where = ""
    if isinstance(contract, ExactAt):
        if contract.judged_at is None or contract.option not in after.dials:
            return
        after = standing_at(after, contract.option, contract.judged_at)
        where = f" at {contract.option}={contract.judged_at:g}"
    elif not isinstance(contract, Approximate):
        return
    if not context.data and context.user_metric is None:
        entry.notes.append("not judged: no data was given")
        context.log("quality was not measured: give data to judge this pass")
        return
    metric = default_metric(after) if contract.metric == "auto" else contract.metric
    if metric not in ("kl", "cosine"):
        # calibration left the original loaded, and two loaded programs take twice the memory
        release(before)
    return_memory()
    name, value = context.evaluate(after, before, metric=contract.metric)
    entry.metric[f"{name}{where}"] = value
    original = 0.0
    # the rewritten program was loaded for this measurement only
    release(after)
    return_memory()
    if name not in ("kl", "cosine"):
        original = entry.metric[f"{name} before"] = context.original(before, metric=contract.metric)
    budget = getattr(step, "budget", None)
    if budget is not None:
        loss = relative_loss(name, value, original)
        entry.metric["relative loss"] = loss
        if loss > budget * (1 + 1e-9):
            raise ContractError(
                f"{step.name} loses {loss:.3g} by {name}{where}, its budget is {budget:g}",
                hint="raise the budget, or take fewer sites",
            )
