"""Casts to narrower types, which a comparison in float64 does not show."""

from __future__ import annotations

import torch
from torch import fx

from ..schema import is_operator
from .region import Region


def new_roundings(before: Region, after: Region) -> set[torch.dtype]:
    """Return the types to which the region after a rewrite rounds values and the region before does not.

    Values that depend on weights alone may be rounded to the type of the value that both regions compute, if a weight
    had that type before: a bfloat16 matrix scaled by a float32 vector becomes a bfloat16 matrix again.
    """
    values, constants = _roundings(after)
    earlier = set.union(*_roundings(before))
    weight_types = {weight.meta["val"].dtype for weight in before.weights}
    target_types = {
        value.dtype for t in before.targets if isinstance(value := t.meta.get("val"), torch.Tensor)
    }
    return (values - earlier) | (constants - earlier - (weight_types & target_types))


def _roundings(region: Region) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Return the types that values are rounded to, and those that values of weights alone are rounded to."""
    values: set[torch.dtype] = set()
    constants: set[torch.dtype] = set()
    made_of_weights: set[fx.Node] = set(region.weights)
    for node in region.operators:
        if node.all_input_nodes and all(n in made_of_weights for n in node.all_input_nodes):
            made_of_weights.add(node)
        if is_operator(node, "aten.to"):
            first, second = node.all_input_nodes[0].meta["val"].dtype, node.meta["val"].dtype
            if first.is_floating_point and second.is_floating_point and second.itemsize < first.itemsize:
                (constants if node in made_of_weights else values).add(second)
    return values, constants
