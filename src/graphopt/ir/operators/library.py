"""Registration of graphopt's own operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_LIBRARY = torch.library.Library("graphopt", "DEF")  # type: ignore[no-untyped-call]

DIALECT: dict[str, str] = {}
"""Operator name to schema, for the reader's allow-list and the documentation."""

Reference = TypeVar("Reference", bound=Callable[..., torch.Tensor])


def dialect_operator(schema: str) -> Callable[[Reference], Reference]:
    """Define ``graphopt::<schema>`` with the decorated function as its meaning on every device."""

    def register(reference: Reference) -> Reference:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        DIALECT[name] = schema
        return reference

    return register
