"""Who reads a value for the program's sake.

The ways back to a checkpoint's tensors are nodes of the graph as well, though nothing that is returned depends on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from .evaluate import needed_for

if TYPE_CHECKING:
    from ..program import Program


def readers(program: Program, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a value and that an output depends on, in execution order."""
    needed: set[fx.Node] = program.derived(
        "needed", lambda: needed_for(program.outputs.values(), ()), portable=True
    )
    return [user for user in node.users if user in needed]
