"""Asking a model whether it takes some inputs: by running it, without memory where its weights have none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..ir.compat import NEEDS_VALUES, FakeTensor, quiet_failures
from .fixed_values import FIXED, Known
from .stamping.untouched import put_back

# an input that is left out shows as an attribute that None has not
REFUSALS = (
    RuntimeError, ValueError, IndexError, AssertionError, TypeError, NotImplementedError, KeyError, AttributeError,
)  # fmt: skip


def refusal(model: Any, inputs: Mapping[str, Any]) -> str | None:
    """Return why a model does not take inputs, or None if it does or cannot be asked.

    A model without values says nothing about what depends on values.
    """
    try:
        ask(model, model, inputs)
    except NEEDS_VALUES:
        return None
    except REFUSALS as error:
        return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; empty if it has none."""
    return next(iter(str(error).strip().splitlines()), "")


def accepts(model: Callable[..., Any], inputs: Mapping[str, Any]) -> bool:
    """Return whether a model with values runs on inputs; what it refuses says nothing about its program."""
    try:
        with torch.no_grad():
            model(**inputs)
    except REFUSALS:
        return False
    return True


def ask(model: Any, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    """Call a function of a model on inputs, which lose their values where the model's weights have none.

    What the model keeps between calls stays as it was, or tensors without values would be in what is traced next.
    """
    parameter = next(model.parameters(), None)
    with torch.no_grad(), put_back(model):
        if not isinstance(parameter, FakeTensor):
            floating = parameter.dtype if parameter is not None else torch.float32
            return function(**{n: typed(v, floating) for n, v in inputs.items()})
        mode = parameter.fake_mode
        known = {n: v for n, v in inputs.items() if n in FIXED}
        with mode, _unchecked(), Known(tree_leaves(known)):
            fakes = {
                n: v
                if n in known
                else tree_map(
                    lambda t: (
                        torch.empty(t.shape, dtype=_typed_as(t, parameter.dtype))
                        if isinstance(t, torch.Tensor)
                        else t
                    ),
                    v,
                )
                for n, v in inputs.items()
            }
            return function(**fakes)


def _typed_as(value: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.is_floating_point() and dtype.is_floating_point else value.dtype


def typed(value: Any, dtype: torch.dtype) -> Any:
    """Return tensors of floating-point numbers in another type; anything else stays."""
    return tree_map(lambda t: t.to(_typed_as(t, dtype)) if isinstance(t, torch.Tensor) else t, value)


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Leave out the library's checks of values, as there are none."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        # inputs that do not fit are an expected result
        with quiet_failures():
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
