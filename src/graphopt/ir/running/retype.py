"""Conversion of a graph to another floating type, mostly float64, which shows errors that float32 would hide."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..compat import fake_tensor
from ..infer import infer
from ..operators.traits import Trait, has
from ..schema import arguments, normal_call
from ..weights import InMemory, TensorSource

if TYPE_CHECKING:
    from ..program import Program

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def in_type(graph: fx.Graph, dtype: torch.dtype = torch.float64) -> fx.Graph:
    """Return a copy of a graph in which all narrower floating types are ``dtype``.

    Type arguments are rewritten too; a graph that only gets float64 weights would still compute its norms and
    rotary tables in float32 and hide errors.
    """
    wide = copy.deepcopy(graph)
    for node in wide.nodes:
        if node.op != "call_function":
            continue
        node.args = tuple(_retype(a, dtype) for a in node.args)
        node.kwargs = {k: _retype(v, dtype) for k, v in node.kwargs.items()}
        if has(node, Trait.FACTORY):
            _pin_default_dtype(node, dtype)
    return wide


def _narrower(dtype: torch.dtype, wide: torch.dtype) -> bool:
    return dtype in _NARROW and dtype.itemsize <= wide.itemsize


def _retype(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, torch.dtype):
        return dtype if _narrower(argument, dtype) else argument
    if isinstance(argument, (list, tuple)):
        return type(argument)(_retype(item, dtype) for item in argument)
    return argument


def _pin_default_dtype(node: fx.Node, dtype: torch.dtype) -> None:
    """Set the type of a factory that has none and would use torch's default."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and _narrower(value.dtype, dtype):
        values = arguments(node) | {"dtype": dtype}
        node.args, node.kwargs = normal_call(node.target, values)


def widen(tensor: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return a tensor in ``dtype`` if it is of a narrower floating type."""
    return tensor.to(dtype) if _narrower(tensor.dtype, dtype) else tensor


@dataclass(frozen=True)
class Widened:
    """A source whose values are widened as they are loaded."""

    source: TensorSource
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return tuple(self.source.shape)

    def load(self) -> torch.Tensor:
        """Return the values in the wider type."""
        return widen(self.source.load(), self.dtype)


def _widened(source: TensorSource, dtype: torch.dtype) -> TensorSource:
    if not _narrower(source.dtype, dtype):
        return source
    if isinstance(source, InMemory):
        return InMemory(widen(source.tensor, dtype))
    return Widened(source, dtype)


def retyped(program: Program, dtype: torch.dtype = torch.float64, *, shapes: bool = True) -> Program:
    """Return the program in a wider floating type, weights widened as they are read.

    Args:
        program: not changed.
        dtype: what narrower floating types become; inputs must be given in it.
        shapes: infer the recorded values again; otherwise the result is only for running node by node.
    """
    wide = program.copy()
    graph = in_type(wide.graph, dtype)
    pairs = dict(zip(wide.graph.nodes, graph.nodes, strict=True))
    wide.graph = graph
    wide.checkpoint = {name: pairs[node] for name, node in wide.checkpoint.items()}
    wide.weights = {
        name: weight.with_source(_widened(weight.source, dtype)) for name, weight in wide.weights.items()
    }
    wide.edit.graph = graph
    wide.changed()
    if shapes:
        _infer_again(wide, dtype)
    return wide


def widen_inputs(program: Program, dtype: torch.dtype = torch.float64) -> None:
    """Let a program that was retyped without its shapes accept inputs of the wider type only."""
    inputs = {
        name: replace(spec, dtype=dtype) if _narrower(spec.dtype, dtype) else spec
        for name, spec in program.signature.inputs.items()
    }
    program.signature = replace(program.signature, inputs=inputs)


def _infer_again(program: Program, dtype: torch.dtype) -> None:
    widen_inputs(program, dtype)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and _narrower(value.dtype, dtype):
            node.meta["val"] = fake_tensor(program.mode, value.shape, dtype, str(value.device))
        elif node.op == "call_function":
            node.meta["val"] = infer(program.mode, node.target, node.args, node.kwargs)
