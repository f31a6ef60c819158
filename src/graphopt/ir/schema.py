"""Arguments of operator calls, by name and with their defaults."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from .errors import VerificationError


@lru_cache(maxsize=4096)
def operator_name(target: object) -> str:
    """Return the short name of an operator: ``aten.linear``, ``graphopt.attention``, ``getitem``."""
    if isinstance(target, OpOverload):
        return str(target).rsplit(".", 1)[0]
    if isinstance(target, OpOverloadPacket):
        return str(target)
    return getattr(target, "__name__", str(target))


def is_operator(node: object, *names: str) -> bool:
    """Tell whether ``node`` calls one of the operators named, whatever the overload."""
    return isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node.target) in names


@lru_cache(maxsize=4096)
def _arguments(target: OpOverload) -> tuple[tuple[str, bool, bool, Any], ...]:
    return tuple(
        (
            a.name,
            bool(a.kwarg_only),
            a.has_default_value(),
            a.default_value if a.has_default_value() else None,
        )
        for a in target._schema.arguments
    )


@lru_cache(maxsize=4096)
def is_mutable(target: object) -> bool:
    """Tell whether the operator writes to one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the call's arguments by name, defaults filled in."""
    target = node.target
    if not isinstance(target, OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    values: dict[str, Any] = {}
    for index, (name, _, has_default, default) in enumerate(_arguments(target)):
        if index < len(node.args):
            values[name] = node.args[index]
        elif name in node.kwargs:
            values[name] = node.kwargs[name]
        elif has_default:
            values[name] = default
        else:
            raise VerificationError(f"{target} needs the argument {name!r}", node=node.name)
    return values


def argument(node: fx.Node, name: str) -> Any:
    """Return one argument of the call by its name in the operator's schema."""
    args = arguments(node)
    if name not in args:
        raise VerificationError(f"{node.target} has no argument {name!r}", node=node.name)
    return args[name]


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of the call."""
    args = arguments(node)
    if name not in args:
        raise VerificationError(f"{node.target} has no argument {name!r}", node=node.name)
    args[name] = value
    node.args, node.kwargs = normal_call(node.target, args)


def normal_call(target: Any, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call in its normal form: positional where possible, trailing defaults left out."""
    positional: list[Any] = []
    keyword: dict[str, Any] = {}
    listed = _arguments(target)
    last = -1
    for index, (name, keyword_only, has_default, default) in enumerate(listed):
        value = values.get(name, default)
        same = has_default and type(value) is type(default) and value == default
        if keyword_only:
            if not same:
                keyword[name] = value
        else:
            positional.append(value)
            if not same:
                last = index
    return tuple(positional[: last + 1]), keyword


def normalise(node: fx.Node) -> None:
    """Rewrite the node's call in its normal form."""
    if isinstance(node.target, OpOverload):
        args, kwargs = normal_call(node.target, arguments(node))
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs = args, kwargs


def resolve(name: str) -> OpOverload:
    """Return the overload of a full name such as ``aten.linear.default``."""
    namespace, operator, overload = name.split(".")
    overload_object = getattr(getattr(getattr(torch.ops, namespace), operator), overload)
    assert isinstance(overload_object, OpOverload)
    return overload_object
