"""Weights that nothing reads any more after part of a program was removed, and the mapping to a checkpoint's tensors."""

from __future__ import annotations

from torch import fx

from ...ir.program import Program
from ...ir.running.evaluate import needed_for


def weights_of(program: Program, node: fx.Node) -> set[fx.Node]:
    """Return the weights that a value is computed from."""
    return {n for n in needed_for([node], ()) if n.op == "placeholder" and n.name in program.weights}


__all__ = ["weights_of"]
