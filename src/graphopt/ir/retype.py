"""The same graph in float64, so that a check can see errors that float32 would hide."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from .schema import arguments, normal_call, operator_name

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def in_float64(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph whose narrower floating types are all float64.

    Type arguments are rewritten too; a graph that merely gets float64 weights would compute its norms and
    rotary tables in float32 and hide what it is asked to show.
    """
    wide = copy.deepcopy(graph)
    for node in wide.nodes:
        if node.op != "call_function":
            continue
        node.args = tuple(_retype(a) for a in node.args)
        node.kwargs = {k: _retype(v) for k, v in node.kwargs.items()}
        if operator_name(node.target) in (
            "aten.arange",
            "aten.full",
            "aten.zeros",
            "aten.ones",
            "aten.scalar_tensor",
        ):
            _pin_default_dtype(node)
    return wide


def _retype(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return torch.float64 if argument in _NARROW else argument
    if isinstance(argument, (list, tuple)):
        return type(argument)(_retype(item) for item in argument)
    return argument


def _pin_default_dtype(node: fx.Node) -> None:
    """Factories without a dtype make torch's default; say which one it was, and widen that."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype in _NARROW:
        values = arguments(node) | {"dtype": torch.float64}
        node.args, node.kwargs = normal_call(node.target, values)


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64 if it is of a narrower floating type."""
    return tensor.to(torch.float64) if tensor.dtype in _NARROW else tensor
