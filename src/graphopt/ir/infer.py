"""Shapes and types of new nodes, inferred where they are inserted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from .compat import FakeTensorMode, quiet_failures, symbolic_kernels, without_guards
from .errors import VerificationError
from .recurrent import free_lengths, is_recurrent
from .schema import operator_name

SHAPE_RULES: dict[str, Callable[..., Any]] = {}
"""Shape rules by operator name, which compute a call's fake value; filled where graphopt's operators are defined."""


def value_of(argument: Any) -> Any:
    """Return an argument with nodes replaced by their fake values."""
    return fx.map_arg(argument, lambda node: node.meta["val"])


def infer(mode: FakeTensorMode, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the fake value of a call.

    Raises:
        VerificationError: the operator does not accept arguments of these shapes or types.
    """
    cached = _INFERRED.setdefault(mode, {})
    key = signature_of((target, args, kwargs))
    if key is not None and key in cached:
        return cached[key]
    result = _infer(mode, target, value_of(args), value_of(kwargs))
    if key is not None:
        cached[key] = result
    return result


# the layers of a model repeat the same calls on the same shapes; values are never written to
_INFERRED: WeakKeyDictionary[FakeTensorMode, dict[Any, Any]] = WeakKeyDictionary()


def signature_of(value: Any) -> Any:
    """Return a key for a call's fake value, or None if it depends on more than types and sizes."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.Tensor):
        return (value.dtype, *(_size_key(size) for size in value.shape))
    if isinstance(value, (list, tuple)):
        parts = tuple(signature_of(item) for item in value)
        return None if None in parts else parts
    if isinstance(value, dict):
        return signature_of(sorted(value.items()))
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return None
    if operator_name(value) in _STRIDED:
        return None
    return ("none",) if value is None else (type(value), value)


_STRIDED = ("aten.as_strided", "aten.new_empty_strided")


def _size_key(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _infer(mode: FakeTensorMode, target: Any, fake_args: Any, fake_kwargs: dict[str, Any]) -> Any:
    rule = SHAPE_RULES.get(operator_name(target))
    try:
        # a guard would narrow the sizes of the whole program
        with (
            mode,
            torch.no_grad(),
            symbolic_kernels(),
            without_guards(mode),
            quiet_failures(),
            free_lengths() if is_recurrent(target) else contextlib.nullcontext(),
        ):
            return (rule or target)(*fake_args, **fake_kwargs)
    except Exception as error:
        raise VerificationError(
            f"{target} does not accept {describe_value(fake_args)}: {type(error).__name__}: {error}"
        ) from error


def describe_value(value: Any) -> str:
    """Return type and shape of a value as text, for messages and listings."""
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(describe_value(item) for item in value) + ")"
    return str(value)


def same_value(first: Any, second: Any) -> bool:
    """Tell whether two fake values have the same type and sizes."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and same_shape(first.shape, second.shape)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(same_value(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, (int, torch.SymInt)) and isinstance(second, (int, torch.SymInt)):
        return same_size(first, second)
    return type(first) is type(second)


def same_shape(first: Sequence[int | torch.SymInt], second: Sequence[int | torch.SymInt]) -> bool:
    """Tell whether two shapes are equal for every value of their symbols, without adding a guard."""
    return len(first) == len(second) and all(same_size(a, b) for a, b in zip(first, second, strict=True))


def same_size(first: int | torch.SymInt, second: int | torch.SymInt) -> bool:
    """Tell whether two sizes are equal for every value of their symbols, without adding a guard."""
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    from .sizes import expression

    difference = expression(first) - expression(second)
    return bool(difference == 0) or bool(difference.expand() == 0)
