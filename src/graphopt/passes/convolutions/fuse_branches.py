"""Fusing each group of linear operators that one convolution can compute."""

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
    2406.02652), on the graph: any values that are affine in one earlier value over one, two or three axes of
    space or time, with groups, strides, dilation, causal and asymmetric kernels, average pooling, identity,
    BatchNorm in evaluation mode and constant affine maps, nested to any depth. Kernels are computed in float64
    and rounded once.
    """

    name = "fuse-branches"
    contract = Exact()
    provides = (FusedBranches,)
    paper = "arXiv 2406.02652"

    allow_growth: bool = option(False, help="fuse also where that takes more multiply-adds than before")
    equalize: bool = option(
        False, help="then scale channels between convolutions so that their ranges match, where that is exact"
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Take each group that one convolution can compute without more multiply-adds."""
        plan = Plan()
        # kernels are functions that read one graph, so they are found in the copy that is rewritten
        copy = self.copied(program)
        groups = find_groups(copy, allow_growth=self.allow_growth)
        for node, form in groups.forms.items():
            plan.sites.append(Site(node.name, source=form.source.name, **_choices(form)))
            ranges = compare(copy, form)
            if ranges is not None:
                plan.notes.append(described(node.name, *ranges))
        for node, reason in groups.reasons.items():
            plan.refused.append(Refused(node.name, reason, copy.source_line(node)))
        try:
            _write_forms(copy, groups.forms.values())
        except Exception as error:
            if self.equalize or not may_be_left_out(error):
                raise
            return plan  # the pipeline finds out which site fails, and leaves it out
        pairs: list[Pair] = []
        if self.equalize:
            pairs = find_pairs(copy)
            if pairs:
                chosen = [[pair.first.name, pair.second.name] for pair in pairs]
                plan.sites.append(Site("channels", equalize=chosen))
            else:
                plan.refused.append(
                    Refused("channels", "there are no convolutions between which a scale would cancel")
                )
        if plan.sites:
            _equalise_pairs(copy, pairs)
            plan.trial = Trial(self, program, plan.sites, copy)
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Write the convolutions in graph order, then scale channels between them."""
        if not plan.sites:
            return
        forms = {n.name: f for n, f in find_groups(program, allow_growth=self.allow_growth).forms.items()}
        order = {name: index for index, name in enumerate(forms)}
        names = [site.block for site in plan.sites if site.block != "channels"]
        _write_forms(program, [forms[name] for name in sorted(names, key=lambda name: order.get(name, -1))])
        chosen_pairs = [
            tuple(pair) for site in plan.sites if site.block == "channels" for pair in site["equalize"]
        ]
        pairs = find_pairs(program) if chosen_pairs else []
        _equalise_pairs(program, [p for p in pairs if (p.first.name, p.second.name) in chosen_pairs])


def _write_forms(program: Program, forms: Iterable[Form]) -> None:
    """Write the convolutions of affine forms, in graph order."""
    for form in forms:
        with program.edit.before(form.value):
            new = write_form(program, form, program.edit.now(form.source))
        program.edit.replace(form.value, new)


def _equalise_pairs(program: Program, pairs: list[Pair]) -> None:
    """Scale channels between convolutions, in graph order."""
    for pair in pairs:
        equalise(program, replace(pair, first=program.edit.now(pair.first)))
    block_export(program, "branches were fused, which a checkpoint of this architecture would keep")


def _choices(form: Form) -> dict[str, object]:
    return {
        "replaces": len(form.nodes),
        "branches": form.branches,
        "kernel": [a.count for a in form.axes],
        "dilation": [a.step for a in form.axes],
        "stride": [a.stride for a in form.axes],
        "groups": form.groups,
    }
