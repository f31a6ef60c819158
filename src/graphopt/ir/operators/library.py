"""Registration of graphopt's operators, and of kernels that may replace their reference implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from ..infer import SHAPE_RULES
from .spec import SPECS, OperatorSpec

_LIBRARY = torch.library.Library("graphopt", "DEF")  # type: ignore[no-untyped-call]

COMPOSITES: dict[str, str] = {}
"""Operator name to schema, for the reader's allow-list and the documentation."""

_PLAIN = OperatorSpec()

KERNELS: dict[str, Callable[..., Any]] = {}
"""Kernels by name, tried before the reference runs: each returns the result, or None where it does not apply."""

Reference = TypeVar("Reference", bound=Callable[..., Any])


def kernel_point(name: str) -> Callable[[Reference], Reference]:
    """Let a registered kernel of this name replace the decorated function wherever it applies."""

    def wrap(reference: Reference) -> Reference:
        @functools.wraps(reference)
        def either(*args: Any, **kwargs: Any) -> Any:
            kernel = KERNELS.get(name)
            if kernel is not None:
                result = kernel(*args, **kwargs)
                if result is not None:
                    return result
            return reference(*args, **kwargs)

        return cast(Reference, either)

    return wrap


def composite_operator(schema: str, *, spec: OperatorSpec = _PLAIN) -> Callable[[Reference], Reference]:
    """Define ``graphopt::<schema>`` with the decorated function as its reference on every device.

    Args:
        schema: name, arguments and results, in torch's schema syntax.
        spec: what passes, cost and placement ask about the operator.
    """

    def register(reference: Reference) -> Reference:
        name = schema.split("(", 1)[0]
        SPECS[f"graphopt.{name}"] = spec
        if spec.shape is not None:
            SHAPE_RULES[f"graphopt.{name}"] = spec.shape
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, kernel_point(name)(reference), "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        COMPOSITES[name] = schema
        return reference

    return register
