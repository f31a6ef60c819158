"""A program and what passes made of it hold what they share in memory once, and nothing once both are gone."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt import Program
from graphopt.ir.running import execute
from graphopt.ir.storage.safetensors_file import SafetensorsEntry


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counted: Counter[str] = Counter()
    load = SafetensorsEntry.load

    def counting(entry: SafetensorsEntry) -> torch.Tensor:
        counted[entry.key] += 1
        return load(entry)

    monkeypatch.setattr(SafetensorsEntry, "load", counting)
    return counted


def test_weights_that_a_pass_left_alone_are_loaded_once(
    captured: Callable[[str], Program], tmp_path: Path, loads: Counter[str]
) -> None:
    captured("llama").save(tmp_path / "p")
    program = graphopt.load(tmp_path / "p")
    ids = torch.randint(3, 90, (2, 7))
    shorter = graphopt.optimize(program, "skip-layers{layers=[0]}", verify="off")
    loads.clear()
    whole, less = program(input_ids=ids)["logits"], shorter(input_ids=ids)["logits"]
    assert loads and set(loads.values()) == {1}
    assert not torch.equal(whole, less)
    program.save(tmp_path / "q")
    assert torch.equal(graphopt.load(tmp_path / "q")(input_ids=ids)["logits"], whole)
    held = [h for h in execute._HELD.values() if getattr(h.source, "path", Path()).is_relative_to(tmp_path)]
    assert held
    del held, program, shorter
    gc.collect()
    left = [h for h in execute._HELD.values() if getattr(h.source, "path", Path()).is_relative_to(tmp_path)]
    assert left == [], "weights of programs that are gone stay in memory"


def test_trained_weights_are_those_of_today(captured: Callable[[str], Program]) -> None:
    """A program made of a module again reads the module's weights, whatever was held before."""
    program = captured("llama")
    ids = torch.randint(3, 90, (2, 7))
    before = program(input_ids=ids)["logits"]
    module = program.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    after = graphopt.capture(module)
    assert not torch.allclose(after(input_ids=ids)["logits"], before)
    assert torch.equal(program(input_ids=ids)["logits"], before)
