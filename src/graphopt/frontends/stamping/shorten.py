"""Leaving layers out of a model while it is exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .kinds import Choice
from .record import Layer


class _PassThrough(nn.Module):
    """Returns what the layer that it stands for was given; its attributes are that layer's."""

    def __init__(self, layer: Layer, routes: list[int | None]):
        super().__init__()
        # not registered, so that its weights are not exported
        object.__setattr__(self, "_replaced", layer.module)
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_routes", routes)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_replaced"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = tree_flatten((args, kwargs))[0]
        layer: Layer = object.__getattribute__(self, "_layer")
        routes: list[int | None] = object.__getattribute__(self, "_routes")
        # a tensor without a route is one that nobody reads
        results = [
            values[route] if route is not None else None if isinstance(result, torch.Tensor) else result
            for route, result in zip(routes, layer.outputs, strict=True)
        ]
        assert layer.output_structure is not None
        return tree_unflatten(results, layer.output_structure)


@contextlib.contextmanager
def shortened(model: nn.Module, choice: Choice) -> Iterator[None]:
    """Replace the layers that are stamped by modules that pass values through; they are put back afterwards."""
    replaced: list[tuple[Any, str, nn.Module]] = []
    try:
        for number in choice.templates:
            layer = choice.layers[number]
            container = model.get_submodule(layer.list_name) if layer.list_name else model
            leaf = layer.name.rpartition(".")[2]
            replaced.append((container, leaf, layer.module))
            container._modules[leaf] = _PassThrough(layer, choice.routes[number])
        yield
    finally:
        for container, leaf, module in replaced:
            container._modules[leaf] = module
