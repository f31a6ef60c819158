"""Validation of a written ONNX file: the requested opset, standard operators, valid shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ir.errors import LoweringError

_STANDARD = ("", "ai.onnx")


def check_file(path: Path, opset: int) -> Counter[str]:
    """Re-read a file and return how often each operator occurs in it.

    Exporters have been seen to write headers that do not match their operators and only log it, so the file is read
    back rather than trusted.

    Args:
        path: of the model; external data is looked for beside it.
        opset: the only one that its header may state.

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
    if {_STANDARD[0] if d in _STANDARD else d: v for d, v in stated.items()} != {"": opset}:
        listing = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in stated.items())
        raise LoweringError(f"opset {opset} was asked for, and the file states {listing or 'none'}")
    if model.functions:
        names = ", ".join(function.name for function in model.functions[:5])
        raise LoweringError(f"functions are left in the file: {names}")
    operators = Counter[str]()
    for node in _nodes(model.graph):
        if node.domain not in _STANDARD:
            raise LoweringError(
                f"{node.domain}.{node.op_type} is not an operator of ONNX's standard", node=node.name
            )
        operators[node.op_type] += 1
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        text = str(error).strip()
        raise LoweringError(
            f"ONNX's checker refuses the file: {text.splitlines()[0] if text else error!r}"
        ) from error
    return operators


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
