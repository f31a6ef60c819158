"""Make one convolution of each group of linear operators that can be one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from ...ir.export_blockers import block_export
from ...ir.facts import FusedBranches
from ...ir.option import option
from ...ir.program import Program
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site
from .equalise import equalise, find_pairs
from .forms import Form
from .groups import find_groups
from .quantisation import compare, described
from .writing import write_form

if TYPE_CHECKING:
    from ...measure.context import Context


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
    provides = (FusedBranches,)
    paper = "arXiv 2406.02652"

    allow_growth: bool = option(False, help="fuse also where that takes more multiply-adds than before")
    equalize: bool = option(
        False, help="then scale channels between convolutions so that their ranges meet, where that is exact"
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Take each group that one convolution can stand for without more multiply-adds."""
        found = find_groups(program, allow_growth=self.allow_growth)
        plan = Plan()
        for node, form in found.forms.items():
            plan.sites.append(Site(node.name, source=form.source.name, **_described(form)))
            both = compare(program, form)
            if both is not None:
                plan.notes.append(described(node.name, *both))
        for node, reason in found.reasons.items():
            plan.refused.append(Refused(node.name, reason, program.source_line(node)))
        if self.equalize:
            trial = program.copy()
            self._fuse(trial, plan.sites)
            pairs = [[pair.first.name, pair.second.name] for pair in find_pairs(trial)]
            if pairs:
                plan.sites.append(Site("channels", equalize=pairs))
            else:
                plan.refused.append(
                    Refused("channels", "there are no convolutions between which a scale would cancel")
                )
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Write the convolutions, in the order of the graph; then scale channels between them."""
        if not plan.sites:
            return
        self._fuse(program, [site for site in plan.sites if site.block != "channels"])
        wanted = [tuple(pair) for site in plan.sites if site.block == "channels" for pair in site["equalize"]]
        now: dict[fx.Node, fx.Node] = {}
        for pair in find_pairs(program) if wanted else []:
            if (pair.first.name, pair.second.name) in wanted:
                first = now.get(pair.first, pair.first)
                now[pair.second] = equalise(program, replace(pair, first=first))
        block_export(program, "branches were fused, which a checkpoint of this architecture would keep")

    def _fuse(self, program: Program, sites: list[Site]) -> None:
        found = find_groups(program, allow_growth=self.allow_growth)
        by_name = {node.name: form for node, form in found.forms.items()}
        order = {name: index for index, name in enumerate(by_name)}
        now: dict[fx.Node, fx.Node] = {}
        for site in sorted(sites, key=lambda s: order.get(s.block, -1)):
            form = by_name[site.block]
            old = form.value
            with program.edit.before(old):
                new = write_form(program, form, now.get(form.source, form.source))
            program.edit.replace(old, new)
            now[old] = new


def _described(form: Form) -> dict[str, object]:
    return {
        "replaces": len(form.nodes),
        "branches": form.branches,
        "kernel": [a.count for a in form.axes],
        "dilation": [a.step for a in form.axes],
        "stride": [a.stride for a in form.axes],
        "groups": form.groups,
    }
