"""The source as it is: lines, files, uses of ``Any``, circles of imports, and packages drawn by who imports whom.

    python tools/structure.py [SOURCE] [--mermaid]

Imports inside functions count; those for types alone do not. With ``--mermaid`` the drawing alone is printed.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx


def files_of(source: Path) -> dict[str, Path]:
    """Return the modules below a package by their dotted names."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, source: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = path.relative_to(source).parts[:-1]
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names: list[list[str]] = []
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif base[0] == source.name:
                base = base[1:]
            else:
                continue
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
            names = [parts[1:] for parts in dotted if parts[0] == source.name]
        for parts in names:
            lengths = range(len(parts), 0, -1)
            dotted_names = (".".join(parts[:length]) for length in lengths)
            if (module := next((name for name in dotted_names if name in modules), None)) is not None:
                yield module


def import_graph(source: Path) -> networkx.DiGraph:
    """Return who imports whom; a package is loaded with its modules, which is no edge."""
    modules = files_of(source)
    graph = networkx.DiGraph()
    graph.add_nodes_from(modules)
    for name, path in modules.items():
        for other in imports_of(path, source, modules):
            if name != other and not name.startswith(f"{other}."):
                graph.add_edge(name, other)
    return graph


def package_of(module: str, modules: dict[str, Path], source: Path) -> str:
    """Return the package that a module is drawn in: its folder, two deep."""
    return "/".join(modules[module].relative_to(source).parts[:-1][:2]) or module or "graphopt"


def drawing(source: Path) -> str:
    """Return packages and imports as a Mermaid flowchart; what is implied by others is left out."""
    modules = files_of(source)
    graph = networkx.DiGraph()
    for first, second in import_graph(source).edges:
        if first == "ir" or not first:
            continue
        pair = tuple(package_of(each, modules, source) for each in (first, second))
        # a package loads those inside it
        if pair[0] != pair[1] and not pair[1].startswith(f"{pair[0]}/"):
            graph.add_edge(*pair)
    if networkx.is_directed_acyclic_graph(graph):
        graph = networkx.transitive_reduction(graph)
    names = {name: name.replace("/", "_") for name in sorted(graph)}
    lines = [f'    {key}["{name}"]' for name, key in names.items()]
    lines += [f"    {names[a]} --> {names[b]}" for a, b in sorted(graph.edges)]
    return "\n".join(["flowchart BT", *lines])


def main() -> None:
    """Print the counts and the drawing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", default="src/graphopt", type=Path)
    parser.add_argument("--mermaid", action="store_true")
    arguments = parser.parse_args()
    if arguments.mermaid:
        print(drawing(arguments.source))
        return
    modules = files_of(arguments.source)
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules.items()}
    uses = Counter(
        node.id
        for text in texts.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Name) and node.id == "Any"
    )
    circles = [
        c for c in networkx.strongly_connected_components(import_graph(arguments.source)) if len(c) > 1
    ]
    print(
        f"files {len(modules)}, lines {sum(text.count(chr(10)) for text in texts.values()):,}, uses of Any {uses['Any']}"
    )
    print(f"circles of imports: {', '.join(str(len(c)) + ' files' for c in circles) or 'none'}")


if __name__ == "__main__":
    main()
