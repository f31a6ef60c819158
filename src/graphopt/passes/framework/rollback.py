"""Sites whose rewrite fails: rolled back one by one, so that the others of a pass go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...ir.errors import ContractError, GraphoptError, PassRefusedError, VerificationError
from .plan import Plan, Refused, Site

T = TypeVar("T")


class SiteError(Exception):
    """An attempt at a plan failed in a way that leaving sites out may mend.

    Args:
        error: what happened.
        reasons: what is wrong, by the names of the values at which it shows first, where they are known.
    """

    def __init__(self, error: Exception, reasons: Mapping[str, str] | None = None):
        super().__init__(str(error))
        self.error = error
        self.reasons = dict(reasons or {})


@dataclass(frozen=True)
class Settled:
    """What held: the result of the last good attempt (None if no site is left), its plan, what was left out."""

    result: Any
    plan: Plan
    failed: list[Refused]
    error: Exception | None


def may_be_left_out(error: Exception) -> bool:
    """Tell whether an error in a rewrite says something of sites, not of options, files or the machine."""
    if isinstance(error, GraphoptError):
        return isinstance(error, (VerificationError, ContractError, PassRefusedError))
    return not isinstance(error, (MemoryError, OSError))


def settle(plan: Plan, attempt: Callable[[Plan], T], *, together: bool) -> Settled:
    """Return the result for as many sites of a plan as hold.

    An attempt starts from the untouched program, so a site that is left out leaves no trace. Where a failure
    names values, the sites that own them are left out; otherwise sites are searched by halves, in their order,
    on top of those that hold. Whatever is returned was attempted as it is, all its checks included.

    Args:
        plan: with sites.
        attempt: rewrites and checks a plan; raises :class:`SiteError` where leaving sites out may help.
        together: sites that make sense as a whole only; all of them hold, or none.
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
    held: list[Site] = []
    result: T | None = None

    def take(part: list[Site], problem: SiteError | None) -> None:
        nonlocal held, result
        if problem is None:
            try:
                result = attempt(_only(plan, [*held, *part]))
            except SiteError as again:
                problem = again
            else:
                held = [*held, *part]
                return
        if len(part) == 1:
            failed.append(_refused(part[0], problem))
            return
        half = len(part) // 2
        take(part[:half], None)
        take(part[half:], None)

    take(sites, first)
    return Settled(result, _without(plan, held, failed), failed, first.error)


def _owners(sites: list[Site], nodes: Iterable[str]) -> list[Site]:
    """The sites that are, or in their choices name, one of these values."""
    names = set(nodes)
    return [site for site in sites if names & _words(site)]


def _words(site: Site) -> set[str]:
    found = {site.block}
    work: list[Any] = list(site.choices.values())
    while work:
        value = work.pop()
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, (list, tuple)):
            work += value
        elif isinstance(value, dict):
            work += value.values()
    return found


def _only(plan: Plan, sites: list[Site]) -> Plan:
    return replace(plan, sites=list(sites), refused=list(plan.refused), notes=list(plan.notes))


def _without(plan: Plan, sites: list[Site], failed: list[Refused]) -> Plan:
    return replace(_only(plan, sites), refused=[*plan.refused, *failed])


def _refused(site: Site, problem: SiteError) -> Refused:
    words, error = _words(site), problem.error
    own = next((reason for name, reason in problem.reasons.items() if name in words), None)
    if own is not None:
        reason = own
    elif isinstance(error, GraphoptError):
        reason = error.message if isinstance(error, ContractError) else f"its rewrite failed: {error.message}"
    else:
        said = str(error).strip().splitlines()
        reason = f"its rewrite failed: {type(error).__name__}" + (f": {said[0]}" if said else "")
    return Refused(site.block, reason, getattr(error, "source", None) or "")
