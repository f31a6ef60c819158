"""Holding a pass to its contract: exact ones site by site, approximate ones by a metric and a budget."""

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
    """Check what a contract says of values, and note the largest error.

    Raises:
        SiteError: the contract is broken; it names the values at which that shows first.
    """
    contract = step.promises()
    if isinstance(contract, (Exact, ExactAt, AddsOutputs)):
        checks = check_sites(before, after)
        entry.checks = len(checks)
        entry.error = max((c.error for c in checks), default=0.0)
        broken = [c for c in checks if not c.holds]
        if broken:
            raise _broken(step, broken, len(checks))
        if how == "full":
            _whole(before, after, step, entry, inputs)
    elif isinstance(contract, ExactInChunks):
        try:
            step.check(before, after, entry)
        except ContractError as error:
            raise SiteError(error) from error


def _broken(step: Pass, broken: list[SiteCheck], count: int) -> SiteError:
    names = {c.old for c in broken}
    # a fault shows again in whatever is compared through it
    first = [c for c in broken if not names & set(c.through)] or broken
    worst = max(first, key=lambda c: c.error)
    error = ContractError(
        f"{step.name} promised to be exact: {worst.new} differs from {worst.old} by "
        f"{worst.error:.2g} relative{': ' + worst.reason if worst.reason else ''} "
        f"({worst.weights} weights, limit {LIMIT:.0e}; {len(broken)} of {count} sites)",
        node=worst.old,
        source=worst.source,
        hint="the program is left as it was; print the graph around the node with --print-after-all",
    )
    return SiteError(
        error,
        {
            c.old: f"contract not held at {c.old}, which differs by {c.error:.2g} relative"
            + (f": {c.reason}" if c.reason else "")
            for c in first
        },
    )


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
        raise SiteError(
            ContractError(
                f"{step.name} promised to be exact: output {worst} differs by {errors[worst]:.2g} relative"
            )
        )


def require_judgeable(step: Pass, context: Context) -> None:
    """Refuse what says how a loss is judged where nothing judges it.

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
    """Measure what an approximate pass lost, and what another one loses where its contract says that it is judged.

    Raises:
        ContractError: more than its budget.
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
    alone = default_metric(after) if contract.metric == "auto" else contract.metric
    if alone not in ("kl", "cosine"):
        # calibration left the original loaded: two programs at once take twice the memory
        release(before)
    return_memory()
    name, value = context.evaluate(after, before, metric=contract.metric)
    entry.metric[f"{name}{where}"] = value
    original = 0.0
    # what the pass made is loaded for this alone so far
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
