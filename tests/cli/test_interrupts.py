"""Ctrl-C: every command says that it was interrupted and what it kept, and ends with status 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import everything_in
from paths import ROOT

import graphopt
from graphopt.cli.running import run

SOURCE = ROOT / "src"


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "place", "says"),
    [
        (["optimize", "{whole}", "-p", "fuse-projections", "-o", "{new}"], "cli.optimizing.read_steps", "{new} was not written"),
        (["optimize", "{whole}", "-p", "fuse-projections", "-o", "{old}", "--force"], "cli.optimizing.run_passes", "{old} is unchanged"),
        (["optimize", "{whole}", "-p", "fuse-projections", "-o", "{new}", "--work-dir", "{old}"], "cli.optimizing.run_passes", "kept in {old}"),
        (["plan", "{whole}", "-p", "fuse-projections", "-o", "{new}"], "cli.optimizing.plan_passes", "{new} was not written"),
        (["run", "{whole}", "--input", "{rows}", "-o", "{new}.npz"], "ir.execute.run", "{new}.npz was not written"),
        (["lower", "{whole}", "--to", "onnx", "-o", "{new}.onnx"], "backends.onnx.lower.write_models", "{new}.onnx was not written"),
        (["export", "{whole}", "--to", "huggingface", "-o", "{new}"], "backends.huggingface.save._require", "{new} was not written"),
        (["inspect", "{whole}"], "cli.inspecting.cost", "interrupted"),
        (["passes", "fold-norms"], "cli.catalogue.show_passes", "interrupted"),
    ],
)  # fmt: skip
def test_an_interruption_says_what_is_left(
    arguments: list[str],
    place: str,
    says: str,
    whole: Path,
    rows: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    graphopt.load(whole).save(tmp_path / "old")
    names = {"whole": whole, "rows": rows, "new": tmp_path / "new", "old": tmp_path / "old"}
    given = [a.format(**names) for a in arguments]
    before = everything_in(tmp_path)
    monkeypatch.setattr("graphopt." + place, interrupted)
    capsys.readouterr()
    assert run(given) == 130
    told = capsys.readouterr().err
    assert told.startswith("interrupted") or "\ninterrupted" in told
    assert says.format(**names) in told
    assert run([*given, "--json"]) == 130
    document = json.loads(capsys.readouterr().out)
    assert (document["error"], document["exit_status"]) == ("Interrupted", 130)
    assert everything_in(tmp_path) == before, "something is left, or something is gone"


STOPPED = """
import os, signal, sys
sys.argv = ["graphopt", *sys.argv[1:]]
import graphopt.cli.sources as sources
def stopped(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
sources.capture = stopped
from graphopt.cli import main
main()
"""


def test_the_signal_itself(whole: Path, tmp_path: Path) -> None:
    """What turns the signal into an error is the command line's library, which has changed its mind about it before."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, "optimize", str(whole), "-p", "fuse-projections", "-o", str(tmp_path / "o")],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == f"interrupted: {tmp_path / 'o'} was not written"
    assert done.stdout == ""


def test_a_signal_before_the_command_begins_is_no_traceback() -> None:
    code = """
import sys
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == "graphopt.cli.running":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Importing())
from graphopt.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_training_and_answers_say_how_they_go_on(
    whole: Path, rows: Path, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from graphopt.training import loop

    out = tmp_path / "out"
    write = loop.save_state

    def after_the_second(folder: Path, module: Any, optimizer: Any, record: Any, settings: Any) -> None:
        write(folder, module, optimizer, record, settings)
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "save_state", after_the_second)
    train = ["train", str(whole), "--recipe", "language", "--data", str(rows), "-o", str(out), "--steps", "6", "--batch", "4",
             "--save-every", "0"]  # fmt: skip
    assert run(train) == 130
    told = capsys.readouterr().err
    assert "interrupted: stopped after step" in told
    assert f"the run is kept in {out}.training; the same command resumes it" in told
    assert f"{out} was not written" in told
    monkeypatch.setattr(loop, "save_state", write)
    assert run(train) == 0, "the same command does not go on"
    assert out.is_dir()
