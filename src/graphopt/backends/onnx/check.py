"""Validation of a written ONNX file: the requested opset, standard operators, valid shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ir.errors import LoweringError
from .runtime_operators import DOMAIN, NORM

_STANDARD = ("", "ai.onnx")
_SMALL = 1 << 16


def check_file(path: Path, opset: int, kernels: bool = False) -> Counter[str]:
    """Re-read a file and return how often each operator occurs in it.

    Exporters have been seen to write headers that do not match their operators and only log it, so the file is read
    back rather than trusted.

    Args:
        path: of the model; external data is looked for beside it.
        opset: the only one that its header may state.
        kernels: operators of ONNX Runtime's own may occur too.

    Raises:
        LoweringError: the opset differs, the file has functions or non-standard operators, or ONNX's own checker
            (with shapes) refuses it.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise LoweringError(f"the file written cannot be read back: {error}") from error
    stated = {entry.domain: entry.version for entry in model.opset_import}
    if kernels and stated.get(DOMAIN) == 1:
        del stated[DOMAIN]
    if {_STANDARD[0] if d in _STANDARD else d: v for d, v in stated.items()} != {"": opset}:
        listing = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in stated.items())
        raise LoweringError(f"opset {opset} was asked for, and the file states {listing or 'none'}")
    if model.functions:
        names = ", ".join(function.name for function in model.functions[:5])
        raise LoweringError(f"functions are left in the file: {names}")
    operators = Counter[str]()
    for node in _nodes(model.graph):
        if node.domain not in _STANDARD and not (kernels and node.domain == DOMAIN):
            raise LoweringError(
                f"{node.domain}.{node.op_type} is not an operator of ONNX's standard", node=node.name
            )
        operators[node.op_type] += 1
    try:
        onnx.checker.check_model(_checkable(model) if kernels else str(path), full_check=True)
    except Exception as error:
        text = str(error).strip()
        raise LoweringError(
            f"ONNX's checker refuses the file: {text.splitlines()[0] if text else error!r}"
        ) from error
    return operators


def _checkable(model: Any) -> Any:
    """Return a model with weights as inputs and the runtime's norms in its own domain, as the checker takes them."""
    import onnx

    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    del checked.graph.initializer[:]
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        # small ones may be sizes, which shape inference reads
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() < _SMALL:
            checked.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            checked.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    for node in _nodes(checked.graph):
        if node.op_type == NORM:
            node.domain = DOMAIN
    if all(entry.domain != DOMAIN for entry in checked.opset_import):
        checked.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return checked


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
