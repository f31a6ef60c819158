"""Sizes that could have varied and froze while a model was traced: which, and at which line of the model."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from ..ir.compat import FakeTensorMode, sources_of
from ..ir.facts import Capture, note_capture
from ..ir.program import Program
from ..ir.structure import describe

_PACKAGE = str(Path(__file__).parents[1])
_EXPORTS = str(Path(__file__).with_name("torch_module.py"))
_TORCH = str(Path(torch.__file__).parent)
_KEY = "graphopt_frozen"


def remember(exported: ExportedProgram, stacks: Mapping[str, list[traceback.FrameSummary]]) -> None:
    """Keep with an export, for each dimension of an input that became a number, the line where it did."""
    mode = next(
        (
            value.fake_mode
            for node in exported.graph.find_nodes(op="placeholder")
            if isinstance(value := node.meta.get("val"), torch.Tensor) and hasattr(value, "fake_mode")
        ),
        None,
    )
    if isinstance(mode, FakeTensorMode) and mode.shape_env is not None:
        sources = sources_of(mode)
        exported.graph_module.meta[_KEY] = {
            source: line_of(stack) for symbol, stack in stacks.items() for source in sources.get(symbol, ())
        }


def line_of(stack: Iterable[traceback.FrameSummary]) -> str:
    """Return ``file:line: code`` of the model's innermost line on a stack; a layer of torch's own if there is no other."""
    frames = list(stack)
    began = max((n for n, f in enumerate(frames) if f.filename == _EXPORTS), default=-1)
    inside = frames[began + 1 :]
    own = [f for f in inside if not f.filename.startswith((_TORCH, _PACKAGE, "<"))]
    layers = [f for f in inside if f.filename.startswith(str(Path(_TORCH, "nn")))]
    for chosen in (own, layers):
        if chosen:
            frame = chosen[-1]
            return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}: {(frame.line or '').strip()}"
    return ""


def note_frozen(
    program: Program,
    exported: ExportedProgram,
    inputs: Mapping[str, Any],
    takes: Callable[[dict[str, Any]], bool] | None = None,
) -> None:
    """Record in the fact ``Capture`` each dimension of the inputs that froze, with the line of the model.

    Args:
        program: lifted from the export.
        exported: from :func:`graphopt.frontends.torch_module.export`.
        inputs: the example, by name.
        takes: tells whether the model runs at the sizes of other inputs; what it takes and the program does not is said.
    """
    lines = exported.graph_module.meta.get(_KEY, {})
    frozen: list[tuple[torch.Tensor, str, int, str]] = []
    for path, value, name in _tensors(program, inputs):
        for dim, size in enumerate(value.shape):
            line = lines.get(f"L{keystr(path)}.size()[{dim}]")
            if line is not None and program.signature.inputs[name].shape[dim] == size:
                frozen.append((value, name, dim, line))
    notes = []
    for value, name, dim, line in frozen:
        size = value.shape[dim]
        # alone, or together with all that are as large: a batch of two inputs
        alike = {(id(v), d) for v, _, d, _ in frozen if v.shape[d] == size}
        free = takes is not None and any(takes(_longer(inputs, dims)) for dims in ({(id(value), dim)}, alike))
        others = ", although the model takes others" if free else ""
        notes.append(f"dimension {dim} of {name} is {size}{others}" + (f": {line}" if line else ""))
    if takes is not None:
        # the tracer takes a size of 1 for a number, without saying so
        for _, value, name in _tensors(program, inputs):
            for dim, size in enumerate(value.shape):
                fixed = size == 1 == program.signature.inputs[name].shape[dim]
                if fixed and takes(_longer(inputs, {(id(value), dim)})):
                    notes.append(
                        f"dimension {dim} of {name} is 1 as in the example, although the model takes others"
                    )
    known = (program.facts.get(Capture) or Capture()).fixed_sizes
    new = tuple(note for note in notes if note not in known)
    if new:
        note_capture(program, fixed_sizes=new)


def _tensors(program: Program, inputs: Mapping[str, Any]) -> list[tuple[Any, torch.Tensor, str]]:
    """Return path, tensor and name of each input of the program."""
    pairs, _ = tree_flatten_with_path(dict(inputs))
    names = {
        id(v): n for n, v in describe(dict(inputs), lambda v: isinstance(v, torch.Tensor), "")[1].items()
    }
    found = [(path, value, names[id(value)]) for path, value in pairs if isinstance(value, torch.Tensor)]
    return [entry for entry in found if entry[2] in program.signature.inputs]


def _longer(inputs: Mapping[str, Any], dimensions: Collection[tuple[int, int]]) -> dict[str, Any]:
    """Return the inputs with one more entry along some dimensions, each given by the identity of its tensor."""

    def longer(value: Any) -> Any:
        for dim in [d for tensor, d in dimensions if tensor == id(value) and value.shape[d]]:
            value = torch.cat([value, value.narrow(dim, 0, 1)], dim)
        return value

    changed: dict[str, Any] = tree_map(longer, dict(inputs))
    return changed
