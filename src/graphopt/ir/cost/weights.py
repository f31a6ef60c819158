"""The number of values in the weights of a running program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..running.fold import depends_on_weights_alone
from .survey import survey

if TYPE_CHECKING:
    from ..program import Program


@dataclass(frozen=True)
class WeightCount:
    """Weights as the running program reads them.

    Attributes:
        parameters: number of values computed from parameters alone.
        parameter_bytes: their bytes.
        bytes: bytes of all weights, buffers and constants included.
    """

    parameters: int
    parameter_bytes: int
    bytes: int


def count_weights(program: Program) -> WeightCount:
    """Return the size of the weights that the program reads, counting each tensor once.

    Operators on weights alone are folded first: a rank that reads a slice of a matrix holds only the slice.
    Unused weights are not counted.
    """
    base, operands = survey(program).base, survey(program).operands
    constant = depends_on_weights_alone(program)
    trained: dict[fx.Node, bool] = {}
    counted: set[fx.Node] = set()
    parameters = parameter_bytes = total = 0
    for node in program.graph.nodes:
        if node not in constant:
            continue
        if node.op == "placeholder":
            trained[node] = program.weights[node.name].kind == "parameter"
        else:
            trained[node] = any(trained.get(source, False) for source in node.all_input_nodes)
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or all(user in constant for user in node.users):
            continue
        numel = int(value.numel())
        # a view of all of a weight, such as its transpose, is the same values again
        whole = base[node] if base[node].meta["val"].numel() == numel else node
        if whole in counted:
            continue
        counted.add(whole)
        size = int(operands[node][0].bytes)
        total += size
        if trained[node]:
            parameters += numel
            parameter_bytes += size
    return WeightCount(parameters, parameter_bytes, total)
