"""Build the catalogue of the command line and the pages of the documentation site: ``python docs/generate.py``.

Pages of passes join what the class says (description, contract, options with the origin of their defaults) with the
notes in ``docs/notes/NAME.md`` (before and after, cost, how to check). Pages of commands, recipes, devices and links are
made from what declares them. All others are copied. Links between files of the repository become links between pages.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import typer

from graphopt.cli import catalogue
from graphopt.cli.app import app

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
PAGES = {"README.md": "index.md"} | {
    f"{n}.md": f"{n.lower()}.md" for n in ("CONTRIBUTING", "CHANGELOG", "SECURITY")
}
"""Pages from outside of docs, by their path in the repository."""
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
_TARGET = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def parts(markdown: str) -> list[str]:
    """Split Markdown into prose, at even places, and code, at odd ones."""
    return _CODE.split(markdown)


def links(markdown: str) -> list[str]:
    """Return the targets of all links and images that are paths, without the heading that they name."""
    found = [t for prose in parts(markdown)[::2] for t in _TARGET.findall(prose)]
    return [t.partition("#")[0] for t in found if ":" not in t and not t.startswith("#")]


def place(path: PurePosixPath) -> PurePosixPath:
    """Return where a file of the repository is on the site: below ``repository`` unless it is a page or in docs."""
    name = path.as_posix()
    if name in PAGES:
        return PurePosixPath(PAGES[name])
    if name.startswith("docs/notes/"):
        return PurePosixPath("passes") / path.name
    return path.relative_to("docs") if path.parts[0] == "docs" else PurePosixPath("repository") / path


def linked(markdown: str, source: PurePosixPath) -> tuple[str, set[PurePosixPath]]:
    """Rewrite the links of a file of the repository for the site; return also the files that they name."""
    here = place(source).parent
    named: set[PurePosixPath] = set()

    def moved(match: re.Match[str]) -> str:
        target, mark, heading = match[1].partition("#")
        if not target or ":" in target:
            return match[1]
        path = PurePosixPath(os.path.normpath(source.parent / target))
        if (REPOSITORY / path).is_dir():
            path /= "README.md"
        named.add(path)
        return PurePosixPath(os.path.relpath(place(path), here)).as_posix() + mark + heading

    split = parts(markdown)
    split[::2] = [_TARGET.sub(moved, prose) for prose in split[::2]]
    return "".join(split), named


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Return the lines of a table."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)]


def notes(name: str) -> str:
    """Return what is written by hand about a pass, without the head that only the repository's view needs."""
    text = (DOCS / "notes" / f"{name}.md").read_text(encoding="utf-8")
    return text[text.index("\n## ") :].strip()


def pass_page(entry: dict[str, Any]) -> str:
    """Return the page of a pass from its entry in the catalogue."""
    first, _, rest = entry["description"].partition("\n")
    body = "\n".join(line.removeprefix("    ") for line in rest.strip("\n").splitlines())
    lines = [f"# {entry['name']}", "", first, "", f"Contract: **{entry['contract']}**."]
    if entry["paper"]:
        lines.append(f"Papers: {entry['paper']}.")
    facts = [
        f"{kind} {', '.join(entry[kind])}" for kind in ("requires", "provides", "invalidates") if entry[kind]
    ]
    if facts:
        lines.append(f"Facts: {'; '.join(facts)}.")
    lines += ["", body.strip(), "", "## Options", ""]
    rows = []
    for option in entry["options"]:
        value = option["type"] + (f" ({', '.join(map(str, option['choices']))})" if option["choices"] else "")
        rows.append(
            (f"`{option['name']}`", value, f"`{option['default']}`", option["source"], option["help"])
        )
    lines += table(("option", "value", "default", "default from", "meaning"), rows)
    written, _ = linked(notes(entry["name"]), PurePosixPath("docs/notes") / f"{entry['name']}.md")
    return "\n".join(lines) + "\n\n" + written + "\n"


def passes_page(passes: dict[str, Any]) -> str:
    """Return the list of passes."""
    rows = [(f"[{e['name']}]({e['name']}.md)", e["contract"], e["summary"]) for e in passes.values()]
    lines = [
        "# Passes",
        "",
        "What `graphopt passes` lists.",
        "",
        *table(("pass", "contract", "what it does"), rows),
    ]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Return the page of all commands, with what each takes."""
    lines = ["# Commands", "", "What `graphopt COMMAND --help` says; exit status: [overview](index.md)."]
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        rows, usage = [], ["graphopt", name]
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                called = [str(parameter.name).upper() + ("..." if parameter.nargs != 1 else "")]
                usage.append(called[0] if parameter.required else f"[{called[0]}]")
            else:
                called = parameter.opts
                if parameter.required:
                    usage.append(f"{called[-1]} {called[-1].strip('-').upper()}")
            unset = parameter.default is None or parameter.default is False
            default = "" if unset else f"`{parameter.default}`"
            rows.append((", ".join(f"`{c}`" for c in called), default, parameter.help or ""))
        lines += ["", f"## {name}", "", f"`{' '.join(usage)} [OPTIONS]`", "", str(command.help), ""]
        lines += table(("takes", "default", "meaning"), rows)
    return "\n".join(lines) + "\n"


def recipes_page(recipes: dict[str, Any]) -> str:
    """Return the page of all recipes."""
    lines = ["# Recipes", "", "What `graphopt recipes` lists; how they are used: [training](training.md)."]
    for recipe in recipes.values():
        first, _, rest = recipe["about"].partition("\n")
        body = "\n".join(line.removeprefix("    ") for line in rest.strip("\n").splitlines())
        lines += ["", f"## {recipe['name']}", "", first, ""]
        lines += [f"Paper: {recipe['paper']}.", ""] if recipe["paper"] else []
        lines += [body.strip(), ""] if body.strip() else []
        lines += table(
            ("option", "default", "default from", "meaning"),
            [
                (
                    f"`{o['name']}`",
                    "" if o["default"] is None else f"`{o['default']}`",
                    o["source"],
                    o["help"],
                )
                for o in recipe["options"]
            ],
        )
    return "\n".join(lines) + "\n"


def devices_page(devices: dict[str, Any], links: dict[str, Any]) -> str:
    """Return the page of the devices and links that costs are estimated for."""
    rows = []
    for name, device in devices.items():
        peaks = ", ".join(f"{kind} {value / 1e12:g}" for kind, value in device["flops"].items())
        memory = "shared" if device["memory"] is None else f"{device['memory'] / 1e9:g}"
        rows.append((f"`{name}`", peaks, f"{device['bandwidth'] / 1e12:g}", memory, device["note"]))
    lines = [
        "# Devices and links",
        "",
        "What `graphopt devices` and `graphopt links` list.",
        "",
        "## Devices",
        "",
    ]
    lines += table(("name", "peak TFLOP/s", "TB/s", "memory GB", "note"), rows)
    rows = [
        (f"`{n}`", f"{k['bandwidth'] / 1e9:g}", f"{k['latency'] * 1e6:g}", k["note"])
        for n, k in links.items()
    ]
    lines += ["", "## Links", "", *table(("name", "GB/s", "µs", "note"), rows)]
    return "\n".join(lines) + "\n"


def pages(everything: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each page that is generated."""
    yield "commands.md", commands_page()
    yield "recipes.md", recipes_page(everything["recipes"])
    yield "devices.md", devices_page(everything["devices"], everything["links"])
    yield "passes/index.md", passes_page(everything["passes"])
    for name, entry in everything["passes"].items():
        yield f"passes/{name}.md", pass_page(entry)


def build(folder: Path) -> None:
    """Write all pages into a folder, with the files that they link to; what was in it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    written = {PurePosixPath("docs/notes") / f"{p.stem}.md" for p in (DOCS / "notes").glob("*.md")}
    for path, text in pages(catalogue.catalogue()):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    left = {PurePosixPath(name) for name in PAGES} | {
        PurePosixPath("docs") / p.name for p in DOCS.glob("*.md")
    }
    for name in written:
        left |= linked((REPOSITORY / name).read_text(encoding="utf-8"), name)[1]
    while left := left - written:
        source = left.pop()
        written.add(source)
        target = folder / place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text, named = linked((REPOSITORY / source).read_text(encoding="utf-8"), source)
            target.write_text(text, encoding="utf-8")
            left |= named
        else:
            shutil.copyfile(REPOSITORY / source, target)


def main() -> None:
    """Build the catalogue, and the pages unless only the catalogue is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "build" / "docs", help="the folder for the pages"
    )
    parser.add_argument("--catalogue", action="store_true", help="build the catalogue alone")
    options = parser.parse_args()
    catalogue.build()
    if not options.catalogue:
        build(options.output)


if __name__ == "__main__":
    main()
