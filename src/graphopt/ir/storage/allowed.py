"""The operators that a saved program may call: individually listed operators, and arithmetic with sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..errors import CheckpointError
from ..operators import COMPOSITES
from .aten import ATEN, REFUSED

PLAIN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "size.add": operator.add,
    "size.sub": operator.sub,
    "size.mul": operator.mul,
    "size.floordiv": operator.floordiv,
    "size.mod": operator.mod,
    "size.neg": operator.neg,
    "size.truediv": operator.truediv,
    "size.max": torch.sym_max,
    "size.min": torch.sym_min,
    "size.int": torch.sym_int,
    "size.float": torch.sym_float,
    "size.pow": operator.pow,
    "size.floor": math.floor,
    "size.ceil": math.ceil,
    "size.round": round,
    "size.trunc": math.trunc,
    "size.not": torch.sym_not,
    "size.eq": operator.eq,
    "size.ne": operator.ne,
    "size.lt": operator.lt,
    "size.le": operator.le,
    "size.gt": operator.gt,
    "size.ge": operator.ge,
    "size.and": operator.and_,
    "size.or": operator.or_,
}
_NAMES = {function: name for name, function in PLAIN.items()}


@lru_cache(maxsize=1)
def allowed() -> frozenset[str]:
    """Return the names, as ``namespace.operator``, of everything a saved program may call."""
    return frozenset({f"aten.{name}" for name in ATEN} | {f"graphopt.{name}" for name in COMPOSITES})


def name_of(target: Any, where: str) -> str:
    """Return the name an operator is saved under.

    Raises:
        CheckpointError: it is not on the list.
    """
    if isinstance(target, OpOverload):
        full = str(target)
        if full.rsplit(".", 1)[0] in allowed() and not target._schema.is_mutable:
            return full
    elif target in _NAMES:
        return _NAMES[target]
    base = str(target).split(".")[1] if isinstance(target, OpOverload) else ""
    reason = f": {REFUSED[base]}" if base in REFUSED else ""
    raise CheckpointError(
        f"{where}: the operator {target} is not one that a saved program may hold{reason}",
        hint="optimise and lower in Python, without saving; or use only operators listed in "
        "graphopt.ir.storage.aten in the model",
    )


@lru_cache(maxsize=4096)
def operator_of(name: str) -> Any:
    """Return the operator of a saved name; nothing outside the list is ever looked up.

    Raises:
        CheckpointError: the name is not on the list.
    """
    if name in PLAIN:
        return PLAIN[name]
    parts = name.split(".")
    if len(parts) == 3 and f"{parts[0]}.{parts[1]}" in allowed():
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if packet is not None and parts[2] in packet.overloads():
            overload = getattr(packet, parts[2])
            if not overload._schema.is_mutable:
                return overload
    short_name = name if len(name) <= 60 else name[:57] + "..."
    raise CheckpointError(f"{short_name!r} is not an operator that a program may call")


_COUNTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            "size.neg",
            "size.int",
            "size.float",
            "size.floor",
            "size.ceil",
            "size.trunc",
            "size.not",
        ),
        (1,),
    ),
    "size.round": (1, 2),
}


def check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
    """Check the arguments of a call against its operator; keyword names become source code when it is compiled.

    Raises:
        CheckpointError: an argument is unknown, given twice or missing.
    """
    wrong = CheckpointError(f"{where}: {target} is called with wrong arguments")
    if not isinstance(target, OpOverload):
        # rounding to an integer has no digits argument, or an explicit None
        if _NAMES[target] == "size.round":
            args, kwargs = (
                tuple(a for a in args if a is not None),
                {k: v for k, v in kwargs.items() if k != "ndigits" or v},
            )
        counts = _COUNTS.get(_NAMES[target], (2,))
        if kwargs or len(args) not in counts or not all(isinstance(a, (fx.Node, int, float)) for a in args):
            raise wrong
        return
    schema = target._schema.arguments
    positional = [a.name for a in schema if not a.kwarg_only]
    named = {a.name for a in schema}
    if len(args) > len(positional) or not set(kwargs) <= named - set(positional[: len(args)]):
        raise wrong
    if any(not a.has_default_value() and a.name not in kwargs for a in schema[len(args) :]):
        raise wrong
