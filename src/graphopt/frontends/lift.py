"""Conversion of a ``torch.export.ExportedProgram`` to a program: names, ties, structure and sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import tree_unflatten

from ..ir.compat import FakeTensorMode, symbol_range
from ..ir.errors import CaptureError
from ..ir.program import Program
from ..ir.signature import Input, Signature, SizeRange
from ..ir.sizes import expression, format_size
from ..ir.structure import describe
from ..ir.weights import InMemory, TensorSource, Weight
from .regions import inline_regions
from .size_limits import read_guards

_WEIGHT_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}


class _Marker:
    """Placeholder for one output while the output structure is read."""

    def __init__(self, index: int):
        self.index = index


def lift(
    exported: ExportedProgram,
    inputs: Mapping[str, Any],
    *,
    sources: Mapping[str, TensorSource] | None = None,
    names: Mapping[str, str] | None = None,
) -> Program:
    """Return a program that shares the exported graph's tensors.

    Args:
        exported: captured with keywords only, in the order of ``inputs``.
        inputs: the example, by parameter name.
        sources: of weight values, by parameter or buffer name, if not in ``exported``.
        names: preferred names of sizes, by symbol name.

    The export's guards on sizes become the signature's constraints, which are not tested yet (see ``size_trials``).

    Raises:
        CaptureError: the model writes to its inputs or buffers, or takes objects that are not tensors.
    """
    # copying also renames nodes whose names fx reserves, such as an input named "input"
    graph = copy.deepcopy(exported.graph)
    inline_regions(graph, exported.graph_module)
    parameters, leaves = {}, {}
    for name, value in inputs.items():
        parameters[name], more = describe(value, lambda v: isinstance(v, torch.Tensor), name)
        leaves.update(more)
    mode = _mode_of(graph)
    program = Program(graph, mode, {}, Signature({}, parameters, {"constant": None}))
    _name_sizes(program, names or {})
    _placeholders(program, exported, list(leaves), sources or {})
    _outputs(program, exported)
    read_guards(program, exported)
    return program


def _mode_of(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            mode = value.fake_mode
            assert isinstance(mode, FakeTensorMode)
            return mode
    raise CaptureError("the captured graph has no tensors")


def _name_sizes(program: Program, names: Mapping[str, str]) -> None:
    """Give each size symbol a readable name: the preferred one, batch for a first dimension, or its own."""
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt):
                continue
            for symbol in sorted(expression(size).free_symbols, key=str):
                if symbol in program.symbols:
                    continue
                plain = (
                    {0: "batch", 1: "sequence"}.get(dim, "size")
                    if value.dim() <= 3
                    else ("batch" if dim == 0 else "size")
                )
                wished = names.get(str(symbol), plain)
                used = set(program.symbols.values())
                name, count = wished, 1
                while name in used:
                    count += 1
                    name = f"{wished}_{count}"
                low, high, hint = symbol_range(program.mode, symbol)
                program.symbols[symbol] = name
                # export reports a lower limit of 2 that it does not enforce; size 1 is compared at capture
                program.signature.sizes[name] = SizeRange(low if low > 2 else min(low, 1), high, hint)


def _placeholders(
    program: Program, exported: ExportedProgram, leaf_names: list[str], sources: Mapping[str, TensorSource]
) -> None:
    state: dict[str, torch.Tensor] = {**exported.constants, **exported.state_dict}
    first_node: dict[int, fx.Node] = {}
    leaves = iter(leaf_names)
    nodes = list(program.graph.find_nodes(op="placeholder"))
    for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
        if spec.kind in _WEIGHT_KINDS:
            name = str(spec.target)
            tensor = state.get(name)
            if not isinstance(tensor, torch.Tensor):
                raise CaptureError(f"the model reads {name}, which is not a tensor", node=node.name)
            first = first_node.get(id(tensor))
            if first is not None:
                # a tied tensor is one placeholder that keeps all its names
                weight = program.weights[first.name]
                program.weights[first.name] = Weight(
                    weight.name, weight.source, weight.kind, (*weight.all_names, name), weight.persistent
                )
                node.replace_all_uses_with(first)
                program.graph.erase_node(node)
                continue
            first_node[id(tensor)] = node
            program.weights[node.name] = Weight(
                name=name,
                source=sources.get(name) or InMemory(tensor.detach()),
                kind=_WEIGHT_KINDS[spec.kind],  # type: ignore[arg-type]
                names=(name,),
                persistent=spec.kind is InputKind.PARAMETER
                or (spec.kind is InputKind.BUFFER and bool(spec.persistent)),
                trainable=spec.kind is InputKind.PARAMETER and tensor.requires_grad,
            )
        elif spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                program.graph.erase_node(node)
                continue
            name = next(leaves)
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor):
                raise CaptureError(f"input {name} is not a tensor", node=node.name)
            node.meta["input"] = name
            shape = tuple(format_size(size, program.symbols) for size in value.shape)
            program.signature.inputs[name] = Input(name, value.dtype, shape)
        else:
            raise CaptureError(
                f"the model takes an input of kind {spec.kind.name}, which no program can hold"
            )


def _outputs(program: Program, exported: ExportedProgram) -> None:
    specs = exported.graph_signature.output_specs
    mutated = [str(s.target) for s in specs if s.kind is not OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError(
            f"the model writes to {', '.join(mutated[:3])} while it runs",
            hint="call model.eval() first; a model that updates its buffers cannot be captured",
        )
    flat = list(program.output_node.args[0])  # type: ignore[arg-type]
    marked = [_Marker(i) if isinstance(v, fx.Node) else v for i, v in enumerate(flat)]
    structure, values = describe(
        tree_unflatten(marked, exported.call_spec.out_spec), lambda v: isinstance(v, _Marker)
    )
    program.signature.outputs = structure
    nodes = [flat[values[name].index] for name in program.signature.output_names]
    program.output_node.args = (tuple(nodes),)
    program.output_node.meta["val"] = tuple(n.meta["val"] for n in nodes)
