"""Nested inputs and outputs as plain data: lists, tuples, dicts and leaves with flat names."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import UsageError

# {"leaf": name} | {"constant": value} | {"list"|"tuple": [...]} | {"dict": {...}, "class": "module:name"}
Structure = dict[str, Any]

_CONSTANTS = (type(None), bool, int, float, str)


class Output(OrderedDict[str, Any]):
    """Named outputs, also available as attributes, like the model's output class without its library."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; outputs are {', '.join(self)}") from None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values in order."""
        return tuple(self.values())


def describe(
    value: Any, is_leaf: Any, prefix: str = "", lone: str = "output", taken: set[str] | None = None
) -> tuple[Structure, dict[str, Any]]:
    """Return the structure of ``value`` and its leaves by flat name.

    Args:
        value: anything made of mappings, sequences, dataclass-like outputs and leaves.
        is_leaf: tells a leaf, usually a tensor.
        prefix: prefix of the names of nested leaves.
        lone: the name of the leaf if ``value`` itself is one.
        taken: names already in use by other leaves.
    """
    taken = set() if taken is None else taken
    if is_leaf(value):
        # {"a": (x, y), "a_0": z} has two leaves that would be called a_0
        name, count = prefix or lone, 1
        while name in taken:
            count += 1
            name = f"{prefix or lone}_{count}"
        taken.add(name)
        return {"leaf": name}, {name: value}
    if isinstance(value, _CONSTANTS):
        return {"constant": value}, {}
    leaves: dict[str, Any] = {}
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
        items = dict(value) if isinstance(value, Mapping) else dict(vars(value))
        parts: dict[str, Structure] = {}
        for key, item in items.items():
            inner = f"{prefix}_{key}" if prefix else str(key)
            parts[str(key)], more = describe(item, is_leaf, inner, lone, taken)
            leaves.update(more)
        kind = type(value)
        label = None if kind in (dict, OrderedDict) else f"{kind.__module__}:{kind.__qualname__}"
        return {"dict": parts, "class": label}, leaves
    if isinstance(value, (list, tuple)):
        structures = []
        for index, item in enumerate(value):
            part, more = describe(item, is_leaf, f"{prefix or lone}_{index}", lone, taken)
            structures.append(part)
            leaves.update(more)
        return {"tuple" if isinstance(value, tuple) else "list": structures}, leaves
    raise UsageError(
        f"a value of type {type(value).__name__} cannot be an input or output of a program",
        hint="use tensors, numbers, strings, lists, tuples and dicts",
    )


def rebuild(structure: Structure, leaves: Mapping[str, Any]) -> Any:
    """Return the leaves in their structure; output classes are used where their module is loaded."""
    if "leaf" in structure:
        return leaves[structure["leaf"]]
    if "constant" in structure:
        return structure["constant"]
    if "list" in structure:
        return [rebuild(part, leaves) for part in structure["list"]]
    if "tuple" in structure:
        return tuple(rebuild(part, leaves) for part in structure["tuple"])
    items = {key: rebuild(part, leaves) for key, part in structure["dict"].items()}
    label = structure.get("class")
    if not label:
        return items
    module, _, name = label.partition(":")
    kind = getattr(sys.modules.get(module), name, None)
    # only classes whose instances are mappings built from keywords; anything else stays a plain Output
    if isinstance(kind, type) and issubclass(kind, OrderedDict):
        return kind(**items)
    return Output(items)


def leaf_names(structure: Structure) -> Iterator[str]:
    """Yield the names of the leaves in order."""
    if "leaf" in structure:
        yield structure["leaf"]
    for key in ("list", "tuple"):
        for part in structure.get(key, ()):
            yield from leaf_names(part)
    for part in structure.get("dict", {}).values():
        yield from leaf_names(part)


def flatten(structure: Structure, value: Any, where: str) -> dict[str, Any]:
    """Return the leaves of ``value``, which must have this structure; ``where`` names it in errors."""
    if "leaf" in structure:
        return {structure["leaf"]: value}
    if hasattr(value, "tolist"):
        # a tensor whose values were fixed at capture
        value = value.tolist()
    if "constant" in structure:
        if not isinstance(value, _CONSTANTS) or value != structure["constant"]:
            now = repr(value) if isinstance(value, _CONSTANTS) else f"a {type(value).__name__}"
            raise UsageError(
                f"{where} was {structure['constant']!r} when the model was captured, but is {now} now",
                hint="capture the model again with this value",
            )
        return {}
    leaves: dict[str, Any] = {}
    for key in ("list", "tuple"):
        if key in structure:
            parts = structure[key]
            if not isinstance(value, (list, tuple)) or len(value) != len(parts):
                raise UsageError(f"{where} must be a {key} of {len(parts)} values")
            for index, part in enumerate(parts):
                leaves.update(flatten(part, value[index], f"{where}[{index}]"))
    if "dict" in structure:
        parts = structure["dict"]
        items = dict(value) if isinstance(value, Mapping) else dict(getattr(value, "__dict__", {}))
        if set(items) != set(parts):
            actual_keys = sorted(map(str, items))
            raise UsageError(f"{where} must have the keys {sorted(parts)}, not {actual_keys}")
        for key, part in parts.items():
            leaves.update(flatten(part, items[key], f"{where}[{key!r}]"))
    return leaves
