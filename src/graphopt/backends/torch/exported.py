"""A Program as ``torch.export.ExportedProgram``: for AOTInductor, ExecuTorch, Core ML, ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from ...ir.compat import build_exported_program, symbol_range
from ...ir.errors import LoweringError
from ...ir.program import Program
from ...ir.running.fold import fold
from ...ir.weights import Weight

_ORDER = {"parameter": 0, "buffer": 1, "constant": 2}


@dataclass
class _Lifted:
    graph: fx.Graph
    inputs: list[tuple[fx.Node, str]]
    weights: list[tuple[fx.Node, Weight]]


def exported_program(program: Program, *, core_aten: bool = False, load: bool = True) -> ExportedProgram:
    """Return the program as an ExportedProgram that takes its inputs as keywords and returns a dict.

    Args:
        program: is folded first; inputs that are optional in a program must all be passed to the result.
        core_aten: decompose all graphopt operators.
        load: if False, weights stay fake, for lowering that reads shapes only.
    """
    lifted = _lift(fold(program))
    specs: list[InputSpec] = []
    state: dict[str, torch.Tensor] = {}
    constants: dict[str, torch.Tensor] = {}
    for node, weight in lifted.weights:
        name = _state_name(weight, state, constants)
        tensor = weight.source.load() if load else node.meta["val"]
        if weight.kind == "parameter":
            kind, persistent = InputKind.PARAMETER, None
            state[name] = nn.Parameter(
                tensor, requires_grad=weight.trainable and tensor.dtype.is_floating_point
            )
        elif weight.kind == "buffer" and weight.persistent:
            kind, persistent = InputKind.BUFFER, True
            state[name] = tensor
        else:
            kind, persistent = InputKind.CONSTANT_TENSOR, None
            constants[name] = tensor
        specs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))
    for node, _ in lifted.inputs:
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
    results: Any = lifted.graph.output_node().args[0]
    names = program.signature.output_names
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    examples = {label: _example(program, node) for node, label in lifted.inputs}
    ranges = {s: symbol_range(program.mode, s)[:2] for s in program.symbols}
    exported = build_exported_program(
        lifted.graph, ExportGraphSignature(specs, outputs), state, ranges, examples, constants, names
    )
    if core_aten:
        exported = exported.run_decompositions()
        remaining = [n.name for n in exported.graph.nodes if str(n.target).startswith("graphopt.")]
        if remaining:
            raise LoweringError(f"graphopt operators remain after decomposition: {', '.join(remaining[:5])}")
    return exported


def _state_name(weight: Weight, *tables: dict[str, Any]) -> str:
    name, count = weight.name, 1
    while any(name in table for table in tables):
        count += 1
        name = f"{weight.name}_{count}"
    return name


def _lift(program: Program) -> _Lifted:
    """Copy the graph with weights first, by kind, and inputs after them in the order of the signature."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    weights = sorted(
        ((n, program.weights[n.name]) for n in program.weight_nodes if n.users or n in _returned(program)),
        key=lambda pair: _ORDER[pair[1].kind] if pair[1].persistent else 2,
    )
    by_name = program.input_nodes
    inputs = [
        (by_name[name], name) for name in (*program.signature.inputs, *program.dials) if name in by_name
    ]

    def placeholder(node: fx.Node) -> fx.Node:
        copy = graph.placeholder(node.name)
        copy.target = copy.name
        copy.meta = {"val": node.meta["val"]}
        copies[node] = copy
        return copy

    lifted_weights = [(placeholder(node), weight) for node, weight in weights]
    lifted_inputs = []
    for node, label in inputs:
        copy = placeholder(node)
        lifted_inputs.append((copy, label))
    for node in program.graph.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        elif node.op == "output":
            values = tuple(_distinct(graph, [copies[n] for n in node.args[0]], lifted_inputs, lifted_weights))
            output = graph.output(values)
            output.meta["val"] = tuple(n.meta["val"] for n in values)
    return _Lifted(graph, lifted_inputs, lifted_weights)


def _returned(program: Program) -> set[fx.Node]:
    return set(program.output_node.all_input_nodes)


def _distinct(graph: fx.Graph, values: list[fx.Node], *placeholders: list[Any]) -> list[fx.Node]:
    """Clone repeated outputs and placeholders, since an exported program returns values once and no placeholder."""
    placeholder_nodes = {node for table in placeholders for node, _ in table}
    distinct = []
    for value in values:
        if value in placeholder_nodes:
            copy = graph.call_function(torch.ops.aten.clone.default, (value,))
            copy.meta["val"] = value.meta["val"]
            value = copy
        placeholder_nodes.add(value)
        distinct.append(value)
    return distinct


def _example(program: Program, node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    env = program.mode.shape_env
    assert env is not None
    sizes = [s if isinstance(s, int) else int(s.node.hint) for s in value.shape]
    return torch.zeros(sizes, dtype=value.dtype)
