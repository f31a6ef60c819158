"""Make one convolution of each group of linear operators that can be one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...ir.export_blockers import block_export
from ...ir.facts import FusedBranches
from ...ir.option import option
from ...ir.program import Program
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site, Trial
from ..framework.rollback import may_be_left_out
from .equalise import Pair, equalise, find_pairs
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
        plan = Plan()
        # kernels are functions that read one graph: they are found in the copy that goes on
        made = self.copied(program)
        found = find_groups(made, allow_growth=self.allow_growth)
        for node, form in found.forms.items():
            plan.sites.append(Site(node.name, source=form.source.name, **_described(form)))
            both = compare(made, form)
            if both is not None:
                plan.notes.append(described(node.name, *both))
        for node, reason in found.reasons.items():
            plan.refused.append(Refused(node.name, reason, made.source_line(node)))
        try:
            _write(made, found.forms.values())
        except Exception as error:
            if self.equalize or not may_be_left_out(error):
                raise
            return plan  # the pipeline finds out which site fails, and leaves that one out
        pairs: list[Pair] = []
        if self.equalize:
            pairs = find_pairs(made)
            if pairs:
                chosen = [[pair.first.name, pair.second.name] for pair in pairs]
                plan.sites.append(Site("channels", equalize=chosen))
            else:
                plan.refused.append(
                    Refused("channels", "there are no convolutions between which a scale would cancel")
                )
        if plan.sites:
            _scale(made, pairs)
            plan.trial = Trial(self, program, plan.sites, made)
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Write the convolutions, in the order of the graph; then scale channels between them."""
        if not plan.sites:
            return
        forms = {n.name: f for n, f in find_groups(program, allow_growth=self.allow_growth).forms.items()}
        order = {name: index for index, name in enumerate(forms)}
        names = [site.block for site in plan.sites if site.block != "channels"]
        _write(program, [forms[name] for name in sorted(names, key=lambda name: order.get(name, -1))])
        wanted = [tuple(pair) for site in plan.sites if site.block == "channels" for pair in site["equalize"]]
        pairs = find_pairs(program) if wanted else []
        _scale(program, [p for p in pairs if (p.first.name, p.second.name) in wanted])


def _write(program: Program, forms: Iterable[Form]) -> None:
    """Write convolutions for forms, in the order of the graph."""
    for form in forms:
        with program.edit.before(form.value):
            new = write_form(program, form, program.edit.now(form.source))
        program.edit.replace(form.value, new)


def _scale(program: Program, pairs: list[Pair]) -> None:
    """Scale channels between convolutions, in the order of the graph."""
    for pair in pairs:
        equalise(program, replace(pair, first=program.edit.now(pair.first)))
    block_export(program, "branches were fused, which a checkpoint of this architecture would keep")


def _described(form: Form) -> dict[str, object]:
    return {
        "replaces": len(form.nodes),
        "branches": form.branches,
        "kernel": [a.count for a in form.axes],
        "dilation": [a.step for a in form.axes],
        "stride": [a.stride for a in form.axes],
        "groups": form.groups,
    }
