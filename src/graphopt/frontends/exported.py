"""Capture from ``torch.export``: an ExportedProgram in memory, or a ``.pt2`` file that the caller trusts."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

from ..ir.canonical import canonicalise
from ..ir.compat import quiet_export
from ..ir.errors import CheckpointError
from ..ir.program import Program
from .lift import lift
from .size_limits import settle_by_guards


def capture_exported(exported: ExportedProgram) -> Program:
    """Return a program from an exported one; its inputs have the names of the placeholders.

    Raises:
        CaptureError: it writes to its state, or takes objects that are not tensors.
    """
    tensors = [*exported.state_dict.values(), *exported.constants.values()]
    copied = copy.deepcopy(exported, {id(t): t for t in tensors if isinstance(t, torch.Tensor)})
    inputs = {}
    nodes = list(copied.graph.find_nodes(op="placeholder"))
    for node, spec in zip(nodes, copied.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument):
            inputs[node.name] = node.meta["val"]
    program = lift(copied, inputs)
    settle_by_guards(program)
    canonicalise(program)
    program.origin.kind = "exported"
    return program


def capture_pt2(path: str | os.PathLike[str], *, trust: bool) -> Program:
    """Return a program from a ``.pt2`` file.

    Raises:
        CheckpointError: the caller does not trust it, or it cannot be read.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist")
    if not trust:
        raise CheckpointError(
            f"{path} was not read: torch.export.load can run code from a .pt2 file, "
            "pickled or in its shape expressions",
            hint="say trust=True (--trust) if you made it or know who did",
        )
    try:
        with quiet_export():
            exported = torch.export.load(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return capture_exported(exported)
