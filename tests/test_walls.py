"""Who may import whom, how long files are, and that every private name of torch is in one module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "graphopt"
FILES = sorted(SOURCE.rglob("*.py"))
WALLS = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "frontends": {"ir", "frontends"},
    "backends": {"ir", "backends"},
    "training": {"ir", "training"},
    "decoding": {"ir", "decoding"},
}
FOLDERS = {p.name for p in SOURCE.iterdir() if p.is_dir()} | {"api"}


def imported(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, as dotted paths below the package."""
    found: set[str] = set()
    package = path.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                found.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
            elif (node.module or "").startswith("graphopt"):
                found.add((node.module or "").removeprefix("graphopt").strip("."))
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("graphopt").strip(".")
                for a in node.names
                if a.name.startswith("graphopt")
            }
    return found


@pytest.mark.parametrize("home", WALLS)
def test_walls_hold(home: str) -> None:
    for path in (SOURCE / home).rglob("*.py"):
        for module in imported(path):
            top = module.split(".")[0]
            lazily_filled = path.name == "program.py" and module == "api"
            if top in FOLDERS and not lazily_filled:
                assert top in WALLS[home], f"{path.relative_to(SOURCE)} imports {module}"


def test_no_import_cycles_between_modules() -> None:
    names = {
        str(p.relative_to(SOURCE).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p
        for p in FILES
    }
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        package = path.relative_to(SOURCE).parts[:-1]
        edges[name] = set()
        for node in tree.body:  # imports at the top; those inside functions run later
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
                target = ".".join(base)
                for alias in node.names:
                    inner = f"{target}.{alias.name}".strip(".")
                    edges[name].add(inner if inner in names else target)
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 2 or name not in edges:
            return
        assert state.get(name) != 1, f"import cycle: {' -> '.join((*trail, name))}"
        state[name] = 1
        for other in edges[name]:
            if other and not name.startswith(other + "."):
                visit(other, (*trail, name))
        state[name] = 2

    for name in edges:
        visit(name, ())


def test_files_do_one_thing() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in FILES}
    too_long = [f"{p.relative_to(SOURCE)}: {n}" for p, n in lengths.items() if n > 400]
    assert not too_long, too_long


def test_private_names_of_torch_are_in_one_module() -> None:
    for path in FILES:
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                private = [p for p in (node.module or "").split(".") if p.startswith("_")]
                allowed = {"torch._ops", "torch.utils._pytree", "torch.utils._sympy.functions"}
                assert not private or node.module in allowed, (
                    f"{path.relative_to(SOURCE)} imports {node.module}"
                )


def test_nothing_unpickles() -> None:
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text, f"{path.name} can run code from a file"
        assert "torch.load(" not in text, f"{path.name} can run code from a file"
