"""``graphopt verify``: a verdict that is true, also where 16 bits hide what whole outputs would show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.ir.program import Program
from graphopt.ir.running.retype import retyped
from graphopt.ir.weights import InMemory


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32])
def made(
    request: Any, saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A program in some type and what two exact passes made of it, one of which rounds weights anew."""
    place = tmp_path_factory.mktemp("made")
    program: Program = retyped(graphopt.load(saved("llama")), request.param)
    program.save(place / "before")
    before = graphopt.load(place / "before")
    graphopt.optimize(before, "fold-norms, fuse-projections").save(place / "after")
    return place / "before", place / "after"


def changed(source: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Save a program with its widest matrix changed."""
    program = graphopt.load(source)
    name = max(program.weights, key=lambda n: program.weights[n].bytes)
    value = program.weights[name].source.load()
    program.weights[name] = replace(program.weights[name], source=InMemory(change(value).to(value.dtype)))
    program.save(target)
    return target


def test_exact_passes_hold_in_every_type(made: tuple[Path, Path], told: Callable[..., Any]) -> None:
    found = told("verify", *made)
    assert (found["verdict"], found["replayed"]) == ("holds", True)


@pytest.mark.parametrize("share", [0.01, 0.002])
def test_a_weight_that_is_another_one_breaks_an_exact_contract(
    share: float, made: tuple[Path, Path], told: Callable[..., Any], tmp_path: Path
) -> None:
    """A hundredth more is less than what whole outputs forgive in bfloat16."""
    wrong = changed(made[1], tmp_path / "wrong", lambda w: w * (1 + share) + w.abs().max() * share)
    found = told("verify", made[0], wrong, status=5)
    assert found["verdict"] == "does not hold"
    assert any("differs from what its passes make of the original" in line for line in found["budgets"])


def test_a_graph_that_is_another_one_is_not_called_exact(
    made: tuple[Path, Path], told: Callable[..., Any], tmp_path: Path
) -> None:
    program = graphopt.load(made[1])
    program.insert_after(program.anatomy.ffn[0].parts["down"], lambda x: x * 1.01)
    program.save(tmp_path / "wrong")
    half = next(iter(program.weights.values())).source.dtype is not torch.float32
    found = told("verify", made[0], tmp_path / "wrong", status=4 if half else 5)
    assert found["verdict"] != "holds"
    if half:
        assert "rounding to 16 bits would hide" in found["verdict"]


def test_a_pass_that_only_says_it_is_exact_is_found_out(
    saved: Callable[[str], Path], told: Callable[..., Any], tmp_path: Path
) -> None:
    """The record of a pass that is not exact, changed to say that it was."""
    import json

    from forging import list_file

    graphopt.optimize(saved("llama"), "skip-layers{layers=[1]}").save(tmp_path / "p")
    assert "there is no data" in told("verify", saved("llama"), tmp_path / "p", status=4)["verdict"]
    record = json.loads((tmp_path / "p" / "program.json").read_text())
    record["history"][-1]["contract"] = "exact"
    (tmp_path / "p" / "program.json").write_text(json.dumps(record))
    list_file(tmp_path / "p", "program.json")
    assert told("verify", saved("llama"), tmp_path / "p", status=5)["verdict"] == "does not hold"


def test_what_was_trained_cannot_be_done_again_and_is_not_judged(
    saved: Callable[[str], Path], rows: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    told(
        "train",
        saved("llama"),
        "--recipe",
        "language",
        "--data",
        rows,
        "--steps",
        "1",
        "--batch",
        "4",
        "-o",
        tmp_path / "t",
    )
    found = told("verify", saved("llama"), tmp_path / "t", "--data", rows, status=4)
    assert found["replayed"] is False and found["exact"] is False
    assert "no pass has a budget" in found["verdict"]
