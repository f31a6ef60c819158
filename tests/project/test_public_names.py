"""Public names work whichever is used first, each in a process that has used no other."""

from __future__ import annotations

import subprocess
import sys

import pytest

import graphopt

FIRST = """
import graphopt
graphopt.{name}
from graphopt.ir.program import METHODS, Program, as_program
missing = {{"capture", "save", "lower", "module", "exported_program", "save_pretrained", "run", "anatomy"}} - set(METHODS)
assert not missing, missing
try:
    as_program("no/such/folder")
except graphopt.CheckpointError:
    print("captured")
"""


@pytest.mark.parametrize("name", ["evaluate", "Program", "generate"])
def test_whatever_is_used_first_finds_capture_and_exporters(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST.format(name=name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == "captured"


def test_every_public_name_is_there() -> None:
    assert all(getattr(graphopt, name) is not None for name in graphopt.__all__)
