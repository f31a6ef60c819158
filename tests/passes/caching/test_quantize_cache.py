"""Caches of few bits: codes near their values, programs equal to a closed form, texts, files and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from written_texts import ROWS, generated, varied

import graphopt
from graphopt.api import plan_passes
from graphopt.decoding import DraftProgram
from graphopt.decoding.cached import CachedDecoder
from graphopt.ir.errors import LoweringError, PassRefusedError, PipelineError
from graphopt.ir.facts import KVCache, QuantizedCache
from graphopt.ir.operators import cache_codes, cache_load, cache_low, cache_scale
from graphopt.ir.program import Program
from graphopt.ir.running.recurrent_state import begun
from graphopt.ir.running.retype import retyped
from graphopt.ir.schema import is_operator
from graphopt.measure.context import Context
from graphopt.passes.caching.quantize_cache import QuantizeCache

DATA = [{"input_ids": torch.tensor([[5, 9, 17, 40, 3, 8, 22, 31], [7, 7, 30, 12, 64, 88, 90, 4]])}]
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def cached(program: Program, options: str = "", tree: bool = False) -> Program:
    return graphopt.optimize(
        program, f"insert-cache{{tree={str(tree).lower()}}}, quantize-cache{{{options}}}", data=DATA
    )


def stored(values: Tensor, bits: int, group: int) -> Tensor:
    """Return what is read back of values that are stored."""
    low = cache_low(values, group=group) if bits == 4 else None
    scale = cache_scale(values, low, group=group)
    return cache_load(cache_codes(values, scale, low), scale, low)


@settings(max_examples=examples(120), deadline=None)
@given(data=st.data(), bits=st.sampled_from([8, 4]), dtype=st.sampled_from(TYPES))
def test_no_entry_is_further_than_half_a_step(data: Any, bits: int, dtype: torch.dtype) -> None:
    """Any magnitudes, from below the smallest normal number to the largest, zeros and equal entries among them."""
    groups, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 4, 6]))
    limits = torch.finfo(dtype)
    # the range of four bits is a difference of two entries, which is computed in float32 at least
    largest = float(limits.max) * (0.45 if bits == 4 and dtype != torch.float16 else 1.0)
    sizes = st.sampled_from([largest, 1.0, 1e-3, float(limits.tiny), 0.0])
    entries = []
    for _ in range(groups * 2):
        shares = data.draw(st.lists(st.floats(-1, 1), min_size=group, max_size=group))
        offset = data.draw(st.sampled_from([0.0, 0.0, 0.9, -0.9]))
        shifted = torch.tensor(shares, dtype=torch.float64) * (1 - abs(offset)) + offset
        entries.append(shifted * data.draw(sizes))
    values = torch.stack(entries).reshape(1, 1, 2, groups * group).to(dtype)
    low = cache_low(values, group=group) if bits == 4 else None
    scale = cache_scale(values, low, group=group)
    found = cache_load(cache_codes(values, scale, low), scale, low)
    assert found.dtype == dtype
    assert found.isfinite().all()
    steps = scale.double().repeat_interleave(group, -1)
    # beside half a step, what storing the result in its type, and dividing in float32, loses
    rounding = values.double().abs() * limits.eps + steps * 1e-4 + float(limits.tiny) * limits.eps
    assert ((found.double() - values.double()).abs() <= 0.5 * steps + rounding).all()


def test_zeros_and_what_codes_hold_exactly_come_back() -> None:
    zeros = torch.zeros(1, 2, 3, 8)
    assert torch.equal(stored(zeros, 8, 8), zeros)
    assert torch.equal(stored(zeros, 4, 4), zeros)
    whole = torch.tensor([-127.0, 5.0, 64.0, 0.0]).reshape(1, 1, 1, 4)
    assert torch.equal(stored(whole, 8, 4), whole)
    # entry i in the low half of byte i, entry i + size / 2 in the high half
    sixteen = torch.arange(16.0).reshape(1, 1, 1, 16)
    low, ones = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    codes = cache_codes(sixteen, ones, low)
    assert codes.dtype == torch.uint8
    assert codes.flatten().tolist() == [i + 16 * (i + 8) for i in range(8)]
    assert torch.equal(cache_load(codes, ones, low), sixteen)


def test_a_vector_that_is_not_a_number_stays_none() -> None:
    values = torch.ones(1, 1, 2, 4)
    values[0, 0, 0, 1] = float("nan")
    for bits in (8, 4):
        found = stored(values, bits, 4)
        assert found[0, 0, 0].isnan().all()
        assert torch.allclose(found[0, 0, 1], values[0, 0, 1])


def in_closed_form(program: Program, bits: int, group: int) -> Program:
    """Return the program with caches of floats whose values are rounded before they are stored, in plain arithmetic."""

    def rounded(values: Tensor) -> Tensor:
        grouped = values.reshape(*values.shape[:-1], values.shape[-1] // group, group)
        if bits == 8:
            step = grouped.abs().amax(-1, keepdim=True) / 127
            return ((grouped / step).round() * step).reshape(values.shape)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        step = (high - low) * ((1 - 2 * torch.finfo(values.dtype).eps) / 15)
        return (((grouped - low) / step).round() * step + low).reshape(values.shape)

    changed = graphopt.optimize(program, "insert-cache")
    for store in [n for n in changed.nodes if is_operator(n, "graphopt.cache_store")]:
        with changed.edit.before(store):
            value = changed.edit.emit(rounded, store.args[1])
        changed.edit.change(store, values=value)
    return changed


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 4), (4, 0), (4, 4)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_results_are_those_of_the_closed_form(
    name: str, bits: int, group: int, captured: Callable[[str], Program]
) -> None:
    """In pieces, with rows side by side, in float64, where rounding decides nothing by chance."""
    program = retyped(varied(name, captured(name))[0])
    made, other = cached(program, f"bits={bits} group={group}"), in_closed_form(program, bits, group or 8)
    ids = DATA[0]["input_ids"]
    decoders = [CachedDecoder(p, 2, 12) for p in (made, other)]
    for piece in ids.split([3, 1, 4], dim=1):
        found, expected = (d.extend(piece)["logits"] for d in decoders)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
        for d in decoders:
            d.advance([piece.shape[1]] * 2)
    plain = CachedDecoder(graphopt.optimize(program, "insert-cache"), 2, 12)
    plain.extend(ids[:, :7])
    plain.advance([7, 7])
    # and rounding does change them
    assert not torch.allclose(plain.extend(ids[:, 7:])["logits"], found[:, -1:], rtol=1e-6)


@settings(max_examples=examples(18), deadline=None)
@given(
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    options=st.sampled_from(["bits=8", "bits=8 group=4", "bits=4", "bits=4 group=4"]),
    name=st.sampled_from(["mistral", "falcon_alibi"]),
    seed=st.integers(0, 99),
)
def test_any_pieces_give_the_whole(
    pieces: list[int], rows: int, options: str, name: str, seed: int, captured: Any
) -> None:
    """Scales never change later: whatever the pieces, the logits are those of all tokens at once."""
    program = captured(name)
    wide = program.derived("test float64", lambda: retyped(program))
    floats = wide.derived("test cache", lambda: graphopt.optimize(wide, "insert-cache"))
    made = floats.derived(options, lambda: graphopt.optimize(floats, f"quantize-cache{{{options}}}"))
    ids = torch.randint(3, 100, (rows, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    whole = made(**begun(made, {"input_ids": ids}))["logits"]
    decoder, found = CachedDecoder(made, rows, sum(pieces) + 2), []
    for piece in ids.split(pieces, dim=1):
        found.append(decoder.extend(piece)["logits"])
        decoder.advance([piece.shape[1]] * rows)
    assert torch.allclose(torch.cat(found, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tree", [False, True])
def test_candidates_that_are_rolled_back_change_no_text(
    bits: int, tree: bool, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    program = retyped(varied("llama", captured("llama"))[0])
    made = cached(program, f"bits={bits}", tree)
    expected = generated(made, ROWS, 20)
    assert torch.equal(generated(made, ROWS[:1], 20), expected[:1]), "rows beside it make a difference"
    for strategy in ("prompt-lookup{tokens=4}", "token-recycling"):
        assert torch.equal(generated(made, ROWS, 20, strategy=strategy), expected)
    again = graphopt.load(made.save(tmp_path / "saved"))
    assert again.facts[QuantizedCache] == made.facts[QuantizedCache]
    assert torch.equal(generated(again, ROWS, 20), expected)


def test_drafts_of_another_program_and_of_the_first_layer(captured: Callable[[str], Program]) -> None:
    """Strategies that run graphs of their own over the same caches."""
    program = retyped(varied("llama", captured("llama"))[0])
    exits = graphopt.optimize(
        program, "attach-early-exit{layers=[0]}, insert-cache{tree=true}, quantize-cache", data=DATA
    )
    made = cached(program, tree=True)
    expected = generated(made, ROWS, 16)
    assert torch.equal(generated(exits, ROWS, 16), expected)
    assert torch.equal(generated(exits, ROWS, 16, strategy="early-exit"), expected)
    draft = cached(graphopt.optimize(program, "skip-layers{remove=1}", data=DATA), "bits=4", tree=True)
    assert torch.equal(generated(made, ROWS, 16, strategy=DraftProgram(draft)), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_ranks_hold_the_codes_of_their_heads(
    bits: int, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    program = retyped(varied("llama", captured("llama"))[0])
    sharded = graphopt.optimize(
        program, f"shard-tensor-parallel{{size=2}}, insert-cache, quantize-cache{{bits={bits}}}", data=DATA
    )
    expected = generated(cached(program, f"bits={bits}"), ROWS)
    assert torch.equal(generated(sharded, ROWS), expected)
    decoder = CachedDecoder(sharded, 1, 4)
    assert {name.removesuffix("_scale").removesuffix("_low") for name, *_ in decoder.buffers} == set(
        sharded.facts[QuantizedCache].caches
    )
    assert {(first, last) for _, first, last in decoder.buffers} == {(0, 1), (1, 2)}


@pytest.mark.parametrize("bits", [8, 4])
def test_onnx_runtime_computes_the_same(
    bits: int, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """The lowering compares; and steps hand codes and scales on."""
    import onnxruntime

    made = graphopt.optimize(
        varied("llama", captured("llama"))[0],
        f"insert-cache{{max_length=20}}, quantize-cache{{bits={bits}}}",
        data=DATA,
    )
    made.lower("onnx", tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "decoder.onnx"))
    names = {i.name: i.type for i in session.get_inputs()}
    assert names["key_cache_0"] == ("tensor(int8)" if bits == 8 else "tensor(uint8)")
    state = {n: v[:1].numpy() for n, v in begun(made, DATA[0]).items() if "_cache_" in n}
    new, start, written = list(ROWS[0]), 0, []
    while len(written) < 8:
        positions = torch.arange(start, start + len(new))[None]
        values = session.run(
            None, {"input_ids": torch.tensor([new]).numpy(), "position_ids": positions.numpy(), **state}
        )
        found = dict(zip([o.name for o in session.get_outputs()], values, strict=True))
        state = {n: found[f"next_{n}"] for n in state}
        start += len(new)
        new = [int(found["logits"][0, -1].argmax())]
        written.extend(new)
    assert written == generated(made, ROWS[:1], 8)[0].tolist()


def test_a_file_whose_codes_are_wrong_is_refused() -> None:
    from graphopt.backends.onnx.compare import _codes_apart

    codes = torch.randint(-100, 100, (4, 8, 8)).to(torch.int8)
    near, far = codes.clone(), codes.clone()
    near[0, 0, 0] += 1
    far[0, 0, 0] += 2
    assert _codes_apart(near, codes, 8) == 0.0
    assert _codes_apart(far, codes, 8) == float("inf")
    assert _codes_apart(codes + 1, codes, 8) == float("inf"), "not few of them"
    packed = torch.full((4, 8, 8), 0x55, dtype=torch.uint8)
    near, far = packed.clone(), packed.clone()
    near[0, 0, 0] = 0x65
    far[0, 0, 0] = 0x35
    assert _codes_apart(near, packed, 4) == 0.0
    assert _codes_apart(far, packed, 4) == float("inf")


@pytest.mark.parametrize(
    ("options", "codes", "bytes_after"),
    [("", torch.int8, 8 + 4), ("bits=8 group=4", torch.int8, 8 + 8), ("bits=4", torch.uint8, 4 + 8)],
)
def test_bytes_are_those_that_the_report_says(
    options: str, codes: torch.dtype, bytes_after: int, captured: Callable[[str], Program]
) -> None:
    made = cached(captured("llama"), options)
    caches = {n: s for n, s in made.signature.inputs.items() if "_cache_" in n}
    total = sum(s.shape[1] * s.shape[3] * s.dtype.itemsize for s in caches.values())
    # two layers of keys and values, two heads of 8
    assert total == 2 * 2 * 2 * bytes_after
    note = f"caches take {2 * 2 * 2 * 32:,} bytes for each token before and {total:,} after"
    assert note in made.report.passes[-1].notes
    assert {caches[n].dtype for n in made.facts[QuantizedCache].caches} == {codes}
    assert made.facts[KVCache].layers == 2
    assert "perplexity" in made.report.passes[-1].metric


def test_some_caches_alone(captured: Callable[[str], Program]) -> None:
    """A plan may be edited: values in few bits and keys as they were."""
    program = graphopt.optimize(varied("llama", captured("llama"))[0], "insert-cache")
    ((_, plan),) = plan_passes(program, "quantize-cache{bits=4}", Context())
    plan.sites = [s for s in plan.sites if s.block.startswith("value")]
    made = graphopt.optimize(program, "quantize-cache{bits=4}", plan=[plan], data=DATA)
    assert made.facts[QuantizedCache].caches == ("value_cache_0", "value_cache_1")
    assert made.signature.inputs["key_cache_0"] == program.signature.inputs["key_cache_0"]
    assert not any(re.match("key_cache_._", n) for n in made.signature.inputs)
    assert generated(made, ROWS).shape == (3, 12)


def test_a_program_in_float16_has_scales_in_float16() -> None:
    made = cached(graphopt.capture(zoo.make("llama").half(), inputs=DATA[0]), "bits=4")
    types = {n: s.dtype for n, s in made.signature.inputs.items() if "_cache_" in n}
    assert {t for n, t in types.items() if n.endswith(("_scale", "_low"))} == {torch.float16}
    for dtype in ("stored", "float32"):
        assert generated(made, ROWS, 4, dtype=dtype).shape == (3, 4)


def test_refusals(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = graphopt.optimize(captured("llama"), "insert-cache")
    for options, reason in (
        ("bits=8 group=3", "groups of 3 do not divide its vectors of 8"),
        ("bits=4 group=2", "scales for groups of 2 take more than 4 bits save"),
    ):
        with pytest.raises(PassRefusedError, match=reason):
            graphopt.optimize(program, f"quantize-cache{{{options}}}")
    with pytest.raises(PipelineError, match="bits"):
        QuantizeCache(bits=3)
    with pytest.raises(PipelineError, match="requires a program that is cached"):
        graphopt.optimize(captured("llama"), "quantize-cache")
    made = graphopt.optimize(program, "quantize-cache", data=DATA)
    for after in ("quantize-cache", "fit-target", "fit-target, quantize"):
        with pytest.raises(PipelineError, match="keeping its caches in few bits"):
            graphopt.optimize(made, after)
    with pytest.raises(LoweringError, match="scales that are constants"):
        made.lower("genai", tmp_path / "genai")
    with pytest.raises(LoweringError, match="no checkpoint names"):
        made.save_pretrained(tmp_path / "folder")
