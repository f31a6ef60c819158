"""Documentation: examples run, the site's pages are complete, links lead somewhere, commands of the README exist."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from paths import ROOT

from graphopt.cli.app import app
from graphopt.cli.describing import everything
from graphopt.passes.framework.registry import BUILT_IN

NOTES = sorted((ROOT / "docs" / "notes").glob("*.md"))
EXAMPLES = [
    *(
        ROOT / "docs" / n
        for n in ("writing-a-pass.md", "debugging-a-pass.md", "evaluating.md", "training.md")
    ),
    *NOTES,
]
WRITTEN = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *NOTES, *(ROOT / "benchmarks").glob("*.md"),
           *(ROOT / "examples").rglob("*.md")]  # fmt: skip
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def script() -> Any:
    """Return docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = script()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of pages that the site is built from."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    generate.build(folder)
    return folder


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall(page.read_text())
    assert blocks, f"{page.name} has no example"
    module = types.ModuleType(f"example_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, example {number + 1}", "exec"), module.__dict__)


def test_notes_are_those_of_the_passes() -> None:
    assert {p.stem for p in NOTES} == set(BUILT_IN)
    for page in NOTES:
        head = f"# {page.stem}\n\nDescription, contract and options: `graphopt passes {page.stem}`.\n\n## "
        assert page.read_text().startswith(head), f"{page.name} does not begin with\n{head}"


@pytest.mark.parametrize("name", BUILT_IN)
def test_pages_of_passes_hold_what_passes_say_and_what_is_noted(name: str, site: Path) -> None:
    page = (site / "passes" / f"{name}.md").read_text()
    entry = everything()["passes"][name]
    assert page.startswith(f"# {name}\n\n{entry['summary']}\n")
    assert f"Contract: **{entry['contract']}**." in page
    assert entry["paper"] in page
    squeezed = " ".join(page.split())
    assert " ".join(entry["description"].split()) not in ("", entry["summary"]), "nothing but a summary"
    for paragraph in entry["description"].split("\n\n"):
        assert " ".join(paragraph.split()) in squeezed
    options = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    assert options == [(o["name"], o["help"].replace("|", "\\|")) for o in entry["options"]]
    noted = (ROOT / "docs" / "notes" / f"{name}.md").read_text()
    assert BLOCK.findall(page) == BLOCK.findall(noted)
    assert re.findall("^## .*", page, re.MULTILINE) == [
        "## Options",
        *re.findall("^## .*", noted, re.MULTILINE),
    ]


def test_commands_recipes_devices_and_links_have_their_place(site: Path) -> None:
    commands = typer.main.get_command(app).commands
    page = (site / "commands.md").read_text()
    assert re.findall("^## (.*)", page, re.MULTILINE) == list(commands)
    for name, command in commands.items():
        _, _, rest = page.partition(f"\n## {name}\n")
        section = rest.partition("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(f"`{o}`" in section for o in parameter.opts), (
                    f"{name} does not list {parameter.name}"
                )
            else:
                assert f"`{parameter.name.upper()}" in section
    told = everything()
    assert re.findall("^## (.*)", (site / "recipes.md").read_text(), re.MULTILINE) == list(told["recipes"])
    listed = re.findall(r"^\| `(.*?)`", (site / "devices.md").read_text(), re.MULTILINE)
    assert listed == [*told["devices"], *told["links"]]


def test_every_page_is_in_the_navigation_once(site: Path) -> None:
    def named(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [n for e in (entry.values() if isinstance(entry, dict) else entry) for n in named(e)]

    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.md")}
    listed = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(p for p in pages if not p.startswith("repository/"))


def test_links_lead_somewhere() -> None:
    for page in WRITTEN:
        for target in generate.links(page.read_text()):
            assert not target.startswith("/"), f"{page.name} links to {target}"
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_paths_in_prose_exist() -> None:
    """Pages name folders and files of the repository; tests lie in the same folders as what they test."""
    made = {"examples/reference_models/data", "docs/notes/NAME.md", "findings/NAME.sh"}
    tests = {p.name for p in (ROOT / "tests").rglob("test_*.py")}
    for page in ROOT.glob("*.md"):
        text = page.read_text()
        for path in re.findall(r"\b(?:src|tests|docs|benchmarks|examples|findings)/[\w./-]*\w", text):
            tested = ROOT / "src" / "graphopt" / path.removeprefix("tests/")
            assert path in made or (ROOT / path).exists() or tested.is_dir(), f"{page.name} names {path}"
        for name in re.findall(r"\btest_\w+\.py", text):
            assert name in tests, f"{page.name} names {name}"


def test_links_of_the_site_lead_somewhere_in_it(site: Path) -> None:
    followed = set()
    for page in site.rglob("*.md"):
        for target in generate.links(page.read_text()):
            found = (page.parent / target).resolve()
            assert found.is_file(), f"{page.relative_to(site)} links to {target}"
            followed.add(found.relative_to(site.resolve()).as_posix())
    assert {f"passes/{name}.md" for name in BUILT_IN} <= followed
    assert "repository/examples/train_experts.py" in followed, "a file outside of docs is not carried along"


def test_links_in_code_are_none_of_ours() -> None:
    text = "[a](../x.md#part) `[b](y.md)` [`c`](https://example.org) [d](#here)\n```\nf[g](z.md)\n```\n"
    assert generate.links(text) == ["../x.md"]


def test_lists_and_tables_begin_after_an_empty_line() -> None:
    """The site's Markdown takes them for prose otherwise; the repository's view would not show it."""
    for page in WRITTEN:
        before = ""
        for line in re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines():
            begins = re.match(r"(- |\d+\. |\|)", line) and not re.match(r"(- |\d+\. |\||  )", before)
            assert not (begins and before.strip()), f"{page.name}: {line}"
            before = line


def test_the_readme_names_every_command_and_no_other() -> None:
    code = "\n".join(generate.parts((ROOT / "README.md").read_text())[1::2])
    named = set(
        re.findall(r"^[` ]*(?:torchrun .*-m )?graphopt ([a-z]+)|  graphopt ([a-z]+)", code, re.MULTILINE)
    )
    assert {n for pair in named for n in pair if n} == set(typer.main.get_command(app).commands)
