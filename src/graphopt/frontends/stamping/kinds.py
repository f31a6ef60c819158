"""Which layers are equal, which of them are exported, and which value passes through a layer that is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .record import CannotStamp, Layer, Record

MOST_EXPORTED = 0.7
"""Share of layers above which exporting all is as fast."""


@dataclass(frozen=True)
class Choice:
    """What is exported and what is stamped.

    Args:
        layers: all layers in the order of calls.
        exported: numbers of the layers that are exported.
        templates: by layer that is left out, the number of the exported layer of which it is a copy.
        instances: by template, the second exported layer of its kind.
        routes: by layer that is left out, for each flat result the number of the flat argument that takes its place,
            or None where nobody reads the result.
    """

    layers: list[Layer]
    exported: tuple[int, ...]
    templates: dict[int, int]
    instances: dict[int, int]
    routes: dict[int, list[int | None]] = field(default_factory=dict)

    @property
    def kinds(self) -> int:
        """How many kinds of layers there are."""
        return len({layer.key for layer in self.layers})

    def is_last(self, number: int) -> bool:
        """Return whether a layer is the last exported one of its list."""
        lists = [self.layers[n].list_name for n in self.exported if n > number]
        return self.layers[number].list_name not in lists


def choose(record: Record) -> Choice:
    """Choose two layers of each kind.

    Raises:
        CannotStamp: too many would be exported, or a layer cannot be left out.
    """
    layers = record.layers
    kinds: dict[Any, list[int]] = {}
    for layer in layers:
        kinds.setdefault(layer.key, []).append(layer.number)
    exported: set[int] = set()
    templates: dict[int, int] = {}
    instances: dict[int, int] = {}
    for numbers in kinds.values():
        if len(numbers) <= 2:
            exported.update(numbers)
            continue
        first, second, *others = numbers
        exported.update((first, second))
        instances[first] = second
        templates.update(dict.fromkeys(others, first))
    read = _keep_read(record, exported, templates)
    _separate_ends(layers, exported, templates, instances)
    share = len(exported) / len(layers)
    if not templates or share > MOST_EXPORTED:
        why = f", and others read what {read} of them have or make" if read else ""
        raise CannotStamp(f"its {len(layers)} layers are of {len(kinds)} kinds{why}")
    routes = {number: _routes(record, layers[number]) for number in templates}
    return Choice(layers, tuple(sorted(exported)), templates, instances, routes)


def _separate_ends(
    layers: list[Layer], exported: set[int], templates: dict[int, int], instances: dict[int, int]
) -> None:
    """Export the last layer of a list too where nothing else shows where the last exported layer ends."""
    for name in dict.fromkeys(layer.list_name for layer in layers):
        members = [layer.number for layer in layers if layer.list_name == name]
        last = max(n for n in members if n in exported)
        # a second instance is matched with a first, which shows what belongs to it
        if last != members[-1] and last not in instances.values():
            exported.add(members[-1])
            templates.pop(members[-1], None)


def _keep_read(record: Record, exported: set[int], templates: dict[int, int]) -> int:
    """Export layers too of which something else than the next layer reads a value or a weight; return how many."""
    layers = record.layers
    ends = {layer.list_name: layer.number for layer in layers}
    read = {
        origin[0]
        for origin, readers in record.readers.items()
        if origin[0] in templates
        and origin[0] != ends[layers[origin[0]].list_name]
        and not readers <= {origin[0], origin[0] + 1}
    }
    for number in templates:
        prefix = f"{layers[number].name}."
        if any(name.startswith(prefix) for name in record.foreign):
            read.add(number)
    exported.update(read)
    for number in read:
        del templates[number]
    return len(read)


def _routes(record: Record, layer: Layer) -> list[int | None]:
    """Return which argument stands for each result of a layer that is left out."""
    followers = [
        other
        for other in record.layers
        if other.list_name == layer.list_name
        and other.number > layer.number
        and other.input_structure == layer.input_structure
    ]
    # the last layer has none that reads its results, so an equal one shows the way
    origin = layer
    if not followers:
        before = [
            other
            for other in record.layers
            if other.list_name == layer.list_name
            and other.number < layer.number
            and other.output_structure == layer.output_structure
            and other.input_structure == layer.input_structure
        ]
        if not before:
            raise CannotStamp(f"nothing shows how values pass {layer.name}")
        origin, followers = before[-1], [layer]
    follower = followers[0]
    if follower.number != origin.number + 1:
        raise CannotStamp(f"the layer after {layer.name} takes other arguments")
    routes: list[int | None] = []
    for number, result in enumerate(origin.outputs):
        if not isinstance(result, torch.Tensor):
            # a number may be a size, and an object what a later layer changes
            if not (result is None or isinstance(result, (bool, str))):
                raise CannotStamp(f"result {number} of {layer.name} is a {type(result).__name__}")
            routes.append(None)
            continue
        own = _position(result, origin.inputs)
        routes.append(own if own is not None else _position(result, follower.inputs))
        if routes[-1] is None and _is_read(record, result):
            raise CannotStamp(f"result {number} of {layer.name} is not what the next layer reads")
    return routes


def _position(value: Any, values: list[Any]) -> int | None:
    return next((n for n, other in enumerate(values) if other is value), None)


def _is_read(record: Record, value: torch.Tensor) -> bool:
    return bool(record.readers.get(record.made_by.get(id(value), (-1, -1, -1))))
