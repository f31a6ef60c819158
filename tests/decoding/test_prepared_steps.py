"""Steps that are prepared give what steps run operator by operator give: logits, caches and text, in any order of shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from written_texts import ROWS, generated, varied

import graphopt
from graphopt.decoding import running
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.decoding.prepared import Prepared
from graphopt.decoding.step import Step
from graphopt.decoding.weights import by_columns
from graphopt.ir.program import Program

NAMES = ["llama", "llama_tied", "gpt2", "gptj", "gemma3", "bloom", "mpt", "falcon_alibi", "qwen3", "phi3", "mixtral", "gpt_oss",
         "deepseek_v3"]  # fmt: skip


def prepared_of(decoder: CachedDecoder) -> list[Prepared]:
    return [
        found
        for running in decoder._graphs.values()
        for found in running._prepared.values()
        if isinstance(found, Prepared)
    ]


def alike(found: torch.Tensor, expected: torch.Tensor, limit: float = 2e-5) -> bool:
    return bool((found - expected).abs().max() <= limit * expected.abs().max())


def both(
    program: Program, rows: int, capacity: int = 40, **options: Any
) -> tuple[CachedDecoder, CachedDecoder]:
    made = with_cache(program)
    first, second = (CachedDecoder(made, rows, capacity, prepared=p, **options) for p in (True, False))
    return first, second


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_caches_are_those_of_operators(name: str, captured: Callable[[str], Program]) -> None:
    """A prompt, single tokens, pieces of three, single tokens again: whatever comes, in rows that are equally long."""
    program, _ = varied(name, captured(name))
    fast, plain = both(program, 2)
    torch.manual_seed(1)
    for width in (5, 1, 1, 1, 3, 1, 3, 3, 1, 1):
        ids = torch.randint(3, 100, (2, width))
        found, expected = (d.extend(ids)["logits"] for d in (fast, plain))
        assert alike(found, expected), width
        for decoder in (fast, plain):
            decoder.advance([width] * 2)
    for buffer, values in fast.buffers.items():
        assert alike(values, plain.buffers[buffer]), buffer
    assert len(prepared_of(fast)) == 2, "one token and three came again"
    assert not prepared_of(plain)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "gpt_oss"])
def test_rows_of_different_lengths(name: str, captured: Callable[[str], Program]) -> None:
    """Rows of different lengths, trees of candidates, and fewer rows after some have ended."""
    program, _ = varied(name, captured(name))
    fast, plain = both(program, 3)
    for decoder in (fast, plain):
        decoder.prefill([row[:6] for row in ROWS])
    torch.manual_seed(2)
    tree = torch.tensor([[True, False, False], [True, True, False], [True, False, True]]).expand(3, 3, 3)
    for turn in range(9):
        ids = torch.randint(3, 100, (fast.batch, 1))
        found, expected = (d.extend(ids)["logits"] for d in (fast, plain))
        assert alike(found, expected), turn
        for decoder in (fast, plain):
            decoder.advance([1] * decoder.batch)
        start = torch.tensor(fast.lengths)[:, None]
        ids = torch.randint(3, 100, (fast.batch, 3))
        positions, slots = start + torch.tensor([[0, 1, 1]]), start + torch.arange(3)
        mask = tree[: fast.batch]
        found, expected = (d.forward(ids, positions, slots, mask)["logits"] for d in (fast, plain))
        assert alike(found, expected), turn
        for decoder in (fast, plain):
            decoder.accept([[0, 2]] * decoder.batch)
            if turn == 4:
                decoder.keep_rows([0, 2])
    assert len(prepared_of(fast)) == 4
    for buffer, values in fast.buffers.items():
        for row, length in enumerate(fast.lengths):
            assert alike(values[row, :, :length], plain.buffers[buffer][row, :, :length]), buffer


def test_text_is_the_same_with_any_strategy(captured: Callable[[str], Program], monkeypatch: Any) -> None:
    program, _ = varied("llama", captured("llama"))
    strategies = [None, "prompt-lookup{tokens=4}", "token-recycling", "retrieval"]
    found = [generated(program, ROWS, 14, strategy=s) for s in strategies]
    monkeypatch.setattr(running, "REPEATED", 10**9)
    for strategy, text in zip(strategies, found, strict=True):
        assert torch.equal(text, generated(program, ROWS, 14, strategy=strategy)), strategy


@pytest.mark.parametrize(
    "passes",
    ["fuse-kernels", "fuse-projections", "shard-tensor-parallel{size=2}", "split-ffn{widths=[1/2 1]}"],
)
def test_after_passes(passes: str, captured: Callable[[str], Program]) -> None:
    program, _ = varied("llama", captured("llama"))
    data = [{"input_ids": torch.randint(3, 100, (2, 9))} for _ in range(2)]
    fast, plain = both(graphopt.optimize(program, passes, data=data), 1)
    torch.manual_seed(3)
    for _ in range(5):
        ids = torch.randint(3, 100, (1, 1))
        found, expected = (d.extend(ids)["logits"] for d in (fast, plain))
        assert alike(found, expected)
        for decoder in (fast, plain):
            decoder.advance([1])
    assert prepared_of(fast)


def test_sixteen_bits_as_stored(captured: Callable[[str], Program]) -> None:
    """What has no kernel of ours is called as it stands: the same bits."""
    program = graphopt.capture(
        varied("llama", captured("llama"))[1].to(torch.bfloat16), {"input_ids": torch.ones(2, 5).long()}
    )
    fast, plain = both(program, 1)
    for token in (4, 9, 77, 3, 5):
        found, expected = (d.extend(torch.tensor([[token]]))["logits"] for d in (fast, plain))
        assert found.dtype == torch.bfloat16
        assert alike(found.float(), expected.float(), 0.02)
        for decoder in (fast, plain):
            decoder.advance([1])
    assert prepared_of(fast)


def test_outputs_stay_what_they_were(captured: Callable[[str], Program]) -> None:
    """A step's outputs are its own: the next step must not write into them."""
    program, _ = varied("llama", captured("llama"))
    decoder = CachedDecoder(with_cache(program), 1, 20)
    kept: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for token in (4, 9, 77, 3, 5):
        kept.append(decoder.extend(torch.tensor([[token]]))["logits"])
        copies.append(kept[-1].clone())
        decoder.advance([1])
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert not torch.equal(kept[-1], kept[-2])


def test_a_decoder_reads_one_table_by_columns(monkeypatch: Any) -> None:
    """A tied head that is stored by columns is the table of embeddings too, and stays one tensor."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv = nn.Embedding(60, 16), nn.Linear(16, 48)

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            batch, length = input_ids.shape
            x = self.embed(input_ids)
            q, k, v = self.qkv(x).view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(
                1, 2
            ).flatten(2)
            return {"logits": nn.functional.linear(x, self.embed.weight)}

    program = graphopt.capture(Tied().eval(), {"input_ids": torch.randint(0, 60, (2, 5))})
    assert by_columns(60, 16, torch.float32, torch.device("cpu"))
    decoder = CachedDecoder(with_cache(program), 1, 20)
    table = next(v for v in decoder.weights.loaded.values() if v.shape == (60, 16))
    assert table.stride() == (1, 60)
    ids = torch.randint(0, 60, (1, 6))
    found = []
    for token in ids[0].tolist():
        found.append(decoder.extend(torch.tensor([[token]]))["logits"])
        decoder.advance([1])
    assert alike(torch.cat(found, 1), program(input_ids=ids)["logits"])


def test_what_is_asked_of_the_code() -> None:
    """Memory is used again, views cost nothing, and what is drawn at random is drawn at every step."""
    graph = fx.Graph()
    graph.placeholder("decoding_step")
    x = graph.placeholder("x")
    aten = torch.ops.aten
    value: Any = x
    for _ in range(6):
        value = graph.call_function(aten.mul.Tensor, (value, 2.0))
        value.meta["val"] = torch.empty(3, 4)
        value = graph.call_function(aten.transpose.int, (value, 0, 1))
        value.meta["val"] = torch.empty(4, 3)
    drawn = graph.call_function(aten.rand_like.default, (x,))
    drawn.meta["val"] = torch.empty(3, 4)
    summed = graph.call_function(aten.add.Tensor, (value, drawn))
    graph.output([summed, drawn])
    given = torch.rand(3, 4)
    at = torch.zeros(1, 1).long()
    once = Prepared(graph, [], ["sum", "drawn"], Step({}, at, at, 1, 0), [given])
    memories = {id(v) for name, v in once._function.__globals__.items() if name.endswith("_memory")}
    assert len(memories) == 2, once.source
    assert "transpose" not in once.source
    seen: list[torch.Tensor] = [once.first["drawn"]]
    for factor in (1.0, 3.0):
        results = once(Step({}, at, at, 1, 0), [given * factor])
        assert torch.allclose(results["sum"], given * factor * 64 + results["drawn"])
        seen.append(results["drawn"])
    assert not torch.equal(seen[1], seen[2])


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    return [list(range(3, 3 + n)) for n in lengths]


@pytest.mark.parametrize("capacity", [None, 24, 40])
def test_capacities(capacity: int | None, captured: Callable[[str], Program]) -> None:
    """Growing caches and caches of a fixed length, up to the last slot."""
    program, _ = varied("llama", captured("llama"))
    made = graphopt.optimize(program, "insert-cache" + (f"{{max_length={capacity}}}" if capacity else ""))
    rows = rows_of([4, 4])
    expected = generated(program, rows, 20)
    assert torch.equal(generated(made, rows, 20), expected)


def test_inputs_that_are_parts_of_others() -> None:
    """The first step's inputs may lie anywhere, as rows of a larger tensor do; later ones have memory of the step's own."""
    graph = fx.Graph()
    placed = [graph.placeholder(name) for name in ("decoding_step", "x")]
    row = graph.call_function(torch.ops.aten.unsqueeze.default, (placed[1], 0))
    graph.output([graph.call_function(torch.ops.aten.mul.Tensor, (row, 2.0))])
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = torch.zeros(1, 1, 4)
    large = torch.arange(12.0).view(1, 3, 4)
    none = torch.zeros(1, 1, dtype=torch.int64)
    step = Step({}, none, none, 1, 0)
    prepared = Prepared(graph, [], ["y"], step, [large[:, 1:2]])
    for place in range(3):
        x = large[:, place : place + 1]
        assert torch.equal(prepared(step, [x])["y"], 2 * x[None])
