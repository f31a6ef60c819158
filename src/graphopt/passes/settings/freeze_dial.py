"""Freezing a run-time setting of a program at one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...ir.errors import PipelineError
from ...ir.export_blockers import export_blockers
from ...ir.inputs import remove_dial
from ...ir.option import option
from ...ir.program import Program
from ..framework.base import Pass
from ..framework.contracts import Approximate
from ..framework.plan import Plan, Site
from ..framework.registry import find_pass, pass_locations

if TYPE_CHECKING:
    from ...measure.context import Context


@dataclass(frozen=True, kw_only=True)
class FreezeDial(Pass):
    """Freeze a run-time setting: the program no longer takes it, and runs as it did with the setting at this value.

    Used on a value found by ``graphopt sweep`` before the program is shipped or lowered. A number of active experts
    becomes an entry in the configuration of a Hugging Face folder.
    """

    name = "freeze-dial"
    contract = Approximate()
    trial = {"value": 1.0}  # noqa: RUF012

    dial: str | None = option(None, help="name of the setting; may be left out where there is one")
    value: float | None = option(None, help="value it is frozen at; its default if not given")

    def _setting_name(self, program: Program) -> str:
        names = list(program.dials)
        if self.dial is None and len(names) == 1:
            return names[0]
        if self.dial not in names:
            raise PipelineError(
                f"{self.name}: "
                + (
                    f"there is no run-time setting {self.dial!r}"
                    if self.dial
                    else "say which run-time setting"
                ),
                hint=f"the program's run-time settings are {', '.join(names)}"
                if names
                else "the program has no run-time settings",
            )
        return self.dial

    def plan(self, program: Program, context: Context) -> Plan:
        """Check the value against the setting's range."""
        if not program.dials and self.dial is None:
            return Plan()
        name = self._setting_name(program)
        dial = program.dials[name]
        value = dial.default if self.value is None else self.value
        if not dial.low <= value <= dial.high:
            raise PipelineError(
                f"{self.name}: {name} cannot be {value:g}, its range is {dial.low:g} to {dial.high:g}"
            )
        return Plan([Site(name, value=float(value))])

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Replace the setting by a constant."""
        for site in plan.sites:
            if site.block not in program.dials:
                raise PipelineError(
                    f"the plan names {site.block!r}, which is no run-time setting of this program"
                )
            value = torch.tensor(float(site["value"]), dtype=torch.float64)
            constant = program.edit.add_weight(f"dial.{site.block}", value, kind="constant", persistent=False)
            program.edit.replace(program.input_nodes[site.block], constant)
            remove_dial(program, site.block)
            for name in _installed_passes(program):
                find_pass(name).dial_frozen(program, site.block, float(site["value"]))


def _installed_passes(program: Program) -> list[str]:
    """Return the installed passes that a program went through, each once."""
    installed = pass_locations()
    names = [
        *(str(entry.get("pass", "")).partition("{")[0] for entry in program.history),
        *export_blockers(program),
    ]
    return [name for name in dict.fromkeys(names) if name in installed]
