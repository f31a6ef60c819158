"""Make one convolution of each group of linear operators that can be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from ..ir.program import Program
from .base import Pass
from .contracts import Exact
from .convolutions.forms import Form
from .convolutions.groups import find_groups
from .convolutions.writing import write_form
from .option import option
from .plan import Plan, Refused, Site

if TYPE_CHECKING:
    from .context import Context


@dataclass(frozen=True, kw_only=True)
class FuseBranches(Pass):
    """Fuse parallel and sequential convolutions, poolings, norms and scales into single convolutions.

    Structural re-parameterisation after RepVGG (arXiv 2101.03697), ACNet, DBB, MobileOne and RepCNN (arXiv
    2406.02652), on the graph: any values that are linear in one earlier value over one, two or three axes of
    space or time, with groups, strides, dilation, causal and asymmetric kernels, average pooling, identity,
    BatchNorm in evaluation mode and constant affine maps, nested as they like. Kernels are computed in float64
    and rounded once.
    """

    name = "fuse-branches"
    contract = Exact()
    provides = ("branches_fused",)
    paper = "arXiv 2406.02652"

    allow_growth: bool = option(False, help="fuse also where that takes more multiply-adds than before")

    def plan(self, program: Program, context: Context) -> Plan:
        """Take each group that one convolution can stand for without more multiply-adds."""
        found = find_groups(program, allow_growth=self.allow_growth)
        plan = Plan()
        for node, form in found.forms.items():
            plan.sites.append(Site(node.name, source=form.source.name, **_described(form)))
        for node, reason in found.reasons.items():
            plan.refused.append(Refused(node.name, reason, program.source_line(node)))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Write the convolutions, in the order of the graph."""
        found = find_groups(program, allow_growth=self.allow_growth)
        by_name = {node.name: form for node, form in found.forms.items()}
        now: dict[fx.Node, fx.Node] = {}
        for site in sorted(
            plan.sites, key=lambda s: list(by_name).index(s.block) if s.block in by_name else -1
        ):
            form = by_name[site.block]
            old = form.value
            with program.edit.before(old):
                new = write_form(program, form, now.get(form.source, form.source))
            program.edit.replace(old, new)
            now[old] = new
        program.facts.setdefault(
            "unwritable", "branches were fused, which a checkpoint of this architecture would keep"
        )


def _described(form: Form) -> dict[str, object]:
    return {
        "replaces": len(form.nodes),
        "branches": form.branches,
        "kernel": [a.count for a in form.axes],
        "dilation": [a.step for a in form.axes],
        "stride": [a.stride for a in form.axes],
        "groups": form.groups,
    }
