"""The part of a graph that the host computes for a device: what depends on integers only, as masks and positions do."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.program import Program
from ..ir.schema import is_operator


def host_nodes(program: Program) -> set[fx.Node]:
    """Return the calls that depend on integer inputs, and on no parameter and no floating-point input."""
    nodes: set[fx.Node] = program.derived("host nodes", lambda: _host_nodes(program), portable=True)
    return nodes


def _host_nodes(program: Program) -> set[fx.Node]:
    device_nodes: set[fx.Node] = set()
    integer_nodes: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            weight = program.weights.get(node.name)
            if weight is not None:
                if weight.kind == "parameter":
                    device_nodes.add(node)
            elif (
                isinstance(value, torch.Tensor)
                and value.dtype.is_floating_point
                and node.meta.get("input") not in program.dials
            ):
                device_nodes.add(node)
            else:
                integer_nodes.add(node)
        elif node.op == "call_function":
            # quantisation belongs to the device
            if is_operator(node, "graphopt.fake_quantize") or any(
                n in device_nodes for n in node.all_input_nodes
            ):
                device_nodes.add(node)
            elif any(n in integer_nodes for n in node.all_input_nodes):
                integer_nodes.add(node)
    return {n for n in integer_nodes if n.op == "call_function"}


def border(program: Program) -> list[fx.Node]:
    """Return the tensors that the host computes and the device reads."""
    host = host_nodes(program)
    outputs = set(program.outputs.values())
    return [
        n
        for n in program.graph.nodes
        if n in host
        and isinstance(n.meta.get("val"), torch.Tensor)
        and (n in outputs or any(u not in host and u.op == "call_function" for u in n.users))
    ]
