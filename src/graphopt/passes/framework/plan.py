"""Plans: what a pass will do and will not do, as plain data that can be read, edited and stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from ...ir.errors import PassRefusedError, PipelineError

if TYPE_CHECKING:
    from ...ir.program import Program
    from .base import Pass


class Site:
    """A site that a pass rewrites, with the choices made there: ``Site("attention.3", layout="grouped")``."""

    def __init__(self, /, block: str, **choices: Any):
        self.block = block
        self.choices = choices

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and (self.block, self.choices) == (other.block, other.choices)

    def __hash__(self) -> int:
        return hash(self.block)

    def __repr__(self) -> str:
        chosen = "".join(f", {k}={v!r}" for k, v in self.choices.items())
        return f"Site({self.block!r}{chosen})"

    def __getitem__(self, name: str) -> Any:
        if name not in self.choices:
            raise PipelineError(
                f"the plan's site {self.block!r} does not say {name!r}", hint="plan again, or add it"
            )
        return self.choices[name]


@dataclass(frozen=True)
class Refused:
    """A site that a pass leaves alone, the reason, and the line of the model."""

    block: str
    reason: str
    source: str = ""


@dataclass
class Findings:
    """What a pass could do to a program (:meth:`Pass.find`): sites, what rewriting each needs, and refusals.

    It refers to the nodes of one graph, and is carried over to copies of it.
    """

    sites: list[Site] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    work: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[tuple[Site, Any] | Refused]) -> Findings:
        """Collect what :meth:`Pass.find` yields."""
        findings = cls()
        for entry in entries:
            if isinstance(entry, Refused):
                findings.refused.append(entry)
            else:
                findings.sites.append(entry[0])
                findings.work[entry[0].block] = entry[1]
        return findings

    def plan(self) -> Plan:
        """Return a plan that takes every site; it may be edited."""
        return Plan(copy.deepcopy(self.sites), list(self.refused))

    def chosen(self, plan: Plan) -> list[tuple[Site, Any]]:
        """Return the sites of a plan, in its order, each with what rewriting it needs.

        Raises:
            PassRefusedError: the plan takes a site that the pass refuses.
            KeyError: the plan names a site that the program does not have.
        """
        reasons = {refused.block: refused.reason for refused in self.refused}
        for site in plan.sites:
            if site.block not in self.work and site.block in reasons:
                raise PassRefusedError(
                    f"the plan takes {site.block}, which cannot be taken: {reasons[site.block]}",
                    node=site.block,
                )
        return [(site, self.work[site.block]) for site in plan.sites]


class Trial:
    """A program on which a plan was carried out while planning.

    The pipeline continues with it once, instead of carrying out the plan again, provided that the plan still has the
    same sites and is followed by the same pass, with the same options, on the same unchanged program.
    """

    def __init__(self, step: Pass, before: Program, sites: list[Site], after: Program):
        self._step = step
        self._before, self._version = before, before.version
        self._sites = copy.deepcopy(sites)
        self._after: Program | None = after

    @property
    def after(self) -> Program:
        """The rewritten program, which may be measured but not edited."""
        assert self._after is not None
        return self._after

    def take(self, step: Pass, before: Program, sites: list[Site]) -> Program | None:
        """Return the program rewritten by this pass at these sites; None if it does not match or was taken already."""
        if step != self._step or before is not self._before or before.version != self._version:
            return None
        if sites != self._sites:
            return None
        after, self._after = self._after, None
        return after


@dataclass
class Plan:
    """What a pass will do: sites taken with their choices, sites refused with reasons, and the scores behind them.

    ``told`` holds the pass's notes about these sites (:meth:`Pass.told`), ``trial`` the program on which planning tried
    them (:meth:`Pass.tried`). Neither is part of a plan file, whose sites may be edited.
    """

    sites: list[Site] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list, compare=False)
    trial: Trial | None = field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, in the form of a plan file."""
        return {
            "sites": [{"block": s.block, **_plain(s.choices)} for s in self.sites],
            "refused": [
                {"block": r.block, "reason": r.reason} | ({"source": r.source} if r.source else {})
                for r in self.refused
            ],
            "scores": {k: float(v) for k, v in self.scores.items()},
            "notes": list(self.notes),
        }

    def to_follow(self) -> Plan:
        """Return the plan to follow, perhaps after it was edited, with its notes marked as made while planning."""
        chosen_blocks = {site.block for site in self.sites}
        prefix = "when it was planned: "
        notes = [note if note.startswith(prefix) else prefix + note for note in self.notes]
        refused = [r for r in self.refused if r.block not in chosen_blocks]
        return Plan(list(self.sites), refused, dict(self.scores), notes, trial=self.trial)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        """Return the plan that plain data describes.

        Raises:
            PipelineError: it does not have the form of a plan.
        """
        if not isinstance(data, dict):
            raise PipelineError(f"{where} must be a mapping with sites, refused and scores")
        unknown = set(data) - {"sites", "refused", "scores", "notes"}
        if unknown:
            raise PipelineError(f"{where} has unknown entries: {', '.join(sorted(map(str, unknown)))}")
        plan = cls()
        for entry in _entries(data, "sites", where):
            if not isinstance(entry, dict) or not isinstance(entry.get("block"), str):
                raise PipelineError(f"{where}: each site must be a mapping with the name of a block")
            if not all(isinstance(key, str) for key in entry):
                raise PipelineError(f"{where}: the choices at {entry['block']} must have words for names")
            plan.sites.append(Site(**entry))
        for entry in _entries(data, "refused", where):
            if not isinstance(entry, dict) or not {"block", "reason"} <= set(entry):
                raise PipelineError(f"{where}: each refused site must have block and reason")
            plan.refused.append(
                Refused(str(entry["block"]), str(entry["reason"]), str(entry.get("source", "")))
            )
        try:
            plan.scores = {str(k): float(v) for k, v in (data.get("scores") or {}).items()}
        except (TypeError, ValueError, AttributeError):
            raise PipelineError(f"{where}: scores must be numbers by name") from None
        plan.notes = [str(n) for n in _entries(data, "notes", where)]
        return plan


def _entries(data: dict[str, Any], name: str, where: str) -> list[Any]:
    entries = data.get(name)
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise PipelineError(f"{where}: {name} must be a list")
    return entries


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def write_plans(steps: list[tuple[str, Plan]], note: str = "") -> str:
    """Return a plan file: the pipeline's passes in order, each with its plan."""
    document = {"graphopt_plan": 1, "passes": [{"pass": text, **plan.as_dict()} for text, plan in steps]}
    if note:
        document["note"] = note
    text: str = yaml.safe_dump(document, sort_keys=False, width=110, allow_unicode=True)
    if not text.isprintable() and yaml.safe_load(text) != document:
        # rare line separators would be read back as spaces
        text = yaml.safe_dump(document, sort_keys=False, width=110, allow_unicode=False)
    return text


def read_plans(text: str, where: str = "plan file") -> list[tuple[str, Plan]]:
    """Return the passes and plans of a file written by :func:`write_plans` and perhaps edited.

    Raises:
        PipelineError: it is not YAML or not of that form.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PipelineError(f"{where} is not YAML: {error}") from None
    except RecursionError:
        raise PipelineError(f"{where} is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # raised by the YAML reader's conversions for malformed numbers and dates
        raise PipelineError(f"{where} is not YAML: {error}") from None
    if not isinstance(document, dict) or document.get("graphopt_plan") != 1:
        raise PipelineError(f"{where} is not a graphopt plan (graphopt_plan: 1)")
    steps = []
    for entry in _entries(document, "passes", where):
        if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
            raise PipelineError(f"{where}: each entry of passes must name its pass")
        body = {k: v for k, v in entry.items() if k != "pass"}
        steps.append((entry["pass"], Plan.from_dict(body, f"{where}: {entry['pass']}")))
    return steps
