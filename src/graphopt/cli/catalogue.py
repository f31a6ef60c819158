"""``graphopt passes`` and ``graphopt devices``."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any

from ..ir.errors import UsageError
from ..ir.option import default_of, describe, options_of
from ..passes.registry import find_pass, pass_locations
from ..passes.values import format_value
from .output import show_json, table, text


def pass_entry(name: str) -> dict[str, Any]:
    """Return everything the catalogue says about a pass."""
    cls = find_pass(name)
    hints = typing.get_type_hints(cls)
    options = []
    for option, field in options_of(cls).items():
        default = default_of(field)
        options.append(
            {
                "name": option,
                "type": describe(hints[option]),
                "default": format_value(default),
                "help": field.metadata["help"],
                "source": field.metadata["source"],
                "choices": list(field.metadata["choices"] or []),
            }
        )
    return {
        "name": name,
        "contract": str(cls.contract),
        "summary": (cls.__doc__ or "").strip().splitlines()[0],
        "description": (cls.__doc__ or "").strip(),
        "paper": cls.paper,
        "requires": list(cls.requires),
        "provides": list(cls.provides),
        "invalidates": list(cls.invalidates),
        "options": options,
        "location": pass_locations()[name],
    }


def show_passes(name: str | None, as_json: bool) -> None:
    """List the catalogue, or one pass of it found by name or paper."""
    names = sorted(pass_locations())
    if name is None:
        entries = [pass_entry(n) for n in names]
        if as_json:
            show_json(entries)
        else:
            table(
                "Passes",
                ("name", "contract", "what it does"),
                [(e["name"], e["contract"], e["summary"]) for e in entries],
            )
        return
    if name not in names:
        found = [
            n
            for n in names
            if name.lower() in (pass_entry(n)["description"] + pass_entry(n)["paper"]).lower()
        ]
        if len(found) != 1:
            near = difflib.get_close_matches(name, names, n=1) or found
            raise UsageError(
                f"there is no pass {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""),
                hint=f"passes are {', '.join(names)}",
            )
        name = found[0]
    entry = pass_entry(name)
    if as_json:
        show_json(entry)
        return
    text(f"{entry['name']}  ({entry['contract']})\n\n{entry['description']}\n")
    if entry["paper"]:
        text(f"paper: {entry['paper']}\n")
    rows = [
        (
            o["name"],
            o["type"] + (f": {', '.join(map(str, o['choices']))}" if o["choices"] else ""),
            o["default"],
            o["source"],
            o["help"],
        )
        for o in entry["options"]
    ]
    table("Options", ("name", "type", "default", "from", "meaning"), rows)


def show_devices(as_json: bool) -> None:
    """List the devices with their peaks."""
    from ..ir.cost import DEVICES

    if as_json:
        show_json({name: dataclasses.asdict(device) for name, device in DEVICES.items()})
        return
    rows = []
    for name, device in DEVICES.items():
        peaks = ", ".join(f"{kind} {value / 1e12:g}" for kind, value in device.flops.items())
        memory = "shared" if device.memory is None else f"{device.memory / 1e9:g}"
        rows.append((name, peaks, f"{device.bandwidth / 1e12:g}", memory, device.note))
    table("Devices", ("name", "peak TFLOP/s", "TB/s", "memory GB", "note"), rows)
