"""Names of torch functions, methods and operators, and their canonical names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from ..errors import UsageError

OPERATORS = {
    "__add__": "add", "__sub__": "sub", "__mul__": "mul", "__truediv__": "div", "__matmul__": "matmul",
    "__pow__": "pow", "__neg__": "neg", "__and__": "bitwise_and", "__or__": "bitwise_or",
    "__eq__": "eq", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge",
}  # fmt: skip
REFLECTED = {"__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub"}
_RENAMED = {"truediv": "div", "concat": "cat", "concatenate": "cat", "view": "reshape", "absolute": "abs"}
_IGNORED = {"_stacklevel", "inplace", "out", "training"}


def packet_of(function: Any) -> OpOverloadPacket:
    """Return the ATen operator that a torch function, or a tensor's method by its name, stands for.

    Raises:
        UsageError: there is none of that name.
    """
    if isinstance(function, OpOverload):
        owner: OpOverloadPacket = function.overloadpacket
        return owner
    if isinstance(function, OpOverloadPacket):
        return function
    name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
    name = _RENAMED.get(name.strip("_"), OPERATORS.get(name, name))
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        raise UsageError(
            f"{name} has no ATen operator of that name",
            hint="write the pattern or replacement with torch functions such as torch.add or F.linear",
        )
    return packet


def clean_arguments(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Drop the arguments that exist in Python only, and rename the others as in the operator's schema."""
    if inspect.isfunction(function) and function.__module__ == "torch.nn.functional":
        bound = inspect.signature(function).bind(*args, **kwargs)
        kwargs, args = dict(bound.arguments), ()
    kwargs = {k: v for k, v in kwargs.items() if k not in _IGNORED}
    if "input" in kwargs:
        if function is torch.nn.functional.embedding:
            kwargs["indices"] = kwargs.pop("input")
        elif not _takes(packet_of(function), "input"):
            kwargs["self"] = kwargs.pop("input")
    return args, kwargs


def _takes(packet: OpOverloadPacket, name: str) -> bool:
    schemas = (getattr(packet, overload)._schema for overload in packet.overloads())  # type: ignore[no-untyped-call]
    return any(argument.name == name for schema in schemas for argument in schema.arguments)


SWAPS = {
    "aten.transpose": None,
    "aten.swapaxes": None,
    "aten.swapdims": None,
    "aten.t": (-2, -1),
    "aten.mT": (-2, -1),
    "aten.adjoint": (-2, -1),
    "aten.matrix_H": (-2, -1),
}
"""Swaps of two dimensions, which programs write as permutations, and the dimensions where the operator fixes them."""
TRANSPOSES = {*SWAPS, "aten.numpy_T", "aten.movedim"}
VIEWS = {"aten.view", "aten._unsafe_view", "aten.reshape", "aten.view_as", "aten.reshape_as"}
"""Operators that programs write as reshapes."""
SPLITS = ("aten.split", "aten.chunk")
NOTHING = {
    "aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.lift", "aten.lift_fresh",
    "aten.lift_fresh_copy", "aten.positive", "aten.resolve_conj", "aten.resolve_neg",
}  # fmt: skip
"""Calls that canonicalisation removes from every graph."""
DROPOUTS = {"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"}
CASTS = {"aten.to", "aten.type_as", "aten._to_copy"}


def swapped(rank: int, first: int, second: int) -> list[int]:
    """Return the permutation that swaps two dimensions."""
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return order
