"""Splitting one linear whose result is used in parts into several linears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.facts import FusedProjections
from ...ir.facts import SplitProjections as Split
from ...ir.program import Program
from ..framework.base import Pass
from ..framework.contracts import Exact
from ..framework.plan import Plan, Refused, Site
from ..shared.fused_projections import fused_linears, separate

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SplitProjections(Pass):
    """Split a linear whose result is only used in parts into several linears.

    The inverse of ``fuse-projections``, for checkpoints that store projections fused: plain (Phi-3, GPT-2),
    grouped and interleaved by head (GPT-NeoX, Falcon), gate and up joined or alternating. Each part gets the
    rows of the matrix that produce it. Passes that shard by head or by channel need separate projections.
    """

    name = "split-projections"
    contract = Exact()
    provides = (Split,)
    invalidates = (FusedProjections,)

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield every linear all of whose readers take parts of it, with those parts."""
        for node, pieces in fused_linears(program):
            if isinstance(pieces, str):
                if pieces:
                    yield Refused(node.name, pieces, program.source_line(node))
            elif len(pieces) > 1:
                yield Site(node.name, parts=[piece.node.name for piece in pieces]), (node, pieces)

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Replace each part by a linear of its own."""
        for _, (linear, pieces) in self.chosen(program, plan):
            for piece in pieces:
                separate(program, linear, piece)
