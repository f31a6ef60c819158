"""Tokens that stand for parts of images and of audio: how many a model expects, which it is asked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .accepting import REFUSALS, ask


def features(model: Any, method: str, made: Mapping[str, Any]) -> int:
    """Return how many values the features of all images have that replace embeddings of tokens; 0 if it has none.

    Args:
        model: with or without values.
        method: of the model, such as ``get_image_features``.
        made: inputs by name.
    """
    # a class with a head may leave the method to the model that it is a head of
    function = getattr(model, method, None) or getattr(getattr(model, "base_model", None), method, None)
    if function is None:
        return 0
    parameters = inspect.signature(function).parameters
    inputs = {n: v for n, v in made.items() if n in parameters}
    if not inputs:
        return 0
    try:
        result = ask(model, function, inputs)
    except REFUSALS:
        return 0
    pooled = getattr(result, "pooler_output", None)
    if pooled is None and not isinstance(result, (torch.Tensor, list, tuple)):
        pooled = getattr(result, "last_hidden_state", None)
    found = result if pooled is None else pooled
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() for part in parts if isinstance(part, torch.Tensor))
