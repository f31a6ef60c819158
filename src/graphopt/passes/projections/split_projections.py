"""One linear whose result is split becomes several linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...ir.facts import FusedProjections
from ...ir.facts import SplitProjections as Split
from ...ir.program import Program
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site
from ..shared.fused_projections import find_pieces, fused_linears, separate

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SplitProjections(Pass):
    """Make several linears of one whose result is only ever used in parts.

    The inverse of ``fuse-projections``, for checkpoints that store projections fused: plain (Phi-3, GPT-2),
    grouped and interleaved by head (GPT-NeoX, Falcon), gate and up in one or alternating. Each part gets the
    rows of the matrix that make it. Passes that place work by head or by channel need separate projections.
    """

    name = "split-projections"
    contract = Exact()
    provides = (Split,)
    invalidates = (FusedProjections,)

    def plan(self, program: Program, context: Context) -> Plan:
        """Take every linear all of whose readers take parts of it."""
        plan = Plan()
        for node, pieces in fused_linears(program):
            if isinstance(pieces, str):
                if pieces:
                    plan.refused.append(Refused(node.name, pieces, program.source_line(node)))
            elif len(pieces) > 1:
                plan.sites.append(Site(node.name, parts=[piece.node.name for piece in pieces]))
        return plan

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Give each part its own linear."""
        nodes = {node.name: node for node in program.graph.nodes}
        for site in plan.sites:
            linear = nodes[site.block]
            pieces = find_pieces(linear)
            assert not isinstance(pieces, str)
            for piece in pieces:
                separate(program, linear, piece)
