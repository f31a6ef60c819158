"""Reports of pipelines: sites taken and refused, time, measured errors, cost before and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Refusal:
    """A site that a pass refused: the block or node, the reason, and the line of the model.

    ``rolled_back`` means that the pass took the site and failed there: a fault of the pass, but not of the result.
    """

    block: str
    reason: str
    source: str = ""
    rolled_back: bool = False


@dataclass
class PassReport:
    """The report of one pass."""

    name: str
    text: str
    contract: str
    sites: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: int = 0
    error: float | None = None
    metric: dict[str, float] = field(default_factory=dict)
    change: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    given: bool = False
    """Whether its sites are those of a given plan, regardless of the options."""


@dataclass
class Report:
    """The report of a pipeline, pass by pass."""

    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines: list[str] = []
        for entry in self.passes:
            lines.extend(_lines(entry))
        lines.extend(self.notes)
        return "\n".join(lines) if lines else "no passes ran"


_MAX_NOTES = 8  # notes printed per pass; a deep network has hundreds

_UNITS = {
    "parameters": "",
    "parameter_bytes": "B",
    "flops": "FLOP",
    "bytes": "B",
    "peak_memory": "B",
    "sent_bytes": "B",
}


def quantity(value: float, unit: str = "") -> str:
    """Return a number with a metric prefix: ``22.7 M``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def _refusals(title: str, refused: list[Refusal]) -> list[str]:
    if not refused:
        return []
    lines = [f"  {title}: {len(refused)}"]
    by_reason: dict[str, list[Refusal]] = {}
    for refusal in refused:
        by_reason.setdefault(refusal.reason, []).append(refusal)
    for reason, members in by_reason.items():
        where = ", ".join(r.block for r in members[:4]) + (" ..." if len(members) > 4 else "")
        source = f"  [{members[0].source}]" if members[0].source else ""
        lines.append(f"    {where}: {reason}{source}")
    return lines


def _lines(entry: PassReport) -> list[str]:
    lines = [f"{entry.text}{', by the plan given' if entry.given else ''}  ({entry.contract})"]
    site_names = ", ".join(entry.sites[:12]) + (
        f" and {len(entry.sites) - 12} more" if len(entry.sites) > 12 else ""
    )
    lines.append(f"  sites taken: {len(entry.sites)}" + (f"  {site_names}" if site_names else ""))
    lines.extend(_refusals("sites refused", [r for r in entry.refused if not r.rolled_back]))
    lines.extend(
        _refusals("sites ROLLED BACK, a fault of this pass", [r for r in entry.refused if r.rolled_back])
    )
    if entry.error is not None:
        lines.append(f"  measured error: {entry.error:.2g} relative, float64, {entry.checks} sites compared")
    for name, value in entry.metric.items():
        lines.append(f"  {name}: {value:.6g}")
    for name, (before, after) in entry.change.items():
        if before != after:
            unit = _UNITS.get(name, "")
            ratio = f" ({after / before - 1:+.1%})" if before else ""
            lines.append(
                f"  {name.replace('_', ' ')}: {quantity(before, unit)} -> {quantity(after, unit)}{ratio}"
            )
    if entry.seconds:
        lines.append(
            "  seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in entry.seconds.items())
        )
    lines.extend(f"  {note}" for note in entry.notes[:_MAX_NOTES])
    if len(entry.notes) > _MAX_NOTES:
        lines.append(f"  and {len(entry.notes) - _MAX_NOTES} more notes, listed by as_dict() and --json")
    return lines
