"""Write the pages and the catalogue of the passes from the passes themselves: ``python docs/generate.py``; tests keep them.

Each page joins what the class says (description, contract, options with the origin of their defaults) with
the notes in ``docs/notes/NAME.md`` (before and after, cost, how to check).
"""

from __future__ import annotations

import json
from pathlib import Path

from graphopt.cli.catalogue import WRITTEN
from graphopt.cli.describing import everything, pass_entry
from graphopt.passes.framework.registry import BUILT_IN

HERE = Path(__file__).parent


def page(name: str) -> str:
    """Return the page of a pass."""
    entry = pass_entry(name)
    first, _, rest = entry["description"].partition("\n")
    body = "\n".join(line.removeprefix("    ") for line in rest.strip("\n").splitlines())
    lines = [f"# {name}", "", first, "", f"Contract: **{entry['contract']}**."]
    if entry["paper"]:
        lines.append(f"Papers: {entry['paper']}.")
    facts = [f"{kind} {', '.join(entry[kind])}" for kind in ("requires", "provides", "invalidates") if entry[kind]]
    lines += [f"Facts: {'; '.join(facts)}.", "", body.strip(), "", "## Options", ""]
    lines += ["| option | value | default | default from | meaning |", "| --- | --- | --- | --- | --- |"]
    for option in entry["options"]:
        value = option["type"] + (f" ({', '.join(map(str, option['choices']))})" if option["choices"] else "")
        lines.append(f"| `{option['name']}` | {value} | `{option['default']}` | {option['source']} | {option['help']} |")
    notes = (HERE / "notes" / f"{name}.md").read_text(encoding="utf-8").strip()
    return "\n".join(lines) + "\n\n" + notes + "\n"


def catalogue() -> str:
    """Return what the command line lists without importing torch."""
    return json.dumps(everything(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all pages and the catalogue."""
    WRITTEN.write_text(catalogue(), encoding="utf-8")
    for name in sorted(BUILT_IN):
        (HERE / "passes" / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
