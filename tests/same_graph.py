"""Comparison of two programs node for node, apart from names of nodes; captures by stamping beside full ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from graphopt.frontends import huggingface, torch_module, transformers_module
from graphopt.frontends.stamping.record import CannotStamp
from graphopt.ir.facts import Capture
from graphopt.ir.program import Program
from graphopt.ir.weights import Absent, InMemory, digest


def numbered(program: Program) -> list[Any]:
    """Return each node as (operator, arguments, shape, weight), numbered from the outputs."""
    numbers: dict[fx.Node, int] = {}
    lines: list[Any] = []

    def frozen(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"%{numbers[value]}"
        if isinstance(value, (list, tuple)):
            return [frozen(v) for v in value]
        if isinstance(value, dict):
            return {k: frozen(v) for k, v in value.items()}
        return repr(value)

    def shape(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), [str(program.size_text(s)) for s in value.shape]
        if isinstance(value, (list, tuple)):
            return [shape(v) for v in value]
        return type(value).__name__

    def weight(node: fx.Node) -> Any:
        found = program.weights.get(node.name)
        if found is None:
            return node.meta.get("input")
        value = digest(found.source.load()) if found.kind == "constant" else ""
        name = () if found.kind == "constant" else found.all_names
        return name, found.kind, found.persistent, found.trainable, source(found.source), value

    stack = [(n, False) for n in reversed(program.output_node.args[0])]
    while stack:
        node, ready = stack.pop()
        if node in numbers:
            continue
        if not ready:
            stack.append((node, True))
            stack += [(n, False) for n in reversed(node.all_input_nodes)]
            continue
        lines.append(
            (
                node.op,
                str(node.target) if node.op == "call_function" else weight(node),
                frozen(node.args),
                frozen(node.kwargs),
                shape(node.meta.get("val")),
                (node.meta.get("custom") or {}).get("graphopt"),
            )
        )
        numbers[node] = len(numbers)
    lines.append([frozen(n) for n in program.output_node.args[0]])
    return lines


def source(value: Any) -> Any:
    """Return what a source of values reads."""
    if isinstance(value, InMemory):
        return digest(value.tensor)
    return (type(value).__name__, value.name) if isinstance(value, Absent) else value


def both(capture: Callable[[], Program], monkeypatch: pytest.MonkeyPatch) -> tuple[Program, Program]:
    """Return a program captured by stamping and one whose layers were all exported."""
    stamped = capture()
    with monkeypatch.context() as patch:
        for module in (huggingface, torch_module, transformers_module):
            patch.setattr(module, "plan_stamping", lambda *_: CannotStamp("all are wanted"))
        full = capture()
    assert full.facts[Capture].layers == "all exported: all are wanted"
    return stamped, full


def require_same(stamped: Program, full: Program) -> None:
    assert numbered(stamped) == numbered(full)
    names = [[w.name for w in program.weights.values()] for program in (stamped, full)]
    assert names[0] == names[1], "weights are listed in another order"
    assert list(stamped.checkpoint) == list(full.checkpoint)
    assert stamped.signature == full.signature
    stamped.graph.lint()
