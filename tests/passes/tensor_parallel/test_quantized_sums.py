"""Sums in few bits: packing, errors, outliers, bytes, and the pass that calibrates them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.ir.errors import PassRefusedError, PipelineError
from graphopt.ir.operators.quantized import (
    chosen_algorithm,
    decode,
    encode,
    pack,
    payload_bytes,
    quantize,
    shares,
    unpack,
)
from graphopt.ir.program import Program
from graphopt.measure.context import Context
from graphopt.passes.tensor_parallel.calibration import Extremes

SUM = torch.ops.graphopt.quantized_sum.default


@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_packing_loses_nothing(bits: int, count: int, seed: int) -> None:
    top = 1 << (bits - 1)
    q = torch.randint(-top, top, (3, count), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack(q, bits)
    assert packed.shape == (3, -(-count * bits // 8)), "more bytes travel than the bits need"
    assert torch.equal(unpack(packed, count, bits), q)


def terms(ranks: int, features: int, seed: int = 0, tokens_: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(features, generator=generator).exp()
    return [torch.randn(2, tokens_, features, generator=generator) * spread for _ in range(ranks)]


def tables(parts: list[torch.Tensor], kept: int, bits: int) -> tuple[torch.Tensor, ...]:
    largest = torch.stack([p.abs().amax((0, 1)) for p in parts])
    first = largest.sum(0).topk(kept).indices
    chosen = torch.zeros(largest.shape[1], dtype=torch.bool)
    chosen[first] = True
    order = torch.cat([chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]])
    top = (1 << (bits - 1)) - 1
    scales = (largest[:, order[kept:]] / top).clamp(min=1e-8)
    reduced = (sum(parts).abs().amax((0, 1))[order[kept:]] / top).clamp(min=1e-8)
    return order, order.argsort(), scales, reduced


@given(st.integers(1, 8), st.integers(2, 40), st.integers(3, 8), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_error_is_within_half_a_step_of_each_rank(ranks, features, bits, seed, data) -> None:
    kept = data.draw(st.integers(0, features))
    parts = terms(ranks, features, seed)
    order, inverse, scales, reduced = tables(parts, kept, bits)
    got = SUM(parts, order, inverse, scales, reduced, kept, bits, 0, "gather", 0)
    exact = sum(p.double() for p in parts)
    allowed = torch.zeros(features, dtype=torch.float64)
    allowed[order[kept:]] = scales.double().sum(0) / 2
    rounding = sum(p.abs().double() for p in parts) * 2**-8  # of bfloat16
    assert bool(((got - exact).abs() <= allowed * (1 + 1e-5) + rounding + 1e-6).all())
    outliers = order[:kept]
    cast = sum(p[..., outliers].to(torch.bfloat16).float() for p in parts)
    assert torch.equal(got[..., outliers], cast) if kept else True, (
        "outliers are not what bfloat16 makes of them"
    )


@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_all_outliers_is_the_bfloat16_sum(ranks: int, features: int, seed: int) -> None:
    parts = terms(ranks, features, seed)
    empty = torch.zeros(ranks, 0)
    order = torch.arange(features)
    got = SUM(parts, order, order, empty, torch.zeros(0), features, 4, 0, "gather", 0)
    assert torch.equal(got, sum(p.to(torch.bfloat16).float() for p in parts))


@given(
    st.integers(2, 6), st.integers(2, 70), st.integers(2, 8), st.sampled_from([0, 4, 32]), st.integers(0, 50)
)
@settings(max_examples=40, deadline=None)
def test_two_steps_round_the_sum_once_more(ranks, features, bits, block, seed) -> None:
    parts = terms(ranks, features, seed)
    kept = features // 3
    order, inverse, scales, reduced = tables(parts, kept, bits)
    if block:
        scales, reduced = torch.zeros(ranks, 0), torch.zeros(0)
    one = SUM(parts, order, inverse, scales, reduced, kept, bits, block, "gather", 0)
    two = SUM(parts, order, inverse, scales, reduced, kept, bits, block, "two-step", 0)
    assert two.shape == one.shape
    if block:
        step = one.abs().amax() / max((1 << (bits - 1)) - 1, 1)
        assert float((one - two).abs().max()) <= float(step) * 2 + 1e-3
    else:
        allowed = torch.zeros(features)
        allowed[order[kept:]] = reduced
        # the quantised sum may lie beyond the range of the exact one, where it is cut off
        beyond = torch.zeros(features)
        beyond[order[kept:]] = scales.sum(0) / 2
        assert bool(((one - two).abs() <= allowed + beyond + one.abs() * 2**-7 + 1e-6).all())


def test_bits_a_value() -> None:
    assert 8 * payload_bytes(4096, 64, 4, 0) / 4096 == 4.1875, "one outlier in 64 takes 4.1875 bits a value"
    assert 8 * payload_bytes(4096, 0, 4, 32) / 4096 == 4.5, "a float16 scale per 32 values takes half a bit"


@given(st.integers(2, 8), st.integers(1, 70), st.sampled_from([0, 16]), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_as_long_as_the_formula_says(bits, features, block, kept) -> None:
    kept = min(kept, features)
    x = torch.randn(3, features)
    scale = None if block else torch.ones(features - kept)
    sent = encode(x, scale, kept, bits, block)
    assert sent.shape[-1] == payload_bytes(features, kept, bits, block)
    assert decode(sent, scale, features, kept, bits, block).shape == x.shape


def test_rounding_goes_to_even_and_ends_are_cut() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, 9.0, -9.0])
    assert quantize(x, torch.ones(5), 4).tolist() == [0, 2, 0, 7, -8]


def test_moving_averages() -> None:
    seen = Extremes(rate=0.25)
    seen.add(0, torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    seen.add(0, torch.tensor([[7.0, -6.0], [7.0, -6.0]]))
    assert seen.low[0].tolist() == [0.75 * 1 + 0.25 * 7, 0.75 * -2 + 0.25 * -6]
    assert seen.largest(1)[0].tolist() == [0.75 * 3 + 0.25 * 7, 3.0]


def test_algorithm_by_message_size() -> None:
    assert chosen_algorithm("auto", 1, 4096, 8, 4, 400_000) == "gather", "one token is a matter of latency"
    assert chosen_algorithm("auto", 4096, 4096, 8, 4, 400_000) == "two-step", "a prompt is a matter of bytes"
    assert chosen_algorithm("auto", 4096, 4096, 2, 4, 400_000) == "gather", (
        "two ranks move the same either way"
    )
    assert [end - start for start, end in shares(10, 4)] == [3, 3, 2, 2]


# -- the pass ---------------------------------------------------------------------------------------------


def data(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=seed) for seed in range(count)]


@lru_cache(maxsize=4)
def sharded(ranks: int = 2) -> Program:
    shape = Shape(size=64, heads=8, kv_heads=4, head_size=8, width=32, layers=2, bias=True)
    program = graphopt.capture(Transformer(shape), tokens(2, 6))
    return graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks}}}")


def loss(first: Program, second: Program) -> float:
    inputs = tokens(2, 9, seed=7)
    a, b = first(**inputs)["logits"], second(**inputs)["logits"]
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("algorithm", ["gather", "two-step", "auto"])
def test_more_bits_are_closer(algorithm: str) -> None:
    program = sharded()
    losses = []
    for bits in (2, 4, 8):
        text = f"quantize-communication{{bits={bits} algorithm={algorithm} group=16 outliers=none}}"
        losses.append(loss(program, graphopt.optimize(program, text)))
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.05


def test_outliers_help_where_few_features_are_large() -> None:
    parts = terms(4, 64)
    for p in parts:
        p[..., :2] *= 100
    order, inverse, scales, reduced = tables(parts, 2, 4)
    exact = sum(parts)
    kept = SUM(parts, order, inverse, scales, reduced, 2, 4, 0, "gather", 0)
    plain_order = torch.arange(64)
    largest = torch.stack([p.abs().amax() for p in parts])[:, None].expand(4, 64) / 7
    without = SUM(parts, plain_order, plain_order, largest, reduced, 0, 4, 0, "gather", 0)
    assert float((kept - exact).square().mean()) < 0.1 * float((without - exact).square().mean())


def test_every_sum_is_replaced_and_the_report_says_how_many_bits() -> None:
    done = graphopt.optimize(sharded(), "quantize-communication", data=data())
    assert done.operators["graphopt.quantized_all_reduce"] == 4
    assert "graphopt.all_reduce" not in done.operators
    entry = done.report.passes[-1]
    # 63 integers of 4 bits fill 32 bytes
    assert any("4.25 bits per value" in note for note in entry.notes), entry.notes
    assert any(note.startswith("clipped:") for note in entry.notes)


def test_order_of_ranks_does_not_change_the_outliers() -> None:
    parts = terms(4, 40)
    first = tables(parts, 5, 4)[0][:5]
    second = tables(parts[::-1], 5, 4)[0][:5]
    assert torch.equal(first, second)


def test_calibration_counts_no_padding() -> None:
    """A padded position can hold anything, and would widen the ranges."""
    from graphopt.ir.schema import is_operator
    from graphopt.passes.tensor_parallel.calibration import calibrate

    program = sharded()
    sums = [n for n in program.graph.nodes if is_operator(n, "graphopt.all_reduce")]
    batches = data(2)
    wild = [{**b, "input_ids": torch.where(b["attention_mask"] == 0, 16, b["input_ids"])} for b in batches]
    first = calibrate(program, Context(batches), sums[:1], 0.5)
    second = calibrate(program, Context(wild), sums[:1], 0.5)
    for name, values in first.items():
        assert torch.allclose(values, second[name]), "what was padded counted"


def test_ranges_survive_in_the_plan(tmp_path: Path) -> None:
    from graphopt.passes.framework import kept_tensors
    from graphopt.passes.tensor_parallel.quantize_communication import QuantizeCommunication

    program = sharded()
    step = QuantizeCommunication()
    plan = step.plan(program, Context(data(), work_dir=tmp_path))
    direct = graphopt.optimize(program, [step], plan=[plan], verify="off")
    kept_tensors._TENSORS_BY_KEY.clear()
    again = graphopt.optimize(program, [step], plan=[plan], verify="off")
    assert loss(direct, again) == 0.0, "a plan read later makes another program"
    kept_tensors._TENSORS_BY_KEY.clear()
    for path in tmp_path.glob("ranges-*"):
        path.unlink()
    with pytest.raises(PipelineError, match="are not there"):
        graphopt.optimize(program, [step], plan=[plan], verify="off")


def test_refusals() -> None:
    whole = graphopt.capture(Transformer(Shape()), tokens(2, 6))
    with pytest.raises(PipelineError, match="requires a program that is sharded"):
        graphopt.optimize(whole, "quantize-communication", data=data())
    with pytest.raises(PassRefusedError, match="need data"):
        graphopt.optimize(sharded(), "quantize-communication")
    done = graphopt.optimize(sharded(), "quantize-communication{group=32 outliers=none}")
    assert done.operators["graphopt.quantized_all_reduce"] == 4, "scales made at run time need no data"
    with pytest.raises(PipelineError, match="cannot run on a program that is sending few bits"):
        graphopt.optimize(done, "drop-sync-points{fraction=1}")
    with pytest.raises(PipelineError, match="allowed is from 2 to 8"):
        graphopt.optimize(sharded(), "quantize-communication{bits=1}")


def test_saved_and_loaded(tmp_path: Path) -> None:
    done = graphopt.optimize(sharded(), "quantize-communication{bits=3}", data=data())
    again = graphopt.load(done.save(tmp_path / "saved"))
    assert loss(done, again) == 0.0
