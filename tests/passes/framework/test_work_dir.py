"""What is kept of a run: reused for the same program, data and options, and never for others; metrics run once."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import graphopt
from graphopt.ir.errors import CheckpointError
from graphopt.ir.storage.content import source_hash, whole_hash
from graphopt.ir.storage.safetensors_file import read_header
from graphopt.ir.weights import Absent, Drawn, InMemory
from graphopt.passes import Context, find_pass
from graphopt.passes.framework.kept_tensors import kept


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=s) for s in range(count)]


@lru_cache
def program(seed: int = 0) -> graphopt.Program:
    return graphopt.capture(Transformer(Shape(width=16), seed=seed), tokens(2, 6))


def one_entry_other(given: graphopt.Program, name: str, place: int) -> graphopt.Program:
    """Return a copy of which one entry of one weight has another last bit."""
    done = given.copy()
    node = next(n for n, w in done.weights.items() if w.name == name)
    tensor = done.weights[node].source.load().clone()
    flat = tensor.reshape(-1)
    flat[place] = torch.nextafter(flat[place], torch.tensor(9.0, dtype=flat.dtype))
    done.weights[node] = done.weights[node].with_source(InMemory(tensor))
    done.changed()
    return done


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_every_entry_of_a_tensor_counts(data: st.DataObject) -> None:
    """Wrong if a hash looked at some entries: of 4,000 more than seven in eight were once passed over."""
    dtype = data.draw(
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
    )
    count = data.draw(st.integers(1, 4000))
    tensor = torch.zeros(count, dtype=dtype)
    before = source_hash(InMemory(tensor.clone()))
    tensor[data.draw(st.integers(0, count - 1))] = 1
    assert source_hash(InMemory(tensor)) != before
    assert source_hash(InMemory(tensor.clone())) == source_hash(InMemory(tensor)), "values alone count"
    assert source_hash(InMemory(tensor[None])) != source_hash(InMemory(tensor)), "shapes count"


def test_what_is_written_to_is_hashed_anew(tmp_path: Path) -> None:
    """Wrong if a hash were remembered of a tensor, or a file, that says something else by now."""
    source = InMemory(torch.zeros(5))
    before = source_hash(source)
    assert source_hash(source) == before
    source.tensor.add_(1)
    assert source_hash(source) == source_hash(InMemory(torch.ones(5))) != before
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(5)}, file)
    entry = read_header(file)["a"]
    assert source_hash(entry) == before, "a file and memory with the same values are the same"
    saved_at = file.stat().st_mtime_ns
    save_file({"a": torch.ones(5)}, file)
    os.utime(file, ns=(saved_at, saved_at + 10**9))  # not within one tick of the file system's clock
    with pytest.raises(CheckpointError, match="has changed since tensor 'a' was found"):
        source_hash(entry)
    assert source_hash(read_header(file)["a"]) == source_hash(source)
    assert source_hash(Drawn((3,), torch.float32, 1)) != source_hash(Drawn((3,), torch.float32, 2))
    assert source_hash(Absent((3,), torch.float32)) == source_hash(Absent((3,), torch.float32, "other"))


def test_a_hash_is_of_the_graph_and_all_weights() -> None:
    """Wrong if programs that compute other things were one."""
    whole = program()
    again = graphopt.capture(Transformer(Shape(width=16)), tokens(2, 6))
    assert whole_hash(whole) == whole_hash(again), "captured twice"
    assert whole_hash(whole) != whole_hash(graphopt.optimize(whole, "skip-layers{layers=[0]}"))
    for weight in whole.weights.values():
        if weight.source.dtype.is_floating_point:
            other = one_entry_other(whole, weight.name, weight.source.load().numel() - 1)
            assert whole_hash(other) != whole_hash(whole), f"{weight.name} does not count"


def test_scores_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    """Wrong if a fine-tuned copy, equal in most entries, were pruned by the scores of the original."""
    first = program()
    name = max(first.weights.values(), key=lambda w: w.bytes).name
    second = one_entry_other(first, name, 1)
    step = find_pass("skip-layers")(remove=1, score="kl")
    for one in (first, second):
        step.plan(one, Context(batches(), work_dir=tmp_path))
    assert len(list(tmp_path.glob("scores-*.json"))) == 2
    step.plan(first, Context(batches(), work_dir=tmp_path))
    assert len(list(tmp_path.glob("scores-*.json"))) == 2


@pytest.mark.parametrize("text", ["sort-ffn", "prune-ffn{fraction=0.5}"])
def test_a_plan_keeps_what_it_was_made_with(text: str, tmp_path: Path) -> None:
    """Wrong if a plan were carried out with the channels that another model's plan had chosen meanwhile."""
    from graphopt.passes import parse_pipeline

    (step,) = parse_pipeline(text)
    plans: list[Any] = []
    for seed in (0, 1):
        for work_dir in (None, tmp_path):
            plans.append(step.plan(program(seed), Context(batches(), work_dir=work_dir)))
    first, second = ({s.block: s["channels"] for s in plan.sites} for plan in plans[::2])
    assert set(first.values()).isdisjoint(second.values())
    names = [Path(plan.sites[0]["channels"]).name for plan in plans]
    assert names[1] == f"{names[0]}.safetensors"
    for plan, seed in zip(plans[::2], (0, 1), strict=True):
        again = step.plan(program(seed), Context(batches()))
        block = plan.sites[0].block
        assert torch.equal(kept(plan.sites[0]["channels"])[block], kept(again.sites[0]["channels"])[block])


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("skip-layers{layers=[0] budget=9}", 2),  # what came of it, and the original
        ("skip-layers{layers=[0]}", 2),
        (
            "skip-layers{budget=9 score=block-influence}",
            2,
        ),  # the one number of layers that can go is what came of it
        ("prune-ffn{fraction=0.5 budget=9}", 2),
        ("skip-layers{layers=[0] phase=decode budget=9}", 2),
    ],
)
def test_a_metric_of_the_users_runs_once_on_each_program(text: str, calls: int) -> None:
    """Wrong if a benchmark of hours ran again for the budget, or for the original that was measured already."""
    seen: list[graphopt.Program] = []

    def judged(given: graphopt.Program) -> float:
        seen.append(given)
        return 1.0 + len(given.weights) / 1000

    done = graphopt.optimize(program(), text, data=batches(), evaluate=judged)
    assert done.report is not None
    assert len(seen) == calls
    assert len({id(p) for p in seen}) == calls
