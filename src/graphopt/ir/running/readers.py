"""Readers of a value that outputs depend on.

The mapping to a checkpoint's tensors consists of nodes of the graph as well, although no output depends on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from .evaluate import needed_for

if TYPE_CHECKING:
    from ..program import Program


def readers(program: Program, node: fx.Node) -> list[fx.Node]:
    """Return the readers of a value that an output depends on, in execution order."""
    needed: set[fx.Node] = program.derived(
        "needed", lambda: needed_for(program.outputs.values(), ()), portable=True
    )
    return [user for user in node.users if user in needed]
