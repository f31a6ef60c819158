"""Documentation: examples run, pages agree with the passes, commands of the README exist."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "docs" / n for n in ("writing-a-pass.md", "debugging-a-pass.md", "evaluating.md", "training.md")
] + sorted((ROOT / "docs/passes").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall(page.read_text())
    assert blocks, f"{page.name} has no example"
    module = types.ModuleType(f"example_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, example {number + 1}", "exec"), module.__dict__)


def test_pages_of_passes_are_what_the_passes_say() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    from graphopt.cli.catalogue import WRITTEN
    from graphopt.passes.framework.registry import BUILT_IN

    assert WRITTEN.read_text() == generate.catalogue(), (
        "run python docs/generate.py: the catalogue is out of date"
    )
    for name in BUILT_IN:
        written = (ROOT / "docs" / "passes" / f"{name}.md").read_text()
        assert written == generate.page(name), f"run python docs/generate.py: {name}.md is out of date"


def test_commands_of_the_readme_exist() -> None:
    import typer

    from graphopt.cli.app import app

    commands = set(typer.main.get_command(app).commands)
    named = set(re.findall(r"graphopt (\w+) ", (ROOT / "README.md").read_text()))
    assert {n for n in named if n not in ("is",)} <= commands | {"program"}, (
        "the README names a command that is not there"
    )


def test_links_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        *PAGES,
        *(ROOT / "docs" / n for n in ("architecture.md", "experts.md", "decoding.md")),
    ]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
