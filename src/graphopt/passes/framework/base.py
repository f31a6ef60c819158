"""The base of all passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...ir.facts import Canonical, Fact
from ...ir.option import checked, default_of, option, options_of, require_effect, require_known
from ...ir.program import Program
from .contracts import Approximate, Contract, Exact
from .plan import Findings, Plan, Refused, Site, Trial
from .values import format_value

if TYPE_CHECKING:
    from ...ir.checking.report import PassReport
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A change to a program: it is planned first, then carried out.

    Subclasses are frozen dataclasses. Their fields, declared with :func:`~graphopt.passes.option`, are the
    constructor, the pipeline text, the plan file, the help and the page in the catalogue.

    ``requires`` lists types of facts (:mod:`graphopt.ir.facts`) that the program must have, ``provides`` those it has
    afterwards, ``invalidates`` those it loses, ``excludes`` those it must not have.
    ``trial`` holds the options with which ``graphopt inspect`` plans the pass, if it needs any. ``together`` says that
    the sites only make sense as a whole: if one of them fails, none is taken; otherwise that one is rolled back and
    the others are taken. ``metric_calibrates`` says that the option ``metric`` also makes choices on calibration data,
    and so has an effect even beside a user's metric, which only judges.
    """

    name: ClassVar[str] = ""
    contract: ClassVar[Contract] = Exact()
    requires: ClassVar[tuple[type[Fact], ...]] = (Canonical,)
    provides: ClassVar[tuple[type[Fact], ...]] = ()
    invalidates: ClassVar[tuple[type[Fact], ...]] = ()
    excludes: ClassVar[tuple[type[Fact], ...]] = ()
    paper: ClassVar[str] = ""
    metric_calibrates: ClassVar[bool] = False
    trial: ClassVar[Mapping[str, Any]] = {}
    together: ClassVar[bool] = False

    allow_no_match: bool = option(False, help="a pass that matches nothing is not an error")

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for kinds in (cls.requires, cls.provides, cls.invalidates, cls.excludes):
            if not all(isinstance(kind, type) and issubclass(kind, Fact) for kind in kinds):
                raise TypeError(f"{cls.__name__}: facts are types of graphopt.ir.facts, not {kinds!r}")

    def __post_init__(self) -> None:
        checked(self.name, self)
        self.validate()

    def validate(self) -> None:
        """Check options against one another; raise PipelineError with the reason."""

    def find(self, program: Program) -> Iterable[tuple[Site, Any] | Refused]:
        """Yield each site that the pass could take, with what rewriting it needs, and each site it refuses.

        The result depends only on the program and the options. What rewriting needs consists of nodes and plain data,
        in containers and dataclasses.
        """
        raise TypeError(f"pass {self.name} does not plan")

    def findings(self, program: Program) -> Findings:
        """Return what :meth:`find` yields, computed once and shared with the copy that is rewritten."""
        findings: Findings = program.derived(
            ("found", type(self), str(self)), lambda: Findings.of(self.find(program)), portable=True
        )
        return findings

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide what to do, without changing the program; by default every site that was found."""
        return self.findings(program).plan()

    def chosen(self, program: Program, plan: Plan) -> list[tuple[Site, Any]]:
        """Return the sites of a plan, each with what rewriting it needs; see :meth:`find`.

        Raises:
            PassRefusedError: the plan takes a site that the pass refuses.
            KeyError: the plan names a site that the program does not have.
        """
        return self.findings(program).chosen(plan)

    def copied(self, program: Program) -> Program:
        """Return a copy to rewrite, which shares the analyses made of the program so far."""
        copy = program.copy(analysed=True)
        copy.edit.author = self.name
        return copy

    def tried(self, program: Program, plan: Plan) -> Program:
        """Carry out a plan on a copy while planning, where only trying shows whether it works; return the copy.

        The pipeline continues with that copy unless the plan is edited.
        """
        copy = self.copied(program)
        self.rewrite(copy, plan)
        plan.trial = Trial(self, program, plan.sites, copy)
        return copy

    def told(self, program: Program, plan: Plan) -> list[str]:
        """Return notes for the report about the sites of a plan, which may have been edited since it was made."""
        return []

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Carry out the plan, and nothing else."""
        raise TypeError(f"pass {self.name} does not rewrite")

    def check(self, before: Program, after: Program, entry: PassReport) -> None:
        """Check a contract that only the pass itself can check; raise ContractError if it is broken."""
        raise TypeError(f"pass {self.name} checks no contract of its own")

    @classmethod
    def dial_frozen(cls, program: Program, dial: str, value: float) -> None:
        """Clean up after a run-time setting of a program that this pass was run on has been frozen.

        Args:
            program: changed in place; a constant has replaced the setting.
            dial: the setting's name, whichever pass added it.
            value: the value it is frozen at.
        """

    def promises(self) -> Contract:
        """Return the contract with these options; an approximate one is judged by the option ``metric``, if any."""
        metric = getattr(self, "metric", None)
        approximate = isinstance(self.contract, Approximate) and isinstance(metric, str)
        return Approximate(str(metric)) if approximate else self.contract

    def __str__(self) -> str:
        options = []
        for name, field in options_of(type(self)).items():
            value = getattr(self, name)
            default = default_of(field)
            if value != default:
                options.append(f"{name}={format_value(value)}")
        return self.name + ("{" + " ".join(options) + "}" if options else "")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Pass:
        """Return the pass with these options.

        Raises:
            PipelineError: an option is unknown, has a wrong value, or has no effect beside the others.
        """
        require_known(cls.name, cls, options)
        step = cls(**options)
        require_effect(cls.name, step, options)
        return step
