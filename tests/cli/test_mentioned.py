"""At a shell, messages name flags: no argument of Python that nobody there can give."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from graphopt.cli.mentioned import at_the_shell

SOURCE = ROOT / "src" / "graphopt"
FLAGS = {"max_new_tokens": "--max-new-tokens", "top_p": "--top-p", "work_dir": "--work-dir", "data": "--data"}

# passes, recipes and strategies are written with options at a shell too: layers=[3 4]
SPOKEN_AT_BOTH = ("passes/", "training/recipes/", "training/forms.py", "decoding/drafters/")
# nobody at a shell gets there
PYTHON_ALONE = {
    "api.py",
    "backends/torch/module.py",
    "backends/onnx/lower.py",
    "cli/lowering.py",
    "ir/checking/streaming.py",
    "ir/groups.py",
}


def raised() -> Iterator[tuple[str, str]]:
    """Yield the texts of all errors that are raised on purpose, with their files."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        if name.startswith(SPOKEN_AT_BOTH) or name in PYTHON_ALONE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                parts = [*node.exc.args, *(k.value for k in node.exc.keywords)]
                words = [c.value for p in parts for c in ast.walk(p) if isinstance(c, ast.Constant)]
                yield name, " | ".join(w for w in words if isinstance(w, str))


def test_errors_name_no_argument_of_python() -> None:
    wrong = []
    for name, message in raised():
        said = at_the_shell(message, {})
        said = re.sub(r"\{[^}]*\}|in Python, [a-z_0-9]+=\w*|graphopt_plan: 1|name=number", "", said)
        if re.search(r"\b[a-z_]+=(?!=)|\bprogram\.(save(?!_)|lower|operators)|\bTrue\b", said):
            wrong.append(f"{name}: {said}")
    assert wrong == []


@pytest.mark.parametrize(
    ("message", "at_shell"),
    [
        ("max_new_tokens is at least 1", "--max-new-tokens is at least 1"),
        ("top_p is 0; it lies above 0", "--top-p is 0; it lies above 0"),
        ("say trust=True (--trust) if you made it", "say --trust if you made it"),
        ("data is read from .jsonl files", "data is read from .jsonl files"),
        ("{max_new_tokens=3} of a strategy, 'a/top_p/b' of a file", "{max_new_tokens=3} of a strategy, 'a/top_p/b' of a file"),
        ("opset=23 has attention", "--opset 23 has attention"),
        ("tolerance= accepts more", "in Python, tolerance= accepts more"),
    ],
)  # fmt: skip
def test_arguments_become_flags(message: str, at_shell: str) -> None:
    assert at_the_shell(message, FLAGS) == at_shell


def test_commands_say_flags(whole: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "p.pt2").write_bytes(b"PK")
    message = told("inspect", tmp_path / "p.pt2", status=3)["message"]
    assert "say --trust" in message and "trust=True" not in message
    message = told("optimize", whole, "-p", "sort-ffn{score=activation}", "-o", tmp_path / "o", status=2)[
        "message"
    ]
    assert "give --data FILE" in message and "data=" not in message
