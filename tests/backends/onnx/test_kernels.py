"""Operators that ONNX Runtime has kernels for: what takes their place computes the same, the rest says why it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.backends.onnx import kernels
from graphopt.backends.onnx.few_bits import LOOKUP, PRODUCT
from graphopt.backends.onnx.kernels import ATTENTION, ROWS, SKIP_NORM, KernelUse
from graphopt.backends.onnx.runtime_operators import NORM
from graphopt.cli.running import run as command
from graphopt.ir.errors import LoweringError
from graphopt.ir.facts import KVCache
from graphopt.ir.program import Program
from graphopt.ir.quantised.stored import packed
from graphopt.passes.quantization.few_bits import nearest

graph = torch.ops.graphopt
VOCABULARY = 19


@dataclass(frozen=True)
class Kind:
    """One layer of attention over a cache: its sizes, its mask, how queries and keys are rotated."""

    heads: int = 4
    groups: int = 2
    size: int = 16
    window: int | None = None
    softcap: float | None = None
    rotary: str = "half"  # half, interleaved, none, partial, split, lengths, apart, before
    turned: int = 16
    bias: str = ""  # "", row, query
    sinks: bool = False
    tree: bool = False
    read_twice: bool = False
    tied: bool = False
    capacity: int | None = None
    dtype: torch.dtype = torch.float32


class Cached(nn.Module):
    """Token numbers, positions and a pair of caches in; logits and the caches out."""

    def __init__(self, kind: Kind):
        super().__init__()
        self.kind, width = kind, kind.heads * kind.size
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(kind.dtype))

        self.table, self.head = make(VOCABULARY, width), make(VOCABULARY, width)
        self.q, self.out = make(width, width), make(width, width)
        self.k, self.v = make(kind.groups * kind.size, width), make(kind.groups * kind.size, width)
        self.sink, self.slopes = make(kind.heads), make(kind.heads)
        self.first, self.last = make(width), make(width)

    def turn(self, x: torch.Tensor, positions: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        kind = self.kind
        if kind.rotary == "none":
            return x
        width = kind.turned if kind.rotary in ("partial", "split") else kind.size
        numbers = positions.to(torch.float32)
        if kind.rotary == "lengths":
            # like the long rotations of some models: other angles once a row is long
            numbers = torch.where(numbers.amax(-1, keepdim=True) > 6, numbers * 0.5, numbers)
        angles = numbers[..., None] * 20.0 ** (-torch.arange(0, width, 2) / width) * scale
        both = (
            angles.repeat_interleave(2, -1)
            if kind.rotary == "interleaved"
            else torch.cat((angles, angles), -1)
        )
        if kind.rotary == "before":
            x = x.transpose(1, 2)
        axis = 2 if kind.rotary == "before" else 1
        cos, sin = both.cos().unsqueeze(axis).to(x.dtype), both.sin().unsqueeze(axis).to(x.dtype)
        if kind.rotary == "partial":
            return torch.cat((graph.rotary(x[..., :width], cos, sin), x[..., width:]), -1)
        if kind.rotary == "split":
            first, rest = x.split([width, kind.size - width], -1)
            return torch.cat((graph.rotary(first, cos, sin), rest), -1)
        x = graph.rotary(x, cos, sin, interleaved=kind.rotary == "interleaved")
        return x.transpose(1, 2) if kind.rotary == "before" else x

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, key_cache_0: torch.Tensor,
        value_cache_0: torch.Tensor, cache_slots: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        kind, (batch, tokens) = self.kind, input_ids.shape
        x = F.embedding(input_ids, self.table)
        h = graph.rms_norm(x, self.first, 1e-5)
        q, k, v = (
            F.linear(h, weight).view(batch, tokens, -1, kind.size).transpose(1, 2)
            for weight in (self.q, self.k, self.v)
        )
        q = self.turn(q, position_ids, 0.5 if kind.rotary == "apart" else 1.0)
        k = self.turn(k, position_ids)
        slots = position_ids if cache_slots is None else cache_slots
        keys = graph.cache_store(key_cache_0, k, slots)
        values = graph.cache_store(value_cache_0, v, slots)
        visible = graph.cache_visible(position_ids, slots, key_cache_0, None, window=kind.window)
        bias = None
        if kind.bias:
            distance = torch.arange(key_cache_0.shape[2])[None, None, None].to(x.dtype)
            if kind.bias == "query":
                distance = distance - position_ids[:, None, :, None]
            bias = distance.to(x.dtype) * self.slopes[None, :, None, None]
        options: dict[str, Any] = {"scale": kind.size**-0.5, "softcap": kind.softcap}
        sinks = self.sink if kind.sinks else None
        attended = graph.attention(q, keys, values, None, bias, sinks, None, visible, **options)
        if kind.read_twice:
            attended = attended + graph.attention(
                -q, keys, values, None, bias, sinks, None, visible, **options
            )
        x = x + F.linear(attended.transpose(1, 2).reshape(batch, tokens, -1), self.out)
        head = self.table if kind.tied else self.head
        logits = F.linear(graph.rms_norm(x, self.last, 1e-5), head)
        return {"logits": logits, "next_key_cache_0": keys, "next_value_cache_0": values}


def cached(kind: Kind) -> Program:
    """Return the program, with the fact that insert-cache would have added."""
    generator = torch.Generator().manual_seed(1)
    slots = kind.capacity or 12
    held = {
        f"{name}_cache_0": torch.randn(2, kind.groups, slots, kind.size, generator=generator).to(kind.dtype)
        for name in ("key", "value")
    }
    ids = torch.randint(0, VOCABULARY, (2, 5), generator=generator)
    positions = torch.arange(5).expand(2, -1).contiguous()
    inputs = {"input_ids": ids, "position_ids": positions, **held}
    if kind.tree:
        inputs["cache_slots"] = positions
    slot = {} if kind.capacity else {2: "capacity"}
    rows = {name: {0: "batch", **slot} if name in held else {0: "batch", 1: "sequence"} for name in inputs}
    program = graphopt.capture(Cached(kind), inputs, dynamic=rows, compare=False)
    program.facts.add(
        KVCache(
            capacity=program.signature.inputs["key_cache_0"].shape[2], layers=1, tree=kind.tree, tokens="input_ids", positions="position_ids",
            limit=None, logits="logits",
        )
    )  # fmt: skip
    return program


def lowered(kind: Kind, path: Path, **options: Any) -> tuple[KernelUse, dict[str, int]]:
    """Write the file, which compares it with the program at several sizes, and return what it holds."""
    report = cached(kind).lower("onnx", path, operators="runtime", **options)
    assert report.kernels is not None
    assert max(report.errors.values()) < (2e-2 if kind.dtype is torch.float16 else 1e-5)
    assert set(report.errors) == {"logits", "next_key_cache_0", "next_value_cache_0"}
    return report.kernels, report.nodes


@settings(max_examples=examples(18), deadline=None)
@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)]),
    st.sampled_from([16, 32, 48]),
    st.sampled_from([None, 1, 3, 7, 100]),
    st.sampled_from([None, 0.5, 30.0]),
    st.sampled_from(["half", "interleaved", "none", "partial", "split", "before"]),
    st.sampled_from(["", "row", "query"]),
    st.booleans(),
    st.booleans(),
)
def test_attention_over_caches_is_one_kernel(
    tmp_path_factory: pytest.TempPathFactory, heads: tuple[int, int], size: int, window: int | None,
    softcap: float | None, rotary: str, bias: str, sinks: bool, fixed: bool,
) -> None:  # fmt: skip
    """Prompts, tokens after what caches hold, rows at different positions: all as the program computes them."""
    if rotary in ("partial", "split") and size == 16:
        size = 32
    kind = Kind(*heads, size, window, softcap, rotary, bias=bias, sinks=sinks, capacity=10 if fixed else None)
    use, nodes = lowered(kind, tmp_path_factory.mktemp("kernels") / "model.onnx")
    assert use.used[ATTENTION] == nodes[ATTENTION] == 1
    assert use.rotated == (rotary != "none")
    assert not use.left
    assert not {"Softmax", "Sin", "ScatterElements", "Transpose"} & set(nodes), nodes
    assert (use.used[NORM], use.used[SKIP_NORM]) == (nodes[NORM], nodes[SKIP_NORM]) == (1, 1)
    assert ROWS in use.conditions
    assert (f"at most {2048} positions" in use.conditions) == (rotary != "none" and not fixed)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Kind(size=12, rotary="none"), "no multiple of 8"),
        (Kind(tree=True), "elsewhere than at their positions"),
        (Kind(dtype=torch.float64), "its type is float64"),
    ],
)  # fmt: skip
def test_what_the_kernel_cannot_do_stays_and_is_named(kind: Kind, reason: str, tmp_path: Path) -> None:
    use, nodes = lowered(kind, tmp_path / "model.onnx")
    assert ATTENTION not in nodes and ATTENTION not in use.used
    ((said, count),) = use.left[ATTENTION].items()
    assert reason in said and count == 1
    assert nodes["Softmax"] == 1
    assert ROWS not in use.conditions


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Kind(size=24), "no multiple of 16"),
        (Kind(size=32, rotary="partial", turned=8), "no multiple of 16"),
        (Kind(rotary="lengths"), "depends on other tokens' positions"),
        (Kind(rotary="apart"), "rotated differently"),
    ],
)  # fmt: skip
def test_a_rotation_that_the_attention_cannot_do_is_a_kernel_before_it(
    kind: Kind, reason: str, tmp_path: Path
) -> None:
    use, nodes = lowered(kind, tmp_path / "model.onnx")
    assert nodes[ATTENTION] == 1 and not use.rotated
    ((said, count),) = use.left[f"rotation in {ATTENTION}"].items()
    assert reason in said and count == 1
    assert nodes["RotaryEmbedding"] == 2 and "Neg" not in nodes


def test_caches_that_two_attentions_read_are_stored_by_the_first(tmp_path: Path) -> None:
    use, nodes = lowered(Kind(read_twice=True), tmp_path / "model.onnx")
    assert nodes[ATTENTION] == 1 and nodes["Softmax"] == 1
    # what is left writes positions, for the second attention's mask
    assert nodes["ScatterElements"] == 1
    assert use.left[ATTENTION] == {"another attention stores its keys and values": 1}


def test_half_precision_stays_half(tmp_path: Path) -> None:
    use, _ = lowered(Kind(dtype=torch.float16), tmp_path / "model.onnx")
    assert use.used == {ATTENTION: 1, NORM: 1, SKIP_NORM: 1}
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert {t.data_type for t in model.graph.initializer if len(t.dims) == 2} == {onnx.TensorProto.FLOAT16}


def test_what_cannot_use_them_is_refused(tmp_path: Path) -> None:
    program = cached(Kind())
    with pytest.raises(LoweringError, match="there are no operators 'fast'"):
        program.lower("onnx", tmp_path / "model.onnx", operators="fast")
    with pytest.raises(LoweringError, match="does not have ONNX Runtime's own operators"):
        program.lower("onnx", tmp_path / "out", operators="runtime", target="qnn-htp-v75")
    assert not list(tmp_path.iterdir())


def test_other_values_in_place_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong table of rotations is an error, and nothing is written."""
    honest = kernels.half_table
    monkeypatch.setattr(kernels, "half_table", lambda *a: honest(*a).flip(0))
    with pytest.raises(LoweringError, match="what ONNX Runtime computes differs"):
        cached(Kind()).lower("onnx", tmp_path / "model.onnx", operators="runtime")
    assert not list(tmp_path.iterdir())


installed = pytest.mark.skipif(
    find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed"
)


@installed
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom"])
def test_decoders_of_the_zoo_generate_with_kernels(
    name: str, captured: Callable[[str], Program], tmp_path: Path, capsys: Any
) -> None:
    """Windows, soft caps, sinks and biases, in onnxruntime-genai; the command line says what was used."""
    done = graphopt.optimize(captured(name), "insert-cache")
    saved = str(done.save(tmp_path / "saved"))
    assert command(["lower", saved, "--to", "genai", "--check", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{ATTENTION} 2" in said and "each the program's most likely one" in said
    nodes = [n.op_type for n in onnx.load(str(tmp_path / "out" / "model.onnx")).graph.node]
    assert nodes.count(ATTENTION) == 2 and "ScatterElements" not in nodes


def test_the_command_line_chooses_operators(tmp_path: Path, capsys: Any) -> None:
    saved = str(cached(Kind()).save(tmp_path / "saved"))
    place = str(tmp_path / "model.onnx")
    assert command(["lower", saved, "--to", "onnx", "--operators", "runtime", "-o", place]) == 0
    assert "one row where several tokens follow earlier ones" in capsys.readouterr().out
    assert command(["lower", saved, "--to", "onnx", "--operators", "fast", "-o", place, "--force"]) == 2
    assert (
        command(["lower", saved, "--to", "triton", "--operators", "runtime", "-o", str(tmp_path / "t")]) == 2
    )
    assert command(["lower", saved, "--to", "onnx", "-o", place, "--force"]) == 0
    assert "GroupQueryAttention" not in [n.op_type for n in onnx.load(place).graph.node]


def quantised(program: Program, name: str, bits: int, group: int, symmetric: bool = True) -> None:
    """Store a weight in few bits."""
    node = next(n for n, w in program.weights.items() if w.name == name)
    weight = program.weights[node]
    found = nearest(weight.source.load(), bits, group, symmetric)
    program.weights[node] = weight.with_source(packed(found))
    program.changed()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 32), (8, 32), (8, 64)])
def test_weights_of_few_bits_stay_so(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    """Queries, keys and values in one product, the head in another; and what rounding their inputs changes is told."""
    program = cached(Kind(rotary="none"))
    for name in ("q", "k", "v", "out", "head"):
        quantised(program, name, bits, group, symmetric)
    exact = program.lower("onnx", tmp_path / "exact.onnx", operators="runtime", float_products=True)
    assert exact.kernels is not None and exact.kernels.rounding is None
    assert exact.nodes[PRODUCT] == exact.kernels.used[PRODUCT] == 3
    assert max(exact.errors.values()) < 1e-5
    rounded = program.lower("onnx", tmp_path / "rounded.onnx", operators="runtime")
    assert rounded.kernels is not None and rounded.kernels.rounding is not None
    assert 1e-5 < rounded.kernels.rounding < 5e-2
    levels = {
        name: {
            a.i for n in onnx.load(str(tmp_path / f"{name}.onnx")).graph.node for a in n.attribute
            if a.name == "accuracy_level"
        }
        for name in ("exact", "rounded")
    }  # fmt: skip
    assert levels == {"exact": {1}, "rounded": {4}}
    plain = program.lower("onnx", tmp_path / "plain.onnx")
    assert rounded.initialiser_bytes < 0.55 * plain.initialiser_bytes
    assert "MatMulNBits" not in plain.nodes


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    """Rows of words for the embedding, the same words for the head."""
    program = cached(Kind(tied=True))
    quantised(program, "table", 4, 32)
    report = program.lower("onnx", tmp_path / "model.onnx", operators="runtime", float_products=True)
    assert report.nodes[LOOKUP] == report.nodes[PRODUCT] == 1
    words = [
        t
        for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer
        if t.data_type == onnx.TensorProto.UINT8
    ]
    assert len(words) == 1 and list(words[0].dims) == [VOCABULARY, 2, 16]


def test_mixed_bits_are_not_joined_and_other_codes_stay_floats(tmp_path: Path) -> None:
    program = cached(Kind())
    quantised(program, "q", 8, 32)
    for name in ("k", "v"):
        quantised(program, name, 4, 32)
    quantised(program, "out", 4, 8)
    report = program.lower("onnx", tmp_path / "model.onnx", operators="runtime")
    assert report.kernels is not None
    assert report.nodes[PRODUCT] == 3
    assert report.kernels.left[PRODUCT] == {"8 columns share a scale, which is no multiple of 16": 1}
