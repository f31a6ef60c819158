"""``graphopt train``: killed and taken up again, on one process and on two, and what it says of wrong input."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from forks import Forks
from safetensors import safe_open
from started_ranks import finish, start

import graphopt
from graphopt.cli.running import run
from graphopt.training.forms import router_weights
from graphopt.training.state import FILE


@pytest.fixture(scope="module")
def program(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = graphopt.optimize(graphopt.load(saved("llama")), "split-ffn{score=peak}")
    folder = tmp_path_factory.mktemp("split") / "program"
    done.save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    numpy.savez(path, input_ids=numpy.random.default_rng(0).integers(3, 100, (24, 10)))
    return path


def command(program: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(program), "--recipe", "dynamoe{theta=0.7}", "--data", str(data), "-o", str(output),
            "--learning-rate", "0.01", "--batch", "4", *more]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {w.name: w.source.load() for w in graphopt.load(folder).weights.values()}


# a parent that sends the signal may come too late on a loaded machine
KILLED = """
import os, signal, sys
from graphopt.cli.running import run
from graphopt.training import loop
write = loop.save_state
def killed_at_five(folder, module, optimizer, record, settings):
    write(folder, module, optimizer, record, settings)
    if record.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
loop.save_state = killed_at_five
run(sys.argv[1:])
"""


def test_killed_and_taken_up_it_ends_as_if_it_had_not_been(
    program: Path, data: Path, forks: Forks, tmp_path: Path
) -> None:
    whole = command(program, data, tmp_path / "whole", "--steps", "25")
    assert run(whole) == 0
    output = tmp_path / "killed"
    arguments = command(program, data, output, "--steps", "25", "--save-every", "0")
    assert forks.run(KILLED, *arguments)[0] == -signal.SIGKILL
    assert steps(tmp_path / "killed.training" / FILE) == 5, "the process was to be killed in the middle"
    assert not output.exists()
    status, done = forks.run(
        "import sys; from graphopt.cli.running import run; sys.exit(run(sys.argv[1:]))", *arguments
    )
    assert status == 0, done.stderr
    first, second = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = weights(program)
    assert any(not torch.equal(moved[n], second[n]) for n in router_weights(graphopt.load(program)))


def steps(state: Path) -> int:
    with safe_open(str(state), framework="pt") as file:
        return len(json.loads(file.metadata()["graphopt.training"])["record"]["losses"])


def test_two_processes_learn_what_one_learns_of_twice_the_batches(
    program: Path, data: Path, tmp_path: Path
) -> None:
    assert run(command(program, data, tmp_path / "one", "--steps", "4", "--accumulate", "2")) == 0
    found = finish(
        start(
            ["-m", "graphopt", *command(program, data, tmp_path / "two", "--steps", "4")],
            2,
            CUDA_VISIBLE_DEVICES="",
        )
    )
    assert [code for code, _, _ in found] == [0, 0], found
    assert "saved to" in found[0][1]
    assert not found[1][1]
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    start_ = weights(program)
    assert any(not torch.equal(start_[n], first[n]) for n in first)
    for name in first:
        assert torch.allclose(first[name].double(), second[name].double(), atol=2e-5), name


def test_a_folder_of_another_run_is_refused(
    program: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--work-dir", str(tmp_path / "kept"), "--steps", "2"]
    assert run(command(program, data, tmp_path / "a", *kept)) == 0
    other = command(program, data, tmp_path / "b", *kept)
    other[other.index("dynamoe{theta=0.7}")] = "dynamoe{theta=0.8}"
    assert run(other) == 2
    assert "another recipe" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"--recipe": "dynamo"}, 2, "did you mean 'dynamoe'"),
        ({"--recipe": "dynamoe{theta=2}"}, 2, "from 0 to 1"),
        ({"--recipe": "phds"}, 2, "dial-top-k first"),
        ({"--data": "nowhere.txt"}, 2, "does not exist"),
        ({"--steps": "0"}, 2, "steps must be"),
        ({"--learning-rate": "-1"}, 2, "--learning-rate must be positive"),
        ({"--schedule": "stairs"}, 2, "cosine, linear or constant"),
        ({"--learning-rate": "1e30"}, 5, "lower the learning rate"),
    ],
)
def test_wrong_input_is_explained_and_nothing_is_written(
    change: dict[str, str], status: int, reason: str, program: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = command(program, data, tmp_path / "out", "--steps", "6")
    for name, value in change.items():
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
        else:
            arguments += [name, value]
    found = run(arguments)
    shown = capsys.readouterr().err
    assert reason in shown, shown
    assert found == status
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    assert "duo-routers" in capsys.readouterr().out
    assert run(["recipes", "phds"]) == 0
    assert "anchor_from" in capsys.readouterr().out
    assert run(["recipes", "phd"]) == 2
    assert "did you mean phds?" in capsys.readouterr().err


def test_programs_with_dials_are_verified_at_their_defaults(
    saved: Callable[[str], Path], program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(saved("llama")), str(program)]) == 0
    assert "verdict: the contract holds" in capsys.readouterr().out
