"""Writing an affine form into the graph as one convolution, and computing its kernel as a tensor."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.running.execute import interpret
from .forms import Form
from .geometry import Axis

aten = torch.ops.aten
CONVOLUTION = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


class OnGraph:
    """Builds kernels as nodes over the weights."""

    def __init__(self, program: Program):
        self.program = program

    def __call__(self, node: fx.Node) -> Any:
        """Return the node."""
        return node

    def apply(self, operator: Any, *arguments: Any) -> Any:
        """Insert a call and return its node."""
        return self.program.edit.call(operator, *arguments)

    def constant(self, shape: list[int], value: float, dtype: torch.dtype) -> Any:
        """Return a tensor of equal values."""
        return self.program.edit.call(aten.full.default, shape, value, dtype=dtype)


class OnTensors:
    """Reads nodes as float64 tensors, for reports."""

    def __init__(self, program: Program):
        self.program = program
        self.known: dict[fx.Node, torch.Tensor] = {}

    def __call__(self, node: fx.Node) -> Any:
        """Return the node's value."""
        if node not in self.known:
            if node.op == "placeholder":
                value = self.program.weights[node.name].source.load()
            else:
                value = interpret(self.program, {}, record=[node], stop=True)[node.name]
            self.known[node] = value.double()
        return self.known[node]

    def apply(self, operator: Any, *arguments: Any) -> Any:
        """Return the result of a call."""
        return operator(*arguments)

    def constant(self, shape: list[int], value: float, dtype: torch.dtype) -> Any:
        """Return a tensor of equal values."""
        return torch.full(shape, value, dtype=torch.float64)


def write_form(program: Program, form: Form, source: fx.Node) -> fx.Node:
    """Insert the convolution of an affine form over ``source``, and return it."""
    kernel, bias = (_as_weight(program, v, source) for v in form.build(OnGraph(program)))
    source, padding = pad_source(program, form.axes, form.mode, source)
    return program.edit.call(
        CONVOLUTION[len(form.axes)], source, kernel, bias,
        [a.stride for a in form.axes], padding, [a.step for a in form.axes], form.groups,
    )  # fmt: skip


def pad_source(
    program: Program, axes: tuple[Axis, ...], mode: str, source: fx.Node
) -> tuple[fx.Node, list[int]]:
    """Return the input and padding of a form's convolution; padding it cannot do itself is a node of its own."""
    low, high = [a.low for a in axes], [a.high for a in axes]
    if low == high and min(low) >= 0 and mode in ("", "zeros"):
        return source, low
    return _pad(program, source, low, high, mode), [0] * len(low)


def _as_weight(program: Program, node: fx.Node | None, source: fx.Node) -> fx.Node | None:
    """Return a kernel's node in the dtype of its input; a kernel that reads no weight becomes a weight."""
    if node is None:
        return None
    dtype = source.meta["val"].dtype
    if node.meta["val"].dtype != dtype:
        node = program.edit.call(aten.to.dtype, node, dtype)  # folding rounds it once
    if _reads_a_weight(program, node):
        return node
    tensor = interpret(program, {}, record=[node], stop=True)[node.name]
    program.edit.erase_dead([node])
    names = {name for weight in program.weights.values() for name in weight.all_names}
    name = next(n for n in (f"fused.kernel_{i}" for i in itertools.count()) if n not in names)
    return program.edit.add_weight(name, tensor, kind="buffer")


def _reads_a_weight(program: Program, node: fx.Node) -> bool:
    work, seen = [node], {node}
    while work:
        current = work.pop()
        if current.name in program.weights:
            return True
        work += [n for n in current.all_input_nodes if n not in seen]
        seen.update(current.all_input_nodes)
    return False


def _pad(program: Program, source: fx.Node, low: list[int], high: list[int], mode: str) -> fx.Node:
    def sizes(values: list[tuple[int, int]]) -> list[int]:
        flat = [size for pair in reversed(values) for size in pair]
        return flat if any(flat) else []

    pairs = list(zip(low, high, strict=True))
    if mode in ("", "zeros"):
        pad = sizes(pairs)
        return program.edit.call(aten.pad.default, source, pad) if pad else source
    padded = sizes([(max(a, 0), max(b, 0)) for a, b in pairs])
    source = program.edit.call(aten.pad.default, source, padded, mode)
    cropped = sizes([(min(a, 0), min(b, 0)) for a, b in pairs])
    return program.edit.call(aten.pad.default, source, cropped) if cropped else source
