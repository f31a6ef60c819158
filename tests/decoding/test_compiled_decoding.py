"""Decoding in compiled pieces, and from recorded steps: the same text as operator by operator."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphopt
from graphopt.decoding import Drafter, PromptLookup, TokenRecycling, cached, compiled
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.decoding.recorded import Outputs, Recorder
from graphopt.decoding.step import attend
from graphopt.ir.program import Program

ROWS = [[5, 3, 9, 5, 3, 9, 5], [7], [11, 4, 11]]


def text(program: Program, strategy: Drafter | str | None = None, **options: Any) -> list[list[int]]:
    found = graphopt.generate(program, ROWS, max_new_tokens=14, strategy=strategy, **options)
    return found.tolist()  # type: ignore[no-any-return]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace pieces, with their guards on shapes, and leave out the compiler, which takes minutes over all models."""
    monkeypatch.setattr(compiled, "_COMPILED", {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral"])
def test_compiled_pieces_write_the_same(name: str, captured: Callable[[str], Program], traced: None) -> None:
    """Wrong if a value were used before its piece ran, or two layers that differ shared one piece."""
    program = captured(name)
    expected = text(program)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", RuntimeWarning
        )  # falling back would hide a piece that does not compile
        assert text(program, compiled=True) == expected
        assert text(program, TokenRecycling(), compiled=True) == expected


def test_layers_of_a_kind_are_one_piece(captured: Callable[[str], Program], traced: None) -> None:
    decoder = CachedDecoder(with_cache(captured("llama")), 1, 32, compiled=True)
    running = decoder.graph(decoder.outputs)
    pieces = [m for m in running.module.modules() if isinstance(m, compiled.Piece)]
    layers = sum(n.target is attend for n in running.module.graph.nodes)
    assert len(pieces) == layers + 1
    assert len({p.text for p in pieces}) == min(3, layers + 1)


def test_the_compiler_compiles(captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_COMPILED", {})
    program = captured("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = graphopt.generate(program, [[5]], max_new_tokens=6, compiled=True)
    assert torch.equal(found, graphopt.generate(program, [[5]], max_new_tokens=6))


def test_without_a_compiler_decoding_goes_on(
    captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = captured("llama")
    expected = text(program)

    def broken(module: Any) -> Any:
        def run(*values: Any) -> Any:
            raise RuntimeError("no C++ compiler was found\nand more")

        return run

    monkeypatch.setattr(compiled, "_COMPILED", {})
    monkeypatch.setattr(compiled.Piece, "failed", False)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(
        RuntimeWarning,
        match="compilation failed, decoding continues without it: no C\\+\\+ compiler was found$",
    ):
        assert text(program, compiled=True) == expected


class Again(Recorder):
    """Computes recorded steps once more instead of replaying them, as a GPU would from the same memory."""

    count = 0

    def record(self, compute: Callable[[], Outputs]) -> Callable[[], Outputs]:
        Again.count += 1
        for _ in range(2):
            compute()
        return compute


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt2", "deepseek_v3"])
def test_recorded_steps_write_the_same(
    name: str, captured: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches whole, masks told by tensors, values copied into place: what a replayed graph computes."""
    program = captured(name)
    expected = text(program)
    made = CachedDecoder.__init__

    def recording(self: CachedDecoder, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self.recorder = Again()

    monkeypatch.setattr(cached.CachedDecoder, "__init__", recording)
    for strategy in (None, PromptLookup(), TokenRecycling()):
        Again.count = 0
        assert text(program, strategy) == expected
        assert 0 < Again.count < 40, "steps are recorded again and again"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", [None, "prompt-lookup", "token-recycling"])
def test_cuda_graphs_write_the_same(strategy: str | None, captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    plain = text(program, strategy, device="cuda", dtype="float32")
    assert text(program, strategy, device="cuda", dtype="float32", compiled=True) == plain
