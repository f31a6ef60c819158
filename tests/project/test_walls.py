"""Who may import whom; and that every private name of torch is in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
from paths import ROOT

SOURCE = ROOT / "src" / "graphopt"
FILES = sorted(SOURCE.rglob("*.py"))
GROUND = {"ir"}
_IR = {"ir", "ir/operators", "ir/ranks", "ir/running", "ir/rewriting", "ir/canonical", "ir/anatomy", "ir/cost", "ir/checking",
       "ir/storage", "ir/quantised"}  # fmt: skip
_PASS = _IR | {"targets", "measure", "passes/framework", "passes/shared"}
_EXIT = _IR | {"targets", "backends/checking", "backends/torch"}
# which rooms each may import, beside itself and what lies inside it; imports inside functions count as well
ALLOWED: dict[str, set[str]] = {
    "ir": set(),
    "ir/operators": GROUND,
    "ir/ranks": GROUND | {"ir/operators"},
    "ir/running": GROUND | {"ir/operators", "ir/ranks"},
    "ir/rewriting": GROUND | {"ir/operators", "ir/running"},
    "ir/quantised": GROUND | {"ir/operators", "ir/running"},
    "ir/canonical": GROUND | {"ir/operators", "ir/running", "ir/rewriting"},
    "ir/anatomy": GROUND | {"ir/operators", "ir/running", "ir/checking"},
    "ir/checking": GROUND | {"ir/ranks", "ir/running"},
    "ir/storage": GROUND | {"ir/operators", "ir/running", "ir/checking", "ir/quantised"},
    "ir/cost": GROUND | {"ir/operators", "ir/ranks", "ir/running", "ir/storage", "ir/quantised"},
    "targets": GROUND,
    "data": GROUND,
    "cache": set(),
    "formats": GROUND | {"ir/running", "ir/quantised", "ir/storage"},
    "measure": _IR | {"data"},
    "frontends": _IR | {"cache", "formats", "frontends/stamping"},
    "frontends/stamping": _IR,
    "passes": GROUND | {"measure", "passes/framework"},
    "passes/framework": _IR | {"measure"},
    "passes/shared": _IR,
    **{
        f"passes/{family}": _PASS
        for family in (
            "projections", "convolutions", "depth", "width", "experts", "heads", "caching", "tensor_parallel",
            "quantization", "kernels", "settings", "attention",
        )
    },
    "backends": set(),
    "backends/torch": _IR,
    "backends/checking": _IR,
    "backends/onnx": _EXIT,
    "backends/huggingface": _EXIT | {"formats"},
    "backends/gguf": _EXIT | {"backends/huggingface"},
    "backends/triton": _EXIT,
    "decoding": _IR | {"data", "measure", "passes/framework", "passes/caching"},
    "training": _IR | {"data", "measure", "passes/framework", "passes/tensor_parallel", "passes/caching"},
}  # fmt: skip
# the package of the intermediate representation loads what programs find by name
_LOADS_ALL = {"ir/__init__.py"}


def room_of(path: Path) -> str:
    """Return the room of a file: its folder, where deep ones belong to the second."""
    folders = path.relative_to(SOURCE).parts[:-1]
    room = "/".join(folders[:2])
    return room if room in ALLOWED else "/".join(folders[:1])


def imports() -> Iterator[tuple[Path, Path]]:
    """Yield each import of a file of ours by another, at the top or inside a function; those for types alone apart."""
    for path in FILES:
        package = path.relative_to(SOURCE).parts[:-1]
        tree = ast.parse(path.read_text())
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            names: list[tuple[str, ...]] = []
            if isinstance(node, ast.ImportFrom):
                base = (node.module or "").split(".") if node.module else []
                if node.level:
                    base = [*package[: len(package) - node.level + 1], *base]
                elif base[0] == "graphopt":
                    base = base[1:]
                else:
                    continue
                names = [(*base, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                dotted = [alias.name.split(".") for alias in node.names]
                names = [tuple(parts[1:]) for parts in dotted if parts[0] == "graphopt"]
            for parts in names:
                for length in range(len(parts), 0, -1):
                    place = SOURCE.joinpath(*parts[:length])
                    if place.with_suffix(".py").is_file():
                        yield path, place.with_suffix(".py")
                        break
                    if (place / "__init__.py").is_file():
                        yield path, place / "__init__.py"
                        break


def test_walls_hold() -> None:
    for importer, imported in imports():
        home, other = room_of(importer), room_of(imported)
        if home not in ALLOWED or str(importer.relative_to(SOURCE)) in _LOADS_ALL or home == other:
            continue
        assert other in ALLOWED[home], (
            f"{importer.relative_to(SOURCE)} imports {imported.relative_to(SOURCE)}"
        )


def test_every_room_is_listed() -> None:
    rooms = {"/".join(p.relative_to(SOURCE).parts[:-1][:2]) for p in FILES}
    inner = {"frontends/gguf", "decoding/drafters", "training/recipes", "cli", ""}
    assert rooms - set(ALLOWED) == inner


def test_rooms_lie_above_one_another() -> None:
    graph = networkx.DiGraph([(home, other) for home, others in ALLOWED.items() for other in others - {home}])
    assert networkx.is_directed_acyclic_graph(graph), networkx.find_cycle(graph)


def test_no_file_imports_itself_by_others() -> None:
    graph = networkx.DiGraph(
        (str(a.relative_to(SOURCE)), str(b.relative_to(SOURCE)))
        for a, b in imports()
        # a package is loaded with what it holds, which is no edge of its own
        if not (b.name == "__init__.py" and a.is_relative_to(b.parent))
    )
    circles = [sorted(c) for c in networkx.strongly_connected_components(graph) if len(c) > 1]
    assert not circles, circles


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
