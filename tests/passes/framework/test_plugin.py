"""A pass from an installed package is found, runs in a pipeline, and clashes are an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import TESTS

PLUGIN = TESTS / "sample_plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the sample package into a folder of its own, with pip, as a user would."""
    place = tmp_path_factory.mktemp("plugin")
    source = place / "source"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--target", str(place / "site"), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return place / "site"


def run(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


def test_found_by_entry_point_and_runs(installed: Path) -> None:
    code = """
import torch, graphopt
class Model(torch.nn.Module):
    def forward(self, x, y):
        return torch.relu(x + y)
program = graphopt.optimize(Model(), "swap-addends{limit=3}", inputs=(torch.randn(2, 4), torch.randn(2, 4)))
assert len(program.report.passes[0].sites) == 1
print(str(program.report).splitlines()[0])
"""
    done = run(installed, code)
    assert done.returncode == 0, done.stderr
    assert "swap-addends{limit=3}  (exact)" in done.stdout


def test_listed_in_the_catalogue(installed: Path, built: Path) -> None:
    done = run(installed, "from graphopt.cli.running import run; run(['passes', '--json'])")
    assert "swap-addends" in done.stdout, done.stderr
    # a pass that comes with the project is described without the others
    code = f"""
import pathlib, sys
from graphopt.cli import catalogue
from graphopt.cli.running import run
catalogue.BUILT = pathlib.Path({str(built)!r})
run(['passes', 'fold-norms'])
sys.exit('torch' in sys.modules)
"""
    assert run(installed, code).returncode == 0
    one = run(installed, "from graphopt.cli.running import run; run(['passes', 'swap-addends'])")
    assert "limit" in one.stdout, one.stderr


def test_absent_without_the_package() -> None:
    from graphopt.passes import pass_locations

    assert "swap-addends" not in pass_locations()


def test_a_clash_of_names_is_an_error(installed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 0.1\n")
    (other / "entry_points.txt").write_text("[graphopt.passes]\nswap-addends = other:Pass\n")
    path = os.pathsep.join([str(tmp_path), str(installed)])
    code = "from graphopt.passes import find_pass; find_pass('swap-addends')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])},
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "offered twice" in done.stderr
    code = "from graphopt.cli.running import run; run(['passes'])"
    listed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])},
        check=False,
    )  # fmt: skip
    assert "offered twice" in listed.stderr
