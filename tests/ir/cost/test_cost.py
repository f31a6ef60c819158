"""Cost: golden values, closed forms, properties, and agreement with counting by other means."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
import zoo
from closed_form import Transformer, decode_time, forward_work, prefill_time
from counting import calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graphopt.frontends.torch_module import capture_module
from graphopt.ir.cost import (
    ALL_REDUCE,
    DEVICES,
    LINKS,
    Call,
    Device,
    Link,
    Operand,
    Work,
    all_gather,
    all_reduce,
    cost,
    count_weights,
    double_tree,
    expressions,
    find_device,
    find_link,
    formula,
    in_switch,
    one_shot,
    peak_memory,
    ring,
    survey,
    time_call,
    total,
    tree,
    two_shot,
    work,
    works_by_node,
)
from graphopt.ir.cost.registry import FORMULAS
from graphopt.ir.errors import UsageError
from graphopt.ir.operators.attention import visible_keys
from graphopt.ir.operators.work import visible_pairs
from graphopt.ir.program import Program
from graphopt.ir.schema import operator_name

LLAMA_3_8B = Transformer(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_size=128, inner=14336, vocabulary=128256
)
GPUS = ("a100", "h100", "h200")
NVLINK = Link("test", 450e9, 1e-6)
sizes_of_runs = st.integers(1, 1 << 14)


def capture(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Program:
    return capture_module(model.eval(), tuple(inputs), **options)


@pytest.fixture(scope="module")
def llama() -> Program:
    ids = torch.randint(3, 101, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    named = {0: "batch", 1: "sequence"}
    return capture_module(zoo.make("llama"), inputs, dynamic=dict.fromkeys(inputs, named))


# -- golden values ------------------------------------------------------------------------------------


def test_llama_3_8b_reads_the_published_number_of_weights() -> None:
    """Wrong if a projection is forgotten, or key and value projections are counted at the query's heads."""
    assert LLAMA_3_8B.layer_parameters == pytest.approx(218.1038e6, rel=1e-6)
    assert LLAMA_3_8B.linear_parameters == pytest.approx(7.5047e9, rel=1e-5)
    assert LLAMA_3_8B.cache_bytes() == 131_072


@pytest.mark.parametrize(
    ("batch", "new", "cached", "gflop", "gigabytes", "milliseconds"),
    [
        (1, 1, 4096, 17.16, 15.546, (7.62, 4.64, 3.24)),
        (1, 8, 4096, 137.3, 15.547, (7.62, 4.64, 3.24)),
        (32, 1, 4096, 549.0, 32.19, (15.8, 9.61, 6.71)),
    ],
)
def test_decoding_golden_values(
    batch: int, new: int, cached: int, gflop: float, gigabytes: float, milliseconds: tuple[float, ...]
) -> None:
    """Wrong if attention is counted as the full square, or the cache at the query's heads."""
    for name, expected in zip(GPUS, milliseconds, strict=True):
        timing = decode_time(LLAMA_3_8B, DEVICES[name], batch=batch, new=new, cached=cached)
        assert timing.flops / 1e9 == pytest.approx(gflop, rel=0.005)
        assert timing.bytes / 1e9 == pytest.approx(gigabytes, rel=0.005)
        assert timing.seconds * 1e3 == pytest.approx(expected, rel=0.005)
        assert timing.bound == "memory"


def test_prefill_golden_values() -> None:
    """Wrong if the LM head sees every position of a prompt, or causal attention is not halved."""
    for name, expected in zip(GPUS, (197, 62.3, 62.3), strict=True):
        timing = prefill_time(LLAMA_3_8B, DEVICES[name], batch=1, new=4096)
        assert timing.flops / 1e9 == pytest.approx(61_575, rel=0.005)
        assert timing.bytes / 1e9 == pytest.approx(15.55, rel=0.005)
        assert timing.seconds * 1e3 == pytest.approx(expected, rel=0.005)
        assert timing.bound == "compute"


def test_verifying_eight_tokens_takes_as_long_as_decoding_one() -> None:
    """Wrong if weights were counted once per token instead of once per step."""
    for name in GPUS:
        one, eight = (decode_time(LLAMA_3_8B, DEVICES[name], batch=1, new=n, cached=4096) for n in (1, 8))
        assert eight.seconds - one.seconds < 1e-6


@pytest.mark.parametrize(
    ("name", "kind", "ridge"),
    [
        ("a100", "bfloat16", 153),
        ("h100", "bfloat16", 295),
        ("h200", "bfloat16", 206),
        ("m4-ane", "float16", 158),
        ("npu-laptop", "int8", 330),
    ],
)
def test_ridges_of_devices(name: str, kind: str, ridge: float) -> None:
    """Wrong if a sparse peak, or the bandwidth of another part, got into the table."""
    assert DEVICES[name].ridge(kind) == pytest.approx(ridge, rel=0.015)


@pytest.mark.parametrize(
    ("algorithm", "size", "microseconds"),
    [
        (ring, 8 << 10, 14.03),
        (tree, 8 << 10, 6.11),
        (one_shot, 8 << 10, 1.13),
        (two_shot, 8 << 10, 2.03),
        (ring, 32 << 20, 144.5),
        (tree, 32 << 20, 453.4),
        (double_tree, 32 << 20, 155.1),
        (one_shot, 32 << 20, 523.0),
        (two_shot, 32 << 20, 132.5),
        (in_switch, 32 << 20, 2 + (32 << 20) / 450e3),
    ],
)
def test_all_reduce_golden_values(algorithm: Any, size: int, microseconds: float) -> None:
    """Wrong if latency or volume is counted for another number of hops or ranks."""
    assert algorithm(size, 8, NVLINK) * 1e6 == pytest.approx(microseconds, rel=0.01)


# -- collectives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [*ALL_REDUCE.values(), in_switch, all_gather])
def test_one_rank_has_nothing_to_add(algorithm: Any) -> None:
    """Wrong if a program on one device were charged for communication."""
    assert algorithm(1 << 20, 1, NVLINK) == 0
    assert all_reduce(1 << 20, 1, NVLINK)[1] == 0


def test_no_ranks_is_an_error() -> None:
    """Wrong if a nonsensical number of ranks gave a nonsensical time."""
    with pytest.raises(UsageError, match="at least one rank"):
        ring(8, 0, NVLINK)


@settings(deadline=None)
@given(ranks=st.integers(4, 512), data=st.data())
def test_ring_and_tree_cross_exactly_once(ranks: int, data: st.DataObject) -> None:
    """Wrong if the cheap algorithm for small messages were also the cheap one for large messages."""

    def difference(size: float) -> float:
        return ring(size, ranks, NVLINK) - tree(size, ranks, NVLINK)

    low, high = 0.0, 1e12
    assert difference(low) > 0 > difference(high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if difference(middle) > 0 else (low, middle)
    assert difference(data.draw(st.floats(0, low * 0.999))) > 0
    assert difference(data.draw(st.floats(high * 1.001, 1e12))) < 0


@settings(deadline=None)
@given(size=st.integers(0, 1 << 30), ranks=st.integers(2, 64))
def test_the_chosen_all_reduce_is_the_fastest(size: int, ranks: int) -> None:
    """Wrong if the choice compared other sizes or ranks than it returns the time for."""
    name, seconds = all_reduce(size, ranks, LINKS["nvlink3"])
    assert seconds == ALL_REDUCE[name](size, ranks, LINKS["nvlink3"])
    assert all(seconds <= f(size, ranks, LINKS["nvlink3"]) for f in ALL_REDUCE.values())
    assert all_reduce(size, ranks, LINKS["nvlink"])[1] <= in_switch(size, ranks, LINKS["nvlink"])


def test_links_take_the_rate_of_their_device() -> None:
    """Wrong if NVLink ran as fast between A100s as between H100s, or existed on an NPU."""
    assert find_link("nvlink", DEVICES["a100"]).bandwidth == 300e9
    assert find_link("nvlink", DEVICES["h200"]).bandwidth == 450e9
    with pytest.raises(UsageError, match="no NVLink"):
        find_link("nvlink", DEVICES["npu-laptop"])
    with pytest.raises(UsageError, match="infiniband"):
        find_link("infinband")


# -- roofline -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(batch=sizes_of_runs, new=sizes_of_runs, cached=sizes_of_runs, more=st.integers(1, 4096))
def test_time_grows_with_batch_tokens_and_cache(batch: int, new: int, cached: int, more: int) -> None:
    """Wrong if a term had the wrong sign or used one size for another."""
    device = DEVICES["h100"]
    base = decode_time(LLAMA_3_8B, device, batch=batch, new=new, cached=cached)
    for larger in (
        decode_time(LLAMA_3_8B, device, batch=batch + more, new=new, cached=cached),
        decode_time(LLAMA_3_8B, device, batch=batch, new=new + more, cached=cached),
        decode_time(LLAMA_3_8B, device, batch=batch, new=new, cached=cached + more),
        decode_time(LLAMA_3_8B, device.derated(bandwidth=0.5), batch=batch, new=new, cached=cached),
        decode_time(LLAMA_3_8B, device.derated(compute=0.5), batch=batch, new=new, cached=cached),
    ):
        assert larger.seconds >= base.seconds
        assert larger.flops >= base.flops
    assert prefill_time(LLAMA_3_8B, device, batch=batch, new=new).seconds <= base.seconds


@settings(deadline=None)
@given(
    flops=st.integers(0, 10**15),
    moved=st.integers(1, 10**12),
    name=st.sampled_from(sorted(DEVICES)),
    kind=st.sampled_from(["bfloat16", "float32", "int8", "float64", "float8_e4m3fn", "bool"]),
)
def test_memory_is_the_bound_exactly_below_the_ridge(flops: int, moved: int, name: str, kind: str) -> None:
    """Wrong if the reported bound named the resource that is waiting instead of the one waited for."""
    device = DEVICES[name]
    timing = time_call(flops, moved, device, kind)
    exact = Fraction(flops, moved) / (Fraction(device.peak(kind)) / Fraction(device.bandwidth))
    if abs(exact - 1) > 1e-9:
        assert (timing.bound == "memory") == (exact < 1)
        assert (timing.bound == "memory") == (timing.intensity < device.ridge(kind))
    assert timing.seconds == max(flops / device.peak(kind), moved / device.bandwidth)


def test_total_adds_calls_that_do_not_overlap() -> None:
    """Wrong if arithmetic of one call hid behind the memory traffic of another."""
    device = Device("test", {"bfloat16": 100.0}, 10.0, None)
    arithmetic, memory = time_call(1000, 1, device), time_call(1, 1000, device)
    both = total([(arithmetic, 3), (memory, 2)])
    assert both.seconds == pytest.approx(3 * 10 + 2 * 100)
    assert both.memory_seconds == pytest.approx(200)
    assert (both.bound, arithmetic.bound, memory.bound) == ("memory", "compute", "memory")
    assert (both.flops, both.bytes) == (3002, 2003)


def test_halving_the_weights_halves_decoding_that_waits_for_them() -> None:
    """Wrong if weights were charged at a fixed element size."""
    full, half = (
        decode_time(LLAMA_3_8B, DEVICES["h100"], batch=1, cached=0, weight_element=w) for w in (2, 1)
    )
    assert half.seconds / full.seconds == pytest.approx(0.5, rel=1e-4)


def test_devices_are_found_by_name_and_misspellings_get_a_hint() -> None:
    """Wrong if a user who mistypes a device is left without the right name."""
    assert find_device("H200") is DEVICES["h200"]
    with pytest.raises(UsageError, match=r"did you mean .*h100"):
        find_device("h1000")
    assert "guess" in DEVICES["cpu"].note
    with pytest.raises(UsageError, match="fractions"):
        DEVICES["h100"].derated(compute=1.5)


def test_a_type_without_a_peak_runs_as_the_next_wider_one() -> None:
    """Wrong if a device without float8 units were given the rate of its float64 units, or the reverse."""
    assert DEVICES["a100"].peak("float8_e4m3fn") == DEVICES["a100"].peak("bfloat16")
    assert DEVICES["m4-ane"].peak("bfloat16") == DEVICES["m4-ane"].peak("float16")
    assert DEVICES["h100"].peak("int64") == DEVICES["h100"].peak("float32")


# -- formulas -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    queries=st.integers(1, 12),
    extra=st.integers(0, 9),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 15),
)
def test_visible_pairs_are_those_of_the_attention_operator(
    queries: int, extra: int, causal: bool, window: int | None
) -> None:
    """Wrong if the closed form counted other pairs than the reference computes."""
    keys = queries + extra
    mask = visible_keys(queries, keys, None, None, causal, window, torch.device("cpu"))
    expected = queries * keys if mask is None else int(mask.expand(1, 1, queries, keys).sum())
    assert visible_pairs(queries, keys, causal, window) == expected
    t, s = sympy.symbols("t s", integer=True, positive=True)
    symbolic = visible_pairs(t, s, causal, window)
    assert sympy.sympify(symbolic).subs({t: queries, s: keys}) == expected


def _tensors(**shapes: tuple[tuple[int, ...], torch.dtype, bool]) -> dict[str, Operand]:
    return {
        name: Operand(shape, dtype, weight, position=i)
        for i, (name, (shape, dtype, weight)) in enumerate(shapes.items())
    }


def _attention(batch: int, queries: int, keys: int, **options: Any) -> Work:
    half = torch.bfloat16
    tensors = _tensors(
        q=((batch, 8, queries, 64), half, False),
        k=((batch, 2, keys, 64), half, False),
        v=((batch, 2, keys, 32), half, False),
    )
    result = Operand((batch, 8, queries, 32), half)
    return work(Call("graphopt.attention", {**tensors, **options}, tuple(tensors.values()), (result,)))


def test_attention_moves_keys_at_their_own_heads_and_no_scores() -> None:
    """Wrong if grouped heads were charged as if expanded, or the scores' round trip were counted."""
    found = _attention(3, 10, 10, causal=True)
    assert found.flops == 3 * 8 * 55 * (2 * 64 + 2 * 32 + 5)
    assert found.bytes == 2 * 3 * (8 * 10 * 64 + 2 * 10 * 64 + 2 * 10 * 32 + 8 * 10 * 32)
    assert found.weight_bytes == 0
    assert _attention(3, 10, 10).flops == 3 * 8 * 100 * (2 * 64 + 2 * 32 + 5)


def test_attention_reads_only_the_keys_that_a_window_reaches() -> None:
    """Wrong if a decoding step with a window of 16 read the whole cache."""
    narrow, wide = _attention(1, 1, 1000, causal=True, window=16), _attention(1, 1, 1000, causal=True)
    assert wide.bytes - narrow.bytes == 2 * 2 * (64 + 32) * (1000 - 16)
    assert narrow.flops * 1000 == wide.flops * 16


@settings(deadline=None)
@given(tokens=st.integers(1, 64), chosen=st.integers(1, 4))
def test_a_mixture_works_per_chosen_expert_and_reads_those_it_touches(tokens: int, chosen: int) -> None:
    """Wrong if every token paid for every expert, or one token for the weights of all."""
    single = torch.float32
    tensors = _tensors(
        x=((tokens, 16), single, False),
        experts=((tokens, chosen), torch.int64, False),
        weights=((tokens, chosen), single, False),
        up=((8, 48, 16), single, True),
        down=((8, 16, 24), single, True),
    )
    result = Operand((tokens, 16), single)
    call = Call("graphopt.routed_ffn", {**tensors, "gated": True}, tuple(tensors.values()), (result,))
    found = work(call)
    matrices = 48 * 16 + 16 * 24
    assert found.flops == tokens * chosen * (2 * matrices + 5 * 24 + 2 * 16)
    assert found.weight_bytes == 4 * min(tokens * chosen, 8) * matrices
    hidden = 2 * tokens * chosen * 24 * 4
    assert found.activation_bytes == 2 * 4 * tokens * 16 + (8 + 4) * tokens * chosen + hidden


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.strided = nn.Conv2d(16, 12, 5, stride=2)
        self.back = nn.ConvTranspose2d(12, 6, 3, stride=2)
        self.line = nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.back(torch.relu(self.strided(torch.relu(self.grouped(x)))))
        x = self.line(x.flatten(2)).transpose(1, 2)
        product = torch.matmul(x, x.transpose(1, 2))
        return torch.matmul(product, self.head(x))


def test_products_agree_with_the_flop_counter_of_torch() -> None:
    """Wrong if groups, strides, transposed convolutions or batched products were counted differently."""
    model, x = _Convolutions(), torch.randn(2, 8, 12, 12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    program = capture(model, x, dynamic=None)
    products = (
        "aten.linear",
        "aten.matmul",
        "aten.bmm",
        "aten.conv1d",
        "aten.conv2d",
        "aten.conv_transpose2d",
    )
    found = {n: w for n, w in works_by_node(program).items() if operator_name(n.target) in products}
    assert len(found) == 7
    assert sum(int(item.flops) for item in found.values()) == counter.get_total_flops()


def test_einsum_counts_every_index_once() -> None:
    """Wrong if a contraction were counted by its result alone."""
    a, b = Operand((2, 3, 5, 7), torch.float32), Operand((2, 3, 11, 7), torch.float32, position=1)
    result = Operand((2, 3, 5, 11), torch.float32)
    for equation in ("bhqd,bhkd->bhqk", "...qd,...kd->...qk"):
        call = Call("aten.einsum", {"equation": equation, "tensors": (a, b)}, (a, b), (result,))
        assert work(call).flops == 2 * 2 * 3 * 5 * 11 * 7


class _Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_an_embedding_reads_rows_and_not_its_table() -> None:
    """Wrong if looking up a few tokens were charged for a vocabulary."""
    found = cost(capture(_Lookup(), torch.randint(0, 1000, (2, 5)), dynamic=None))
    assert found.flops == 0
    assert found.weight_bytes == 10 * 8 * 4
    assert found.bytes == 10 * 8 * 4 + 10 * 8 + 10 * 8 * 4


class _Views(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.transpose(1, 2).split([2, 4], dim=1)
        return first.unsqueeze(1).expand(-1, 2, -1, -1) + second.reshape(second.shape[0], 2, 2, -1)


def test_views_move_nothing_and_expanded_operands_are_read_once() -> None:
    """Wrong if reshaping were charged as copying, or a broadcast operand by its broadcast size."""
    program = capture(_Views(), torch.randn(3, 5, 6), dynamic=None)
    works = works_by_node(program)
    assert [operator_name(n.target) for n in works] == ["aten.add"]
    found = cost(program)
    assert found.flops == 3 * 2 * 2 * 5
    assert found.bytes == 4 * (3 * 2 * 5 + 3 * 4 * 5 + 3 * 2 * 2 * 5)


class _Expanded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x[:, :, None].expand(-1, -1, 4, -1).reshape(x.shape[0], -1, x.shape[2]))


def test_reshaping_an_expanded_value_copies_it() -> None:
    """Wrong if repeating heads in memory were free."""
    program = capture(_Expanded(), torch.randn(2, 3, 5), dynamic=None)
    names = [operator_name(n.target) for n in works_by_node(program)]
    assert names == ["aten.reshape", "aten.exp"]
    assert cost(program).bytes == 4 * (30 + 120) + 4 * (120 + 120)


class _Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 8))
        self.second = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.first @ self.second)


def test_what_depends_on_weights_alone_costs_nothing_at_run_time() -> None:
    """Wrong if folding two matrices into one looked slower than using one."""
    program = capture(_Folded(), torch.randn(4, 8), dynamic=None)
    found = cost(program)
    assert found.flops == 2 * 4 * 6 * 8
    assert found.weight_bytes == 4 * 6 * 8
    assert (found.parameters, found.parameter_bytes) == (48, 192)


def test_tied_weights_are_one_tensor() -> None:
    """Wrong if an embedding that is also the head were counted twice as memory, or once as traffic."""
    ids = torch.randint(3, 101, (1, 6))
    model = zoo.make("llama_tied")
    found = cost(capture_module(model, {"input_ids": ids}))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.blocks["head"].weight_bytes == 4 * (101 * 32 + 32)


class _Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(x)


def test_an_operator_without_a_formula_is_named() -> None:
    """Wrong if a cost that leaves something out did not say so."""
    program = capture(_Unknown(), torch.randn(2, 4, 4), dynamic=None)
    found = cost(program)
    name = next(iter(program.operators))
    assert found.unknown == {name: 1}
    assert (found.flops, found.bytes) == (0, 2 * 4 * 32)


def test_formulas_can_be_added_for_operators() -> None:
    """Wrong if a new operator of graphopt's set could not say what it costs."""
    try:

        @formula("test.operator")
        def twice(call: Call) -> Work:
            return Work(2 * call.output.numel)

        assert work(Call("test.operator", outputs=(Operand((3, 4), torch.float32),))).flops == 24
    finally:
        del FORMULAS["test.operator"]


# -- whole programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 9), (5, 64)])
def test_the_counter_equals_the_closed_form_on_a_captured_llama(
    llama: Program, batch: int, sequence: int
) -> None:
    """Wrong if capture or counting lost, doubled or misread an operator."""
    given_sizes = {"batch": batch, "sequence": sequence}
    model = Transformer(layers=2, hidden=32, heads=4, kv_heads=2, head_size=8, inner=48, vocabulary=101)
    rows, pairs = batch * sequence, batch * sequence * (sequence + 1) // 2
    closed = forward_work(model, batch=batch, new=sequence, weight_element=4, cache_element=4)
    works = works_by_node(llama, given_sizes)
    names = {node: operator_name(node.target) for node in works}

    def flops(*wanted: str) -> int:
        return sum(int(item.flops) for node, item in works.items() if names[node] in wanted)

    softmax = 2 * 4 * pairs * 5
    assert flops("aten.linear", "graphopt.attention") == closed.flops + softmax
    assert flops("graphopt.rms_norm") == (2 * 2 + 1) * 7 * rows * 32
    assert flops("graphopt.rotary") == 2 * 3 * rows * 8 * (4 + 2)
    assert flops("aten.silu") == 2 * 4 * rows * 48
    assert flops("aten.add") == 2 * 2 * rows * 32
    linears = sum(int(w.weight_bytes) for n, w in works.items() if names[n] == "aten.linear")
    assert linears == closed.weight_bytes
    assert cost(llama, given_sizes).flops == sum(int(item.flops) for item in works.values())


@pytest.mark.parametrize("sizes", [{"batch": 1, "sequence": 1}, {"batch": 7, "sequence": 33}, {}])
@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral"])
def test_expressions_give_the_numbers_when_substituted(
    llama: Program, name: str, sizes: dict[str, int]
) -> None:
    """Wrong if a formula took another branch on symbols than on numbers."""
    program = llama if name == "llama" else _program(name)
    found = cost(program, sizes)
    values = {symbol: found.sizes[label] for symbol, label in found.names.items()}
    for what in ("flops", "bytes"):
        assert expressions(program)[what].subs(values) == getattr(found, what)
        assert not expressions(program)[what].subs(values).free_symbols


_programs: dict[str, Program] = {}


def _program(name: str) -> Program:
    if name not in _programs:
        ids = torch.randint(3, 101, (2, 9))
        _programs[name] = capture_module(zoo.make(name), {"input_ids": ids}, compare=False)
    return _programs[name]


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 64), sequence=st.integers(1, 512), more=st.integers(1, 64))
def test_cost_grows_with_every_size(batch: int, sequence: int, more: int) -> None:
    """Wrong if a mask, window or mixture made a larger run cheaper."""
    for name in ("mistral", "mixtral"):
        program = _program(name)
        base = cost(program, {"batch": batch, "sequence": sequence}, "h100")
        for sizes in (
            {"batch": batch + more, "sequence": sequence},
            {"batch": batch, "sequence": sequence + more},
        ):
            larger = cost(program, sizes, "h100")
            assert larger.flops > base.flops
            assert larger.bytes > base.bytes
            assert larger.peak_memory > base.peak_memory
            assert (larger.time_seconds or 0) > (base.time_seconds or 0)
            assert larger.parameters == base.parameters


def test_blocks_add_up_to_the_whole(llama: Program) -> None:
    """Wrong if an operator belonged to two blocks, or to none."""
    found = cost(llama, {"batch": 2, "sequence": 128}, "a100")
    assert list(found.blocks) == [
        "attention.0",
        "ffn.0",
        "attention.1",
        "ffn.1",
        "embedding",
        "head",
        "other",
    ]
    for what in ("flops", "bytes", "weight_bytes"):
        assert sum(getattr(block, what) for block in found.blocks.values()) == getattr(found, what)
    seconds = sum(block.time_seconds or 0 for block in found.blocks.values())
    assert seconds == pytest.approx(found.time_seconds)
    assert found.blocks["head"].flops == 2 * 256 * 32 * 101 + 7 * 256 * 32
    assert found.blocks["ffn.0"].weight_bytes == 4 * (3 * 32 * 48 + 32)
    assert found.blocks["embedding"].flops == 0


def test_blocks_of_an_encoder_and_a_decoder_own_their_cross_attention() -> None:
    """Wrong if keys and values read from the encoder counted as the encoder's head."""
    ids = torch.randint(3, 101, (2, 9))
    model = zoo.make("t5")
    program = capture_module(
        model, {"input_ids": ids, "decoder_input_ids": ids[:, :7], "use_cache": False}, compare=False
    )
    found = cost(program)
    linears = [
        sum(
            int(item.weight_bytes)
            for node, item in works_by_node(program).items()
            if node in set(block.nodes)
        )
        for block in program.anatomy.attention
    ]
    assert min(linears) < found.blocks["attention.3"].weight_bytes == found.blocks["attention.2"].weight_bytes


def test_a_cost_is_plain_data(llama: Program) -> None:
    """Wrong if ``--json`` could not print it, or named sizes by symbols nobody has seen."""
    plain = json.loads(json.dumps(cost(llama, device="h100").as_dict()))
    assert set(plain["sizes"]) == {"batch", "sequence"}
    assert "batch*sequence" in plain["expressions"]["flops"]
    assert plain["device"] == "h100"
    assert plain["blocks"]["attention.0"]["bound"] in ("compute", "memory")
    assert plain["time_seconds"] > 0
    assert cost(llama).as_dict()["time_seconds"] is None


def test_unknown_sizes_and_values_out_of_range_are_refused(llama: Program) -> None:
    """Wrong if a misspelt size silently left the size of the capture in place."""
    with pytest.raises(UsageError, match=r"no size named 'sequense'(.|\n)*sequence"):
        cost(llama, {"sequense": 4})
    with pytest.raises(UsageError, match="positive integer"):
        cost(llama, {"sequence": 0})
    with pytest.raises(UsageError, match="positive integer"):
        peak_memory(llama, {"sequence": 2.5})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="no device"):
        cost(llama, device="h1000")


def test_parameters_are_those_that_run() -> None:
    """Wrong if buffers counted as parameters, or a rank that keeps half of a matrix paid for all of it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = capture(model, torch.randn(2, 3, 8, 8), dynamic=None)
    found = count_weights(program)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes == found.parameter_bytes + 4 * 2 * 4

    linear = capture(nn.Linear(8, 6, bias=False), torch.randn(2, 8), dynamic=None)
    weight = linear.weight_nodes[0]
    call = next(n for n in linear.nodes if operator_name(n.target) == "aten.linear")
    with linear.edit.before(call):
        half = linear.edit.call(torch.ops.aten.slice.Tensor, weight, 0, 0, 3)
    call.replace_input_with(weight, half)
    linear.changed()
    assert count_weights(linear).parameters == 3 * 8


class _Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix) + nn.functional.linear(x, self.matrix.t())


def test_a_weight_read_both_ways_round_is_one_weight_and_two_reads() -> None:
    """Wrong if a transpose counted as more parameters, or reading twice as reading once."""
    found = cost(capture(_Both(), torch.randn(2, 8), dynamic=None))
    assert found.parameters == 64
    assert found.weight_bytes == 2 * 4 * 64


# -- memory -------------------------------------------------------------------------------------------


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 100, bias=False)
        self.down = nn.Linear(100, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.up(x)
        flipped = wide.transpose(1, 2)
        narrow = self.down(torch.relu(wide))
        return narrow + flipped[:, :4, :].transpose(1, 2)


def test_peak_memory_of_a_chain_is_what_one_finds_by_hand() -> None:
    """Wrong if a view did not keep its storage, an input were freed, or weights were counted."""
    program = capture(_Chain(), torch.randn(2, 3, 4))
    sizes = dict(zip(program.signature.sizes, (2, 3), strict=True))
    peak = peak_memory(program, sizes)
    second = [n for n in program.nodes if operator_name(n.target) == "aten.linear"][1]
    # in the second linear: the input, the first linear's result that a view still shows, ReLU's, and its own
    assert peak.node == second.name
    assert peak.bytes == 4 * (24 + 600 + 600 + 24)
    assert sorted(peak.alive.values()) == [4 * 24, 4 * 24, 4 * 600, 4 * 600]
    assert cost(program, sizes).peak_memory == peak.bytes


class _Apart(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.sin(torch.cos(x)))


def test_a_value_nobody_reads_again_leaves_memory() -> None:
    """Wrong if peak memory grew with the length of a chain."""
    program = capture(_Apart(), torch.randn(5, 5), dynamic=None)
    assert peak_memory(program).bytes == 4 * 25 * 3


class _ReadLate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.exp(x)
        early = torch.sin(kept.transpose(0, 1))
        return torch.cos(torch.cos(early)) + kept


def test_a_value_outlives_its_views() -> None:
    """Wrong if the last use of a view freed what is read after it."""
    program = capture(_ReadLate(), torch.randn(5, 5), dynamic=None)
    assert peak_memory(program).bytes == 4 * 25 * 4


def long_program(layers: int) -> Program:
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8))
    last = program.output_node.args[0][0]  # type: ignore[index]
    weight = program.weight_nodes[0]
    with program.edit.after(last):
        for _ in range(layers):
            last = program.edit.call(torch.ops.aten.relu.default, last)
            last = program.edit.call(torch.ops.aten.linear.default, last, weight)
    program.edit.set_outputs([last])
    program.changed()
    program.anatomy  # noqa: B018  measured apart
    return program


def test_liveness_and_cost_are_linear_on_a_long_program() -> None:
    """Wrong if something walked the graph once per node; a 70B model has thousands."""
    spent = []
    for layers in (500, 2000):
        program = long_program(layers)
        with calls() as counted:
            found = cost(program, device="h100")
        rows = next(iter(found.sizes.values()))
        assert found.flops == (layers + 1) * (2 * 8 * 8 + 8) * rows
        assert len(survey(program).calls) < 5
        spent.append(counted.count)
    assert spent[1] < 4.5 * spent[0]
