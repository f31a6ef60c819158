"""Real processes over gloo: the same outputs as in one process, counted bytes, and ends that are clear to every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import cases
from builders import Shape, Transformer, tokens
from forks import Forks
from paths import TESTS
from safetensors.torch import load_file, save_file
from started_ranks import finish, start

import graphopt
from graphopt.ir.cost import communication
from graphopt.ir.facts import TensorParallel
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs

HERE = TESTS
SIX = cases(["llama_tied", "gemma2", "gpt_oss", "bert"], ["bloom", "falcon"])


def run_ranks(
    program: Program, inputs: dict[str, torch.Tensor], folder: Path, ranks: int, forks: Forks
) -> list[dict[str, Any]]:
    """Save a program, run it on ranks, and return what each saw; outputs must agree to the bit."""
    program.save(folder / "program")
    save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "inputs.safetensors")
    results = finish(start([str(HERE / "rank_worker.py"), str(folder)], ranks, forks))
    assert all(code == 0 for code, _, _ in results), results[0][2][-2000:]
    outputs = [load_file(folder / f"rank{r}.safetensors") for r in range(ranks)]
    for name, value in outputs[0].items():
        assert all(torch.equal(value, other[name]) for other in outputs), "ranks disagree"
    return [
        {**json.loads((folder / f"rank{r}.json").read_text()), "outputs": outputs[r]} for r in range(ranks)
    ]


@pytest.mark.parametrize("name", SIX)
def test_two_processes_compute_what_the_model_does(
    name: str, captured: Callable[[str], Program], tmp_path: Path, forks: Forks
) -> None:
    program = captured(name)
    sharded = graphopt.optimize(program, "shard-tensor-parallel{size=2}")
    inputs = example_inputs(program)
    facts = run_ranks(sharded, inputs, tmp_path, 2, forks)
    expected = program(**inputs)
    for key, value in facts[0]["outputs"].items():
        assert torch.allclose(value, expected[key], atol=1e-5), f"{key} differs between processes and model"
    assert all(f["module"] < 1e-5 for f in facts)
    assert facts[0]["parameters"] == graphopt.cost(sharded).parameters, "a rank holds more than its share"


@lru_cache(maxsize=2)
def small(ranks: int) -> Program:
    # so many features that each rank's share of integers fills whole bytes
    form = Shape(size=512, heads=8, kv_heads=4, head_size=8, width=32, layers=2)
    program = graphopt.capture(Transformer(form), tokens(2, 6))
    return graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks}}}")


@pytest.mark.parametrize(
    "way", cases(["gather over 2", "two-step over 4"], ["gather over 4", "two-step over 2"])
)
def test_bytes_are_those_of_the_formula(way: str, tmp_path: Path, forks: Forks) -> None:
    algorithm, ranks = way.split()[0], int(way.split()[2])
    program = small(ranks)
    data = [tokens(2, 8, seed=s) for s in range(2)]
    options = f"algorithm={algorithm} share=1/64"
    done = graphopt.optimize(program, f"quantize-communication{{{options}}}", data=data)
    inputs = tokens(2, 9, seed=5)
    facts = run_ranks(done, inputs, tmp_path, ranks, forks)
    alone = done(**inputs)["logits"]
    assert torch.equal(facts[0]["outputs"]["logits"], alone), (
        "one process and several round in different ways"
    )
    syncs = communication(done, sizes={"batch": 2, "sequence": 9})
    assert len(syncs) == 4
    per_value = 4.1875 / 8 * 18 * 512  # bytes of one rank's term
    if algorithm == "gather":
        assert facts[0]["bytes"] == {"all_gather_into_tensor": 4 * per_value}
        assert sum(s.sent for s in syncs) == 4 * (ranks - 1) * per_value
    else:
        # each rank keeps its own share of both steps
        assert facts[0]["bytes"] == {
            "all_to_all_single": 4 * per_value,
            "all_gather_into_tensor": 4 * per_value / ranks,
        }
        assert sum(s.sent for s in syncs) == 4 * 2 * (ranks - 1) / ranks * per_value


def test_another_number_of_processes_is_refused(tmp_path: Path, forks: Forks) -> None:
    program = small(4)
    program.save(tmp_path / "program")
    save_file(tokens(2, 6), tmp_path / "inputs.safetensors")
    finish(start([str(HERE / "rank_worker.py"), str(tmp_path)], 2, forks))
    for rank in range(2):
        assert (
            "the program is for 4 ranks, but 2 processes are running"
            in (tmp_path / f"rank{rank}.error").read_text()
        )


def test_damaged_weights_are_told_to_every_rank(tmp_path: Path, forks: Forks) -> None:
    program = small(2)
    program.save(tmp_path / "program")
    save_file(tokens(2, 6), tmp_path / "inputs.safetensors")
    (weights,) = (tmp_path / "program" / "weights").glob("*.safetensors")
    whole = weights.read_bytes()
    for damage in ("cut", "missing"):
        if damage == "cut":
            weights.write_bytes(whole[:-400])
        else:
            weights.unlink()
        finish(start([str(HERE / "rank_worker.py"), str(tmp_path)], 2, forks))
        for rank in range(2):
            message = (tmp_path / f"rank{rank}.error").read_text()
            assert message.startswith("CheckpointError"), message
            assert weights.name in message
            (tmp_path / f"rank{rank}.error").unlink()


def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path: Path, forks: Forks) -> None:
    program = small(2)
    program.save(tmp_path / "program")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "program").rglob("*")}
    save_file(tokens(2, 6), tmp_path / "inputs.safetensors")
    # past the timeout of a rank that waits, finish() ends it
    results = finish(
        start([str(HERE / "rank_worker.py"), str(tmp_path), "dies"], 2, forks, GRAPHOPT_TIMEOUT="20"), 600
    )
    assert results[0][0] != 0
    message = (tmp_path / "rank0.error").read_text()
    assert message.startswith("DistributedError: rank 0 of 2 could not finish")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "program").rglob("*")} == before, (
        "the program was touched"
    )


def test_commands_under_torchrun(checkpoint: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    """One line starts all ranks; the first prints and writes."""
    target = tmp_path / "sharded"
    pipeline = "shard-tensor-parallel, drop-sync-points{fraction=0.5}, quantize-communication{bits=6}"
    command = [
        "-m",
        "graphopt",
        "optimize",
        str(checkpoint("llama")),
        "-p",
        pipeline,
        "--data",
        str(rows),
        "-o",
        str(target),
    ]
    results = finish(start(command, 2))
    assert all(code == 0 for code, _, _ in results), results
    assert "sites taken" in results[0][1]
    assert results[1][1] == "", "every rank printed"
    program = graphopt.load(target)
    assert program.facts[TensorParallel].ranks == 2
    alone = graphopt.evaluate(program, str(rows), "perplexity").values["perplexity"]
    command = [
        "-m",
        "graphopt",
        "evaluate",
        str(target),
        "--data",
        str(rows),
        "--metric",
        "perplexity",
        "--json",
    ]
    results = finish(start(command, 2))
    assert json.loads(results[0][1])[0]["values"]["perplexity"] == pytest.approx(alone, rel=1e-5)
    results = finish(
        start(["-m", "graphopt", "run", str(target), "--input", str(rows), "-o", str(tmp_path / "o.npz")], 2)
    )
    assert all(code == 0 for code, _, _ in results), results
    assert (tmp_path / "o.npz").is_file()
    shutil.rmtree(target)
    command[3] = str(target)
    results = finish(start(command, 2))
    assert all(code != 0 for code, _, _ in results)
    assert "rank 1: " in results[1][2], "an error of another rank must say whose it is"
