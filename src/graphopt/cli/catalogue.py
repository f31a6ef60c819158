"""``graphopt passes``, ``recipes``, ``devices`` and ``links``.

Listing should not have to import torch, so what comes with the project is read from ``catalogue.json``, which
``make docs`` and ``make wheel`` build from the passes, recipes, devices and links themselves. If that file is missing, or
was built from other sources, they are imported instead, and what they say is kept in the user's cache folder. Passes of
other packages are imported when they are listed.
"""

from __future__ import annotations

import difflib
import json
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .. import cache
from ..cache import sources
from .app import Devices, Links, Passes, Recipes
from .output import listing, show_json, table, text

BUILT = Path(__file__).with_name("catalogue.json")


def build() -> None:
    """Write the catalogue file; this imports everything that it lists, and torch."""
    from .describing import everything

    document = {"sources": sources(), **everything()}
    temporary = BUILT.with_name(f"{BUILT.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(BUILT)


def catalogue() -> dict[str, Any]:
    """Return the built-in ``passes``, ``recipes``, ``devices`` and ``links``, each by name."""
    if BUILT.exists():
        document: dict[str, Any] = json.loads(BUILT.read_text(encoding="utf-8"))
        if document.pop("sources", None) == sources():
            return document
    key = cache.key_of(sources())
    kept = cache.find("catalogue", key)
    if kept is not None:
        document = json.loads(kept)
        return document
    from .describing import everything

    document = everything()
    cache.keep("catalogue", key, json.dumps(document).encode())
    return document


def _passes() -> dict[str, dict[str, Any] | None]:
    """Return the entry of each pass by name; None for passes of other packages that are not imported yet."""
    by_name: dict[str, dict[str, Any] | None] = dict(catalogue()["passes"])
    # a package may be on the path twice
    advertised = {(point.name, point.value) for point in entry_points(group="graphopt.passes")}
    external = {n: v for n, v in advertised if n not in by_name or (by_name[n] or {})["location"] != v}
    if len(external) < sum(n not in by_name for n, _ in advertised) or set(external) & set(by_name):
        from ..passes.framework.registry import pass_locations

        pass_locations()  # raises an error that names the pass offered twice
    return by_name | dict.fromkeys(external)


def _entry(by_name: dict[str, dict[str, Any] | None], name: str) -> dict[str, Any]:
    entry = by_name[name]
    if entry is None:
        from .describing import pass_entry

        entry = by_name[name] = pass_entry(name)
    return entry


def show_passes(args: Passes) -> None:
    """List the passes, or describe one, looked up by name, description or paper."""
    by_name = _passes()
    names = sorted(by_name)
    if args.name is None:
        entries = [_entry(by_name, n) for n in names]
        rows = [(e["name"], e["contract"], e["summary"]) for e in entries]
        listing(args.as_json, entries, ("name", "contract", "what it does"), rows, "Passes")
        return
    name = args.name
    if name not in names:
        known = (entry for entry in by_name.values() if entry is not None)
        name = next((entry["name"] for entry in known if name in entry["former_names"]), name)
    if name not in names:
        entries_by_name = {n: _entry(by_name, n) for n in names}
        matches = [
            n for n, e in entries_by_name.items() if name.lower() in (e["description"] + e["paper"]).lower()
        ]
        if len(matches) != 1:
            raise _unknown("pass", "passes", name, names, matches)
        name = matches[0]
    entry = _entry(by_name, name)
    if args.as_json:
        show_json(entry)
        return
    text(f"{entry['name']}  ({entry['contract']})\n\n{entry['description']}\n")
    if entry["paper"]:
        text(f"paper: {entry['paper']}\n")
    options = []
    for o in entry["options"]:
        choices = f": {', '.join(map(str, o['choices']))}" if o["choices"] else ""
        options.append((o["name"], o["type"] + choices, o["default"], o["source"], o["help"]))
    table("Options", ("name", "type", "default", "from", "meaning"), options)


def _unknown(kind: str, kinds: str, name: str, names: list[str], matches: list[str]) -> Exception:
    from ..ir.errors import UsageError

    suggestions = difflib.get_close_matches(name, names, n=1) or matches
    return UsageError(
        f"there is no {kind} {name!r}" + (f"; did you mean {', '.join(suggestions)}?" if suggestions else ""),
        hint=f"{kinds} are {', '.join(names)}",
    )


def show_recipes(args: Recipes) -> None:
    """List recipes, or describe one."""
    recipes = catalogue()["recipes"]
    if args.name is None:
        rows = [(m["name"], m["paper"], m["about"].split("\n")[0]) for m in recipes.values()]
        listing(args.as_json, list(recipes.values()), ("recipe", "paper", "what it does"), rows)
        return
    if args.name not in recipes:
        raise _unknown("recipe", "recipes", args.name, list(recipes), [])
    method = recipes[args.name]
    if args.as_json:
        show_json([method])
        return
    paper = f"  ({method['paper']})" if method["paper"] else ""
    lines = "\n".join(line.strip() for line in method["about"].split("\n"))
    text(f"{method['name']}{paper}\n\n{lines}\n")
    options = []
    for o in method["options"]:
        default = "none" if o["default"] is None else o["default"]
        options.append((o["name"], default, o["source"], o["help"]))
    table("", ("option", "default", "from", "meaning"), options)


def show_devices(args: Devices) -> None:
    """List the devices with their peak rates."""
    devices = catalogue()["devices"]
    rows = []
    for name, device in devices.items():
        peaks = ", ".join(f"{kind} {value / 1e12:g}" for kind, value in device["flops"].items())
        memory = "shared" if device["memory"] is None else f"{device['memory'] / 1e9:g}"
        rows.append((name, peaks, f"{device['bandwidth'] / 1e12:g}", memory, device["note"]))
    columns = ("name", "peak TFLOP/s", "TB/s", "memory GB", "note")
    listing(args.as_json, devices, columns, rows, "Devices")


def show_links(args: Links) -> None:
    """List the links between ranks with bandwidth and latency, or fit one."""
    if args.fit or args.output is not None:
        from .linking import fit_link

        fit_link(args)
        return
    links = catalogue()["links"]
    rows = [(n, f"{k['bandwidth'] / 1e9:g}", f"{k['latency'] * 1e6:g}", k["note"]) for n, k in links.items()]
    listing(args.as_json, links, ("name", "GB/s", "µs", "note"), rows, "Links")
