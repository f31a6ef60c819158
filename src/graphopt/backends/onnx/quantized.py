"""QuantizeLinear and DequantizeLinear: weights stored as integers, and no unquantised value on the device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.errors import LoweringError
from ...ir.operators.traits import Trait, has
from ...ir.program import Program
from ...ir.running.fold import drop_unread_weights
from ...ir.schema import arguments, is_operator, normal_call
from ...ir.weights import TensorSource

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_BIASED = ("Conv", "Gemm", "ConvTranspose")


def pairs_in(program: Program) -> int:
    """Return the number of rounding operators in a program."""
    return sum(has(n, Trait.ROUNDING) for n in program.nodes)


def without_rounding(program: Program) -> Program:
    """Return the program without its rounding operators, as it was before quantising."""
    copy = program.copy()
    for node in list(copy.nodes):
        if has(node, Trait.ROUNDING):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            for name, mapped in copy.checkpoint.items():
                if mapped is node:
                    copy.checkpoint[name] = node.args[0]  # type: ignore[assignment]
            copy.graph.erase_node(node)
    copy.changed()
    return copy


@dataclass(frozen=True)
class Restored:
    """Dequantised values of an integer weight, computed when they are read."""

    integers: TensorSource
    scale: TensorSource
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the integers."""
        return self.integers.shape

    def load(self) -> torch.Tensor:
        """Multiply."""
        integers = self.integers.load()
        call = torch.ops.graphopt.fake_quantize_channels
        restored: torch.Tensor = call(
            torch.empty(integers.shape, dtype=torch.float32),
            self.scale.load(),
            integers,
            axis=0,
            dtype="int8",
        )
        return restored.to(self.dtype)


def with_integers(program: Program) -> Program:
    """Return a program in which weights with fitted integers are replaced by their dequantised values."""
    copy = program.copy()
    for node in list(copy.nodes):
        if not is_operator(node, "graphopt.fake_quantize_channels"):
            continue
        args = dict(arguments(node))
        if args["integers"] is None:
            continue
        integers, scale = (copy.weights[args[n].name] for n in ("integers", "scale"))
        source = Restored(integers.source, scale.source, args["x"].meta["val"].dtype)
        args["x"] = copy.edit.add_weight(f"{integers.name}_restored", source)
        args["integers"] = None
        node.args, node.kwargs = normal_call(node.target, args)
    drop_unread_weights(copy)
    copy.changed()
    return copy


def store_weights(model: Any) -> None:
    """Replace weights in place by the integers that DequantizeLinear reads, transposed if its readers transpose them."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != QUANTIZE or not node.inputs[0].is_initializer():
            continue
        weight, scale, zero = node.inputs
        (use,) = node.outputs[0].uses()
        back = use.node
        # a single scale has an axis too, which has no meaning
        axis = node.attributes["axis"].as_int() if len(scale.shape) else None
        order = None
        readers = [u.node for u in back.outputs[0].uses()]
        if axis is not None and readers and all(r.op_type == "Transpose" for r in readers):
            orders = {tuple(r.attributes["perm"].as_ints()) for r in readers}
            order = list(orders.pop()) if len(orders) == 1 else None
        name = f"{weight.name}_{back.outputs[0].name}"
        stored = _value(weight, scale, zero, axis, order, name)
        if order is not None and len(scale.shape) == 2:
            # scales of blocks have the layout of their weight
            for index, parameter in ((1, scale), (2, zero)):
                back.replace_input_with(
                    index, _transposed(graph, parameter, f"{name}_{'scale' if index == 1 else 'zero'}")
                )
        graph.register_initializer(stored)
        back.replace_input_with(0, stored)
        if order is not None:
            import onnx_ir

            assert axis is not None
            back.attributes["axis"] = onnx_ir.AttrInt64("axis", order.index(axis))
            back.outputs[0].shape = stored.shape
            for reader in readers:
                reader.outputs[0].replace_all_uses_with(back.outputs[0])
                graph.remove(reader, safe=True)
        else:
            for reader in [r for r in readers if r.op_type == "Transpose"]:
                _turn_integers(graph, back, reader, axis)
        graph.remove(node, safe=True)
        for initializer in (weight, scale, zero):
            if not initializer.uses():
                graph.initializers.pop(initializer.name, None)


def _turn_integers(graph: Any, back: Any, reader: Any, axis: int | None) -> None:
    """Transpose the integers instead of the dequantised values, so that an embedding that is also the head is stored once.

    Args:
        graph: changed.
        back: the DequantizeLinear, which other nodes read too.
        reader: the node that transposes its result.
        axis: of the scales; None for a single scale.
    """
    import onnx_ir

    order = list(reader.attributes["perm"].as_ints())
    stored, scale, zero = back.inputs
    name = reader.outputs[0].name
    if len(scale.shape) == 2:
        scale, zero = _transposed(graph, scale, f"{name}_scale"), _transposed(graph, zero, f"{name}_zero")
    turned = onnx_ir.node("Transpose", [stored], attributes={"perm": order})
    attributes = dict(back.attributes)
    if axis is not None:
        attributes["axis"] = onnx_ir.AttrInt64("axis", order.index(axis))
    again = onnx_ir.Node("", DEQUANTIZE, [turned.outputs[0], scale, zero], attributes.values())
    for value, dtype in ((turned, stored.dtype), (again, reader.outputs[0].dtype)):
        value.outputs[0].shape = reader.outputs[0].shape
        value.outputs[0].type = onnx_ir.TensorType(dtype)
    turned.outputs[0].name, again.outputs[0].name = f"{name}_integers", f"{name}_numbers"
    graph.insert_before(reader, [turned, again])
    reader.outputs[0].replace_all_uses_with(again.outputs[0])
    graph.remove(reader, safe=True)


def _value(weight: Any, scale: Any, zero: Any, axis: int | None, order: list[int] | None, name: str) -> Any:
    """Return an initialiser whose integers are computed when the file is written."""
    import numpy
    import onnx_ir

    kind = zero.dtype
    low, high = _limits(kind)
    shape = [int(s) for s in weight.shape]
    if order is not None:
        shape = [shape[i] for i in order]

    def load() -> Any:
        values = weight.const_value.numpy().astype(numpy.float32)
        step, offset = (
            scale.const_value.numpy().astype(numpy.float32),
            zero.const_value.numpy().astype(numpy.float32),
        )
        if len(step.shape) == 2:
            step = numpy.repeat(step, values.shape[1] // step.shape[1], 1)
            offset = numpy.zeros(1, numpy.float32)
        elif axis is not None:
            wide = [1] * values.ndim
            wide[axis] = -1
            step, offset = step.reshape(wide), offset.reshape(wide)
        integers = numpy.clip(numpy.rint(values / step) + offset, low, high)
        if order is not None:
            integers = integers.transpose(order)
        return onnx_ir.tensor(numpy.ascontiguousarray(integers).astype(kind.numpy()), dtype=kind, name=name)

    lazy = onnx_ir.LazyTensor(load, dtype=kind, shape=onnx_ir.Shape(shape), name=name)
    return onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(kind), const_value=lazy
    )


def _transposed(graph: Any, stored: Any, name: str) -> Any:
    import numpy
    import onnx_ir

    tensor = onnx_ir.tensor(
        numpy.ascontiguousarray(stored.const_value.numpy().T), dtype=stored.dtype, name=name
    )
    value = onnx_ir.Value(
        name=name, shape=tensor.shape, type=onnx_ir.TensorType(stored.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _limits(kind: Any) -> tuple[int, int]:
    import onnx_ir

    bounds = {
        onnx_ir.DataType.UINT8: (0, 255), onnx_ir.DataType.INT8: (-127, 127), onnx_ir.DataType.UINT16: (0, 65535),
        onnx_ir.DataType.INT16: (-32768, 32767), onnx_ir.DataType.INT4: (-7, 7),
    }  # fmt: skip
    limits: tuple[int, int] = bounds[kind]
    return limits


def require_quantized(model: Any, expected: int, parameters: set[str]) -> None:
    """Raise an error if a Q/DQ pair was lost, or the device would compute a value without a quantisation.

    Values that depend on integers and tables alone, such as masks and position angles, do not count.

    Args:
        model: the graph.
        expected: how many pairs the program has.
        parameters: names of initialisers that were trained.

    Raises:
        LoweringError: names the values.
    """
    counts = Counter(node.op_type for node in model.graph)
    if counts[DEQUANTIZE] < expected:
        raise LoweringError(
            f"{expected} values are quantised in the program, and {counts[DEQUANTIZE]} are in the file"
        )
    bare = []
    unquantized = {v for v in model.graph.inputs if v.dtype is not None and v.dtype.is_floating_point()}
    unquantized |= {v for name, v in model.graph.initializers.items() if name in parameters}
    at_boundary = set(unquantized)
    for node in model.graph:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            at_boundary.update(node.outputs)
            continue
        if not any(v in at_boundary for v in node.inputs):
            continue
        for index, value in enumerate(node.inputs):
            # a bias is added to accumulators, which are wide
            if value in unquantized and not (index == 2 and node.op_type in _BIASED):
                bare.append(f"{value.name}, which {node.op_type} {node.outputs[0].name} reads")
        at_boundary.update(node.outputs)
        for value in node.outputs:
            numbers = value.dtype is not None and value.dtype.is_floating_point()
            users = [u.node.op_type for u in value.uses()]
            if numbers and (value.is_graph_output() or any(u != QUANTIZE for u in users)):
                bare.append(f"{node.op_type} {value.name}")
    if bare:
        more = f" and {len(bare) - 8} more" if len(bare) > 8 else ""
        raise LoweringError(
            f"these values have no quantisation: {', '.join(bare[:8])}{more}",
            hint="they appear if one operator is written as several: opset=23 has attention and norms as one each, "
            "and fit-target decomposes others beforehand",
        )
