"""One operator as a model of its own, in each type in which values are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.backends.onnx.qnn.measures import reference

from .cases import Case, Operand

KINDS = ("float", "w8a8", "w8a16", "w4a8", "w4a16")
_STORED = {"a8": ("uint8", 255), "a16": ("uint16", 65535)}


def build(case: Case, kind: str, path: Path, opset: int) -> dict[str, Any]:
    """Write the one-operator model of a case in a type, and return its inputs."""
    import ml_dtypes
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = numpy.random.default_rng(7)
    nodes, initialisers, inputs, read, feed = [], [], [], [], {}
    types = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}

    def constant(name: str, value: Any) -> str:
        initialisers.append(numpy_helper.from_array(value, name))
        return name

    def stored(name: str, low: float, high: float) -> str:
        """A value as it is after being stored in the activations' type."""
        if kind == "float":
            return name
        dtype, steps = _STORED[kind[2:]]
        low, high = min(low, 0.0), max(high, 0.0)
        scale = numpy.float32(max(high - low, 1e-6) / steps)
        zero = numpy.array(round(-low / float(scale))).astype(dtype)
        at = [constant(f"{name}_scale", numpy.array(scale)), constant(f"{name}_zero", zero)]
        nodes.append(helper.make_node("QuantizeLinear", [name, *at], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *at], [f"{name}_dq"]))
        return f"{name}_dq"

    def weight(name: str, value: Any) -> str:
        if kind == "float":
            return constant(name, value)
        axis = 0 if case.operator == "Conv" else 1
        scale, wide, options = _scales(value, axis, case.block, 127 if kind.startswith("w8") else 7)
        stored_as = ml_dtypes.int4 if kind.startswith("w4") else numpy.int8
        whole = constant(f"{name}_q", numpy.round(value / wide).astype(stored_as))
        zero = constant(f"{name}_zero", numpy.zeros(scale.shape, stored_as))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [whole, constant(f"{name}_scale", scale), zero], [f"{name}_dq"], **options
            )
        )
        return f"{name}_dq"

    for number, operand in enumerate(case.operands):
        name = f"operand_{number}"
        if operand is None:
            read.append("")
            continue
        if operand.role == "integers":
            value = numpy.array(operand.values, "int64").reshape(operand.shape)
            if not any(o is not None and o.role == "input" for o in case.operands):
                inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, operand.shape))
                feed[name] = value
                read.append(name)
            else:
                read.append(constant(name, value))
            continue
        if operand.role == "condition":
            inputs.append(helper.make_tensor_value_info(name, TensorProto.BOOL, operand.shape))
            feed[name] = draw.uniform(size=operand.shape) < 0.5
            read.append(name)
            continue
        value = draw.uniform(operand.low, operand.high, operand.shape).astype("float32")
        if operand.role == "input":
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, operand.shape))
            feed[name] = value
            read.append(stored(name, operand.low, operand.high))
        elif operand.role == "weight":
            read.append(weight(name, value))
        elif _plain(case, number, operand):
            read.append(constant(name, value))
        else:
            read.append(stored(constant(name, value), operand.low, operand.high))
    if not inputs:
        raise ValueError(f"{case.operator} has no input")
    outs = ["out"] if case.operator != "TopK" else ["out", "places"]
    if case.operator == "Split":
        outs = ["out", "rest"]
    nodes.append(helper.make_node(case.operator, read, outs, **case.attributes))
    shapes = onnx.shape_inference.infer_shapes(_model(nodes, inputs, [], initialisers, opset))
    known = {v.name: v.type.tensor_type for v in shapes.graph.value_info}
    ends = ["out"]
    if kind != "float" and case.output == "float":
        low, high = _range(case, kind, path, nodes, inputs, initialisers, feed, opset)
        ends = [stored("out", low, high)]
    dims = [d.dim_value for d in known["out"].shape.dim] if "out" in known else None
    outputs = [helper.make_tensor_value_info(e, types[case.output], dims) for e in ends]
    onnx.save(_model(nodes, inputs, outputs, initialisers, opset), str(path))
    return feed


def _scales(value: Any, axis: int, block: int, high: int) -> tuple[Any, Any, dict[str, int]]:
    """Return a weight's scales as the pass makes them, one for each entry of the weight, and how the node says it."""
    import numpy

    if block:  # along the other dimension
        parts = value.reshape(-1, block, value.shape[1])
        scale = (abs(parts).max(1) / high).astype("float32")
        return scale, numpy.repeat(scale, block, 0), {"axis": 0, "block_size": block}
    others = tuple(d for d in range(value.ndim) if d != axis)
    scale = (abs(value).max(others) / high).astype("float32")
    return scale, numpy.expand_dims(scale, others), {"axis": axis}


def _plain(case: Case, number: int, operand: Operand) -> bool:
    """Tell whether a constant is no tensor of the model's but a setting of the operator."""
    return case.operator in ("Clip", "Resize", "Pow") or (
        case.operator in ("Gemm", "Conv", "ConvTranspose") and number == 2
    )


def _range(
    case: Case, kind: str, path: Path, nodes: Any, inputs: Any, initialisers: Any, feed: Any, opset: int
) -> tuple[float, float]:
    """Return least and largest value of the output, by running what is there so far."""
    import onnx
    from onnx import TensorProto, helper

    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    onnx.save(_model(nodes, inputs, outputs, initialisers, opset), str(path))
    found = reference(path, feed)["out"]
    return float(found.min()), float(found.max())


def _model(nodes: Any, inputs: Any, outputs: Any, initialisers: Any, opset: int) -> Any:
    from onnx import helper

    graph = helper.make_graph(nodes, "case", inputs, outputs, initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
