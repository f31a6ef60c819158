"""The graph as text: one line per node, readable and stable enough to compare."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .schema import operator_name

if TYPE_CHECKING:
    from .program import Program

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]+(?:\n(?!\s*File ")[ \t]*([^\n]*))?')


def source_line(node: fx.Node) -> str:
    """Return ``file:line: code`` of the line of the model that a node came from, or an empty string."""
    saved = node.meta.get("custom", {}).get("graphopt", {}).get("source")
    if saved:
        return str(saved)
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    model_frames = [f for f in frames if "/torch/" not in f[0]]
    file, line, code = (model_frames or frames)[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line}: {code.strip()}"


def format_program(
    program: Program, *, weights: bool = True, sources: bool = False, blocks: bool = False
) -> str:
    """Return the graph as text.

    Args:
        program: what to print.
        weights: list the weights first.
        sources: append the line of the model each node came from.
        blocks: mark the blocks of the anatomy.
    """
    owner: dict[fx.Node, str] = {}
    if blocks:
        for block in program.anatomy.blocks:
            owner.update(dict.fromkeys(block.nodes, block.name))
    lines = []
    for node in program.graph.nodes:
        if not weights and node.op == "placeholder" and node.name in program.weights:
            continue
        line = format_node(program, node)
        notes = [owner[node]] if node in owner else []
        if sources and source_line(node):
            notes.append(source_line(node))
        lines.append(line + ("   # " + " | ".join(notes) if notes else ""))
    return "\n".join(lines)


def format_node(program: Program, node: fx.Node) -> str:
    """Return one node: ``%name = aten.linear(%x, %w) : float32[batch, sequence, 64]``."""
    if node.op == "placeholder":
        if node.name in program.weights:
            weight = program.weights[node.name]
            kept = f", {weight.kept_as}" if weight.kept_as else ""
            return f"%{node.name} = weight {weight.name!r} : {format_value(program, node.meta['val'])}{kept}"
        return f"%{node.name} = input {node.meta['input']!r} : {format_value(program, node.meta['val'])}"
    if node.op == "output":
        pairs = zip(program.signature.output_names, node.args[0], strict=False)  # type: ignore[arg-type]
        return "return " + ", ".join(f"{name}=%{value.name}" for name, value in pairs)
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    name = str(node.target) if hasattr(node.target, "_schema") else operator_name(node.target)
    return f"%{node.name} = {name}({', '.join(arguments)}) : {format_value(program, node.meta.get('val'))}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(v) for v in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def format_value(program: Program, value: Any) -> str:
    """Return type and sizes of a value, with the program's names of sizes."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(program.size_text(s)) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(format_value(program, v) for v in value) + ")"
    if isinstance(value, (int, torch.SymInt)):
        return f"size {program.size_text(value)}"
    return type(value).__name__


def around(program: Program, node: fx.Node, lines: int = 4) -> str:
    """Return the text of the graph around a node, with the node marked."""
    nodes = list(program.graph.nodes)
    if node not in nodes:
        return ""
    position = nodes.index(node)
    excerpt = []
    for index in range(max(0, position - lines), min(len(nodes), position + lines + 1)):
        try:
            text = format_node(program, nodes[index])
        except Exception as error:  # a broken node must still be shown
            text = f"%{nodes[index].name} = ... ({type(error).__name__}: {error})"
        excerpt.append(("  > " if index == position else "    ") + text)
    return "\n".join(excerpt)


def difference(before: Program, after: Program, context: int = 2) -> str:
    """Return a unified diff of the text of two graphs."""
    first, second = format_program(before).splitlines(), format_program(after).splitlines()
    return "\n".join(difflib.unified_diff(first, second, "before", "after", lineterm="", n=context))
