"""The files around the code agree with one another: versions, and what runs in CI."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from typing import Any

import yaml
from paths import ROOT

import graphopt


def pins() -> dict[str, str]:
    return dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )


def loaded(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "graphopt.__version__"}
    assert version("graphopt") == graphopt.__version__, "installed from another version: make install"
    headings = re.findall(
        r"^## \[?([^\]\n]+)\]?:? ?([\d.]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert graphopt.__version__ in headings[0], "the newest heading of CHANGELOG.md is another version's"


def test_hooks_and_make_use_the_pinned_versions() -> None:
    hooks = [hook for repo in loaded(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    asked = {d for hook in hooks for d in hook.get("additional_dependencies", [])}
    assert asked == {f"ruff=={pins()['ruff']}"}
    assert f"torch=={pins()['torch']}" in (ROOT / "Makefile").read_text()


def test_every_extra_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {
        re.split(r"[\[>=;]", need)[0]
        for name in ("test", "docs", "coverage", "onnx", "huggingface", "gguf", "triton", "genai", "plots")
        for need in [*extras[name], *project["dependencies"]]
        if "==" not in need
    }
    known = {name.lower() for name in pins()} | {"graphopt"}
    assert {name.lower() for name in asked} <= known


def test_ci_runs_what_contributors_run() -> None:
    jobs = loaded(".github/workflows/ci.yml")["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in steps
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        t
        for s in [*steps, (ROOT / ".ci" / "run").read_text()]
        for t in re.findall(r"^make (\w+)", s, re.MULTILINE)
    }
    assert {"test", "site"} <= named <= targets
    written = (ROOT / "CONTRIBUTING.md").read_text()
    told = set(re.findall(r"^(?:.*`)?(?:\w+=\d )?make (\w+)", written, re.MULTILINE))
    assert {"install", "lint", "test", "real", "docs"} <= told
    assert told <= targets, "CONTRIBUTING.md names a target that is not there"
