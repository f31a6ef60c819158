"""Decoding with matrices in few bits: logits are those of their values within what bfloat16 rounds; exact kernels on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.decoding.large_pages import LargePages
from graphopt.decoding.prepared import Prepared
from graphopt.ir.errors import UsageError
from graphopt.ir.program import Program


def small(tied: bool = False, biased: bool = False, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=tied, attention_bias=biased)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return graphopt.capture(model.to(dtype), {"input_ids": torch.randint(3, 100, (2, 6))})


@pytest.fixture(scope="module")
def quantised() -> Callable[..., Program]:
    made: dict[Any, Program] = {}

    def program(options: str, **model: Any) -> Program:
        key = (options, *sorted(model.items()))
        if key not in made:
            made[key] = graphopt.optimize(small(**model), f"quantize-weights{{{options}}}", verify="off")
        return made[key]

    return program


def stepped(program: Program, rows: int, **options: Any) -> tuple[torch.Tensor, CachedDecoder]:
    """Return the logits of a prompt and of single tokens after it."""
    decoder = CachedDecoder(with_cache(program), rows, 40, **options)
    generator = torch.Generator().manual_seed(3)
    found = []
    for width in (5, 1, 1, 1, 3, 3, 1):
        found.append(decoder.extend(torch.randint(3, 100, (rows, width), generator=generator))["logits"])
        decoder.advance([width] * rows)
    return torch.cat(found, 1), decoder


@pytest.fixture(scope="module")
def of_bfloat16() -> dict[tuple[int, bool], float]:
    """Return the relative error that computing in bfloat16 makes in floats, by rows and whether tables are tied."""
    found = {}
    for tied in (False, True):
        programs = small(tied=tied), small(tied=tied, dtype=torch.bfloat16)
        for rows in (1, 3):
            exact, rounded = (stepped(program, rows)[0].float() for program in programs)
            found[rows, tied] = float((exact - rounded).norm() / exact.norm())
    return found


@pytest.mark.parametrize("options", ["bits=4 group=32", "bits=4 group=32 head=4", "bits=8 group=0 head=8", "bits=8 group=32 symmetric=false",
                                     "bits=4 group=32 symmetric=false head=8", "bits=4 group=16"])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_values(
    options: str, tied: bool, quantised: Callable[..., Program], of_bfloat16: dict[tuple[int, bool], float]
) -> None:
    program = quantised(options, tied=tied)
    for rows in (1, 3):
        exact, plain = stepped(program, rows, kernels="exact")
        assert not plain.weights.few_bits
        found, decoder = stepped(program, rows)
        assert found.dtype == torch.float32
        assert decoder.weights.few_bits
        prepared = [
            p for r in decoder._graphs.values() for p in r._prepared.values() if isinstance(p, Prepared)
        ]
        assert len(prepared) == 2
        unprepared, _ = stepped(program, rows, prepared=False)
        # less than computing everything in bfloat16 costs
        assert 0 < (found - exact).norm() <= of_bfloat16[rows, tied] * exact.norm()
        assert (found - unprepared).norm() <= of_bfloat16[rows, tied] * exact.norm()


def test_biases_are_added(quantised: Callable[..., Program]) -> None:
    program = quantised("bits=4 group=32", biased=True)
    (found, decoder), (exact, _) = stepped(program, 1), stepped(program, 1, kernels="exact")
    assert decoder.weights.few_bits
    assert (found - exact).norm() <= 0.03 * exact.norm()


def test_sixteen_bits_as_stored(quantised: Callable[..., Program]) -> None:
    program = quantised("bits=4 group=32 head=4", dtype=torch.bfloat16)
    (found, decoder), (exact, _) = stepped(program, 1), stepped(program, 1, kernels="exact")
    assert decoder.weights.few_bits
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 0.04 * exact.norm()


def test_a_tied_table_is_one_matrix_in_few_bits(quantised: Callable[..., Program]) -> None:
    """Head and embedding read one matrix, which is not in memory as floats beside it."""
    program = quantised("bits=4 group=32 head=4", tied=True)
    _, decoder = stepped(program, 1)
    (table,) = {
        id(p): p for p in decoder.weights._products.values() if p is not None and p.shape[0] == 101
    }.values()
    assert table.bits == 4
    assert not [name for name, value in decoder.weights.loaded.items() if tuple(value.shape) == (101, 64)]


def test_other_strategies_and_what_is_said(
    quantised: Callable[..., Program], captured: Callable[[str], Program]
) -> None:
    program = quantised("bits=8 group=32 head=8")
    rows = [[5, 9, 17, 40], [12, 8, 5, 5]]

    def written(**options: Any) -> tuple[list[list[int]], list[str]]:
        tokens = graphopt.stream(program, rows, max_new_tokens=10, eos_token_id=None, **options)
        for _ in tokens:
            pass
        return tokens.rows, tokens.statistics.notes

    text, notes = written()
    assert [n for n in notes if "bfloat16" in n]
    exact, notes = written(kernels="exact")
    assert not notes
    assert [len(row) for row in exact] == [len(row) for row in text] == [14, 14]
    again, notes = written(strategy="prompt-lookup{tokens=3}")
    assert len(again[0]) == 14
    assert [n for n in notes if "bfloat16" in n]
    assert not list(graphopt.stream(captured("llama"), rows, max_new_tokens=2).statistics.notes)
    with pytest.raises(UsageError, match="auto or exact"):
        written(kernels="fast")


def test_a_bias_by_position_and_linears_of_other_types_stay() -> None:
    """Linears in few bits and in floats that read one value are each computed in their own way."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(60, 64)
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
            self.head = nn.Linear(64, 60, bias=False)

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            batch, length = input_ids.shape
            x = self.embed(input_ids)
            q, k, v = (
                part(x).view(batch, length, 2, -1).transpose(1, 2) for part in (self.q, self.k, self.v)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return {"logits": self.head(x + self.o(mixed.transpose(1, 2).flatten(2)))}

    program = graphopt.capture(Mixed().eval(), {"input_ids": torch.randint(0, 60, (2, 6))})
    program = graphopt.optimize(program, "quantize-weights{bits=4 group=32 skip=[q.weight]}", verify="off")
    (found, decoder), (exact, _) = stepped_over(program, 60), stepped_over(program, 60, kernels="exact")
    assert decoder.weights.few_bits
    assert (found - exact).norm() <= 0.03 * exact.norm()


def stepped_over(program: Program, vocabulary: int, **options: Any) -> tuple[torch.Tensor, CachedDecoder]:
    decoder = CachedDecoder(with_cache(program), 1, 20, **options)
    found = []
    for token in range(3, 12):
        found.append(decoder.extend(torch.tensor([[token * 7 % vocabulary]]))["logits"])
        decoder.advance([1])
    return torch.cat(found, 1), decoder


def test_memory_in_large_pages() -> None:
    """Pieces do not overlap, lie apart by whole lines, and hold what is written to them."""
    memory = LargePages()
    shapes = [(300, 300), (5, 7), (1000, 401), (4096, 4096), (64, 1024)]
    pieces = [memory.empty(shape, torch.float32).fill_(number) for number, shape in enumerate(shapes)]
    pieces.append(memory.copied(torch.arange(1 << 17).to(torch.bfloat16).view(2, -1).t()))
    for number, (piece, shape) in enumerate(zip(pieces, shapes, strict=False)):
        assert piece.shape == shape
        assert piece.is_contiguous()
        assert piece.data_ptr() % 64 == 0
        assert bool((piece == number).all())
    assert torch.equal(pieces[-1][:, 0].float(), torch.arange(1 << 16).to(torch.bfloat16).float())
