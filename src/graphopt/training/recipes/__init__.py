"""Recipes: a loss, the trained parameters and a batch transform, for any loop; and the methods that create them."""

from __future__ import annotations

import difflib
from typing import Any

from ...ir.errors import PipelineError
from ...ir.option import require_effect, require_known
from .base import Batch, Method, Recipe, called, imitation, language_loss, masked_mean
from .draft import Draft
from .duo import DuoDistil, DuoRouters
from .dynamoe import DynaMoE, difficulty
from .language import Language
from .mask_tokens import MaskTokens
from .medusa import Medusa, head_loss
from .phds import PHDS
from .r2 import RangeRegularization, penalty

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (Language, DynaMoE, DuoDistil, DuoRouters, PHDS, Medusa, Draft, MaskTokens, RangeRegularization)
}


def find_method(name: str, options: dict[str, Any]) -> Method:
    """Return a method by name, with options.

    Raises:
        PipelineError: there is no method of that name, or an option is wrong.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise PipelineError(
            f"there is no recipe {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=f"recipes are {', '.join(METHODS)}",
        )
    require_known(name, METHODS[name], options)
    method = METHODS[name](**options)
    require_effect(name, method, options)
    return method


__all__ = [
    "METHODS", "PHDS", "Batch", "Draft", "DuoDistil", "DuoRouters", "DynaMoE", "Language", "MaskTokens", "Medusa", "Method",
    "RangeRegularization", "Recipe", "called",
    "difficulty", "find_method", "head_loss", "imitation", "language_loss", "masked_mean", "penalty",
]  # fmt: skip
