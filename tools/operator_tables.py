"""Counts where the source names operators: string literals such as ``"aten.relu"``, and tables of two or more of them.

A table is the outermost tuple, list, set, dictionary or call of a statement that holds two or more names, at module
level or inside a function; the arguments of ``is_operator(node, "aten.mul", "aten.div")`` are one. A growing count
means that a fact about operators is written down once more instead of asked of ``ir/operators/traits.py``.

    python tools/operator_tables.py             totals and files, most names first
    python tools/operator_tables.py --tables    every table as well
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "graphopt"
NAME = re.compile(r"(aten|graphopt|higher_order)\.[A-Za-z_]\w*(\.\w+)?|getitem")
_HOLDERS = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Call)


def names_in(tree: ast.AST) -> list[str]:
    """Return the names of operators that are written in a syntax tree; module paths of our own are none."""
    values = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [v for v in values if NAME.fullmatch(v) and v.split(".")[:2] not in _PACKAGES]


_PACKAGES = [["graphopt", path.stem] for path in SOURCE.iterdir()]


def tables_in(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the outermost expressions that hold two or more names."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, _HOLDERS) and len(_own_names(child)) >= 2:
            yield child
        else:
            yield from tables_in(child)


def _own_names(table: ast.AST) -> list[str]:
    """Return the names in a table, without those inside functions that stand in it."""
    if isinstance(table, ast.Call):
        direct = [*table.args, *(k.value for k in table.keywords)]
        flat = [a.value if isinstance(a, ast.Starred) else a for a in direct]
        return [name for a in flat for name in names_in(a) if not isinstance(a, ast.Lambda)]
    return names_in(table)


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", action="store_true", help="list every table")
    parser.add_argument("folder", nargs="?", type=Path, default=SOURCE)
    arguments = parser.parse_args()
    rows: list[tuple[int, int, int, str]] = []
    listed: list[str] = []
    lines = at_module = 0
    for path in sorted(arguments.folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        name = str(path.relative_to(arguments.folder))
        found = {
            number: tables for number, tables in enumerate(map(list, map(tables_in, tree.body))) if tables
        }
        tables = [table for inner in found.values() for table in inner]
        spans = {
            line
            for table in tables
            for line in range(table.lineno, (table.end_lineno or table.lineno) + 1)  # type: ignore[attr-defined]
        }
        functions = (ast.FunctionDef, ast.ClassDef)
        at_module += sum(
            len(t) for number, t in found.items() if not isinstance(tree.body[number], functions)
        )
        lines += len(spans)
        listed += [f"{name}:{t.lineno}  {' '.join(names_in(t))}" for t in tables]  # type: ignore[attr-defined]
        if count := len(names_in(tree)):
            rows.append((count, len(tables), len(spans), name))
    for count, number, height, name in sorted(rows, reverse=True):
        print(f"{count:5} names {number:3} tables {height:4} lines  {name}")
    total, tables_of = sum(row[0] for row in rows), sum(row[1] for row in rows)
    print(
        f"{total} names in {len(rows)} files; {tables_of} tables ({at_module} of them at module level) "
        f"in {sum(1 for row in rows if row[1])} files, on {lines} lines"
    )
    if arguments.tables:
        print("\n".join(listed))


if __name__ == "__main__":
    main()
