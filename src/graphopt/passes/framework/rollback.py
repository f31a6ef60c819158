"""Rolling back the sites of a pass whose rewrite fails, so that the others are still taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...ir.errors import ContractError, GraphoptError, PassRefusedError, VerificationError
from .plan import Plan, Refused, Site

T = TypeVar("T")


class SiteError(Exception):
    """An attempt at a plan failed in a way that leaving out sites may fix.

    Args:
        error: what happened.
        reasons: what is wrong, by the names of the first values that show it, where they are known.
    """

    def __init__(self, error: Exception, reasons: Mapping[str, str] | None = None):
        super().__init__(str(error))
        self.error = error
        self.reasons = dict(reasons or {})


@dataclass(frozen=True)
class Settled:
    """Outcome of attempts: the last good result (None if no site is left), its plan, the failed sites."""

    result: Any
    plan: Plan
    failed: list[Refused]
    error: Exception | None


def may_be_left_out(error: Exception) -> bool:
    """Tell whether an error in a rewrite concerns sites rather than options, files or the machine."""
    if isinstance(error, GraphoptError):
        return isinstance(error, (VerificationError, ContractError, PassRefusedError))
    return not isinstance(error, (MemoryError, OSError))


def settle(plan: Plan, attempt: Callable[[Plan], T], *, together: bool) -> Settled:
    """Return the result for as many sites of a plan as pass their checks.

    An attempt starts from the untouched program, so a site that is left out leaves no trace. Where a failure
    names values, the sites that own them are left out; otherwise sites are searched by halves, in their order,
    on top of those that pass. The plan that is returned was attempted exactly as it is, with all its checks.

    Args:
        plan: the plan, with sites.
        attempt: rewrites and checks a plan; raises :class:`SiteError` where leaving out sites may help.
        together: whether sites only make sense as a whole, so that either all are taken or none.
    """
    sites = list(plan.sites)
    failed: list[Refused] = []
    first: Exception | None = None
    while sites:
        try:
            result = attempt(_only(plan, sites))
        except SiteError as problem:
            first = first or problem.error
            blamed = sites if together or len(sites) == 1 else _owners(sites, problem.reasons)
            if not blamed:
                return _by_halves(plan, sites, attempt, failed, problem)
            failed += [_refused(site, problem) for site in blamed]
            sites = [site for site in sites if site not in blamed]
        else:
            return Settled(result, _without(plan, sites, failed), failed, first)
    return Settled(None, _without(plan, [], failed), failed, first)


def _by_halves(
    plan: Plan, sites: list[Site], attempt: Callable[[Plan], T], failed: list[Refused], first: SiteError
) -> Settled:
    passing: list[Site] = []
    result: T | None = None

    def take(group: list[Site], problem: SiteError | None) -> None:
        nonlocal passing, result
        if problem is None:
            try:
                result = attempt(_only(plan, [*passing, *group]))
            except SiteError as again:
                problem = again
            else:
                passing = [*passing, *group]
                return
        if len(group) == 1:
            failed.append(_refused(group[0], problem))
            return
        half = len(group) // 2
        take(group[:half], None)
        take(group[half:], None)

    take(sites, first)
    return Settled(result, _without(plan, passing, failed), failed, first.error)


def _owners(sites: list[Site], nodes: Iterable[str]) -> list[Site]:
    """Return the sites that are one of these values, or name one in their choices."""
    names = set(nodes)
    return [site for site in sites if names & _words(site)]


def _words(site: Site) -> set[str]:
    words = {site.block}
    work: list[Any] = list(site.choices.values())
    while work:
        value = work.pop()
        if isinstance(value, str):
            words.add(value)
        elif isinstance(value, (list, tuple)):
            work += value
        elif isinstance(value, dict):
            work += value.values()
    return words


def _only(plan: Plan, sites: list[Site]) -> Plan:
    return replace(plan, sites=list(sites), refused=list(plan.refused), notes=list(plan.notes))


def _without(plan: Plan, sites: list[Site], failed: list[Refused]) -> Plan:
    return replace(_only(plan, sites), refused=[*plan.refused, *failed])


def _refused(site: Site, problem: SiteError) -> Refused:
    words, error = _words(site), problem.error
    site_reason = next((reason for name, reason in problem.reasons.items() if name in words), None)
    if site_reason is not None:
        reason = site_reason
    elif isinstance(error, GraphoptError):
        reason = error.message if isinstance(error, ContractError) else f"its rewrite failed: {error.message}"
    else:
        error_lines = str(error).strip().splitlines()
        reason = f"its rewrite failed: {type(error).__name__}" + (
            f": {error_lines[0]}" if error_lines else ""
        )
    return Refused(site.block, reason, getattr(error, "source", None) or "")
