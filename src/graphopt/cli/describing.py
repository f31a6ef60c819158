"""Descriptions of passes, recipes, devices and links as plain data. This imports all of them, and torch."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from ..ir.cost import DEVICES
from ..ir.cost.collectives import LINKS
from ..ir.option import default_of, describe, help_of, options_of
from ..passes.framework.registry import BUILT_IN, FORMER_NAMES, find_pass, pass_locations
from ..passes.framework.values import format_value
from ..training.recipes import METHODS


def pass_entry(name: str) -> dict[str, Any]:
    """Return the catalogue entry of a pass."""
    cls = find_pass(name)
    hints = typing.get_type_hints(cls)
    options = [
        {
            "name": option,
            "type": describe(hints[option]),
            "default": format_value(default_of(field)),
            "help": help_of(field),
            "source": field.metadata["source"],
            "choices": list(field.metadata["choices"] or []),
        }
        for option, field in options_of(cls).items()
    ]
    description = (cls.__doc__ or "").strip()
    return {
        "name": name,
        "former_names": sorted(former for former, new in FORMER_NAMES.items() if new == name),
        "contract": str(cls.contract),
        "summary": description.splitlines()[0],
        "description": description,
        "paper": cls.paper,
        **{
            kind: [fact.name for fact in getattr(cls, kind)]
            for kind in ("requires", "provides", "invalidates")
        },
        "options": options,
        "location": pass_locations()[name],
    }


def recipe_entry(name: str) -> dict[str, Any]:
    """Return the catalogue entry of a recipe."""
    method = METHODS[name]
    keys = ("name", "default", "source", "help")
    return {
        "name": method.name,
        "paper": method.paper,
        "about": (method.__doc__ or "").strip(),
        "options": [dict(zip(keys, option, strict=True)) for option in method.describe()],
    }


def everything() -> dict[str, Any]:
    """Return the catalogue of everything built in."""
    return {
        "passes": {name: pass_entry(name) for name in sorted(BUILT_IN)},
        "recipes": {name: recipe_entry(name) for name in METHODS},
        "devices": {name: dataclasses.asdict(device) for name, device in DEVICES.items()},
        "links": {name: dataclasses.asdict(link) for name, link in LINKS.items()},
    }
