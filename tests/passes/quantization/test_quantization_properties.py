"""Forms for few bits keep the function; what is stored in few bits is off by half a step, and nothing else is changed."""

from __future__ import annotations

import torch
from amounts import examples
from builders import Shape, tokens
from drawn_decoders import SHAPES, SIZES, Decoder, alike, decoders
from hypothesis import given, settings
from hypothesis import strategies as st
from preferring_routers import with_preferences
from torch import fx

import graphopt
from graphopt.backends.onnx.quantized import without_rounding
from graphopt.ir.program import Program
from graphopt.ir.quantised.stored import is_quantised
from graphopt.ir.running.execute import interpret
from graphopt.ir.schema import arguments, is_operator
from graphopt.passes.quantization.few_bits import nearest
from graphopt.passes.quantization.values import constant_value

SEEDS = st.integers(0, 1 << 20)
NESTED = "split-ffn{widths=[1/2 1] score=none}"


@settings(max_examples=examples(12), deadline=None)
@given(
    decoders((*SHAPES[:3], Shape(causal=False, norm="layer", bias=True))),
    st.sampled_from(["", NESTED]), st.floats(0, 1), st.floats(-30000, -2000), st.booleans(), SEEDS,
)  # fmt: skip
def test_fitted_forms_are_the_function(
    drawn: Decoder, before: str, delta: float, hidden: float, padded: bool, seed: int
) -> None:
    """Wrong if a mask hid too little or too much, a bias were added elsewhere, or a width were another."""
    program = drawn.program
    if before:
        program = with_preferences(graphopt.optimize(program, before, verify="off"), seed)
    done = graphopt.optimize(program, f"fit-target{{hidden={hidden}}}", verify="off")
    dials = dict.fromkeys(program.dials, delta)
    for size in SIZES:
        given_ = {**tokens(*size, seed=seed, padded=padded), **dials}
        assert alike(done(**given_)["logits"], program(**given_)["logits"])
    refused = {r.block for r in done.report.passes[-1].refused}
    for node in done.nodes:
        found = arguments(node) if is_operator(node, "graphopt.attention", "aten.linear") else {}
        assert not is_operator(node, "aten.silu", "graphopt.rotary")
        assert not is_operator(node, "graphopt.nested_ffn") or node.name in refused
        assert not found.get("causal"), "a mask is still made where scores are"
        assert found.get("key_mask") is None
        assert is_operator(node, "graphopt.attention") or found.get("bias") is None


@settings(max_examples=examples(12), deadline=None)
@given(
    decoders(SHAPES[:3]), st.sampled_from([8, 4]), st.sampled_from([16, 8]), st.sampled_from([0, 2, 4]),
    st.sampled_from(["nearest", "auto"]), SEEDS,
)  # fmt: skip
def test_what_few_bits_lose(
    drawn: Decoder, weights: int, activations: int, block: int, rounding: str, seed: int
) -> None:
    """Wrong if a step were another channel's, a range left out what calibration met, or something else were changed."""
    # a number of its own is what quantize leaves
    fitted = graphopt.optimize(drawn.program, "fit-target{hidden=-100}", verify="off")
    data = [tokens(2, 8, seed=seed + n) for n in range(4)]
    text = f"weights={weights} activations={activations} block={block} rounding={rounding}"
    done = graphopt.optimize(fitted, f"quantize{{{text}}}", data=data, verify="off")
    for size in SIZES:
        given_ = tokens(*size, seed=seed)
        assert torch.equal(without_rounding(done)(**given_)["logits"], fitted(**given_)["logits"])
    _matrices(done, weights, block, rounding == "nearest" or weights == 8)
    _activations(done, fitted, data[:2], activations)


@settings(max_examples=examples(12), deadline=None)
@given(
    decoders(), st.sampled_from([8, 4, 2]), st.sampled_from([0, 2, 4]), st.booleans(), st.sampled_from([0, 8]),
    st.sampled_from(["rtn", "gptq"]), SEEDS,
)  # fmt: skip
def test_weights_alone_in_few_bits(
    drawn: Decoder, bits: int, group: int, symmetric: bool, head: int, method: str, seed: int
) -> None:
    """Wrong if another matrix's codes were read, codes changed once kept or made plain, or anything but matrices changed."""
    program, data = drawn.program, [tokens(2, 8, seed=seed + n) for n in range(4)]
    text = f"bits={bits} group={group} symmetric={str(symmetric).lower()} head={head} method={method}"
    done = graphopt.optimize(program, f"quantize-weights{{{text}}}", data=data, verify="off")
    sites = {s["block"]: s for s in done.history[-1]["plan"]["sites"]}
    assert sites
    pairs = zip(_linears(program), _linears(done), strict=True)
    for before, after in pairs:
        old, new = (constant_value(p, arguments(n)["weight"]) for p, n in ((program, before), (done, after)))
        site = sites.get(arguments(before)["weight"].name)
        if site is None:
            assert torch.equal(old, new)
        elif method == "rtn":
            assert torch.equal(nearest(old, site["bits"], site["group"], symmetric).dequantise(), new)
        else:
            assert (old - new).norm() <= (1.0 if site["bits"] < 8 else 0.1) * old.norm()
    plain = graphopt.optimize(done, "dequantize-weights", verify="off")
    assert any(is_quantised(w.source) for w in done.weights.values())
    assert not any(is_quantised(w.source) for w in plain.weights.values())
    for size in SIZES:
        given_ = tokens(*size, seed=seed)
        assert torch.equal(plain(**given_)["logits"], done(**given_)["logits"])


def _linears(program: Program) -> list[fx.Node]:
    return [n for n in program.nodes if is_operator(n, "aten.linear")]


def _matrices(done: Program, bits: int, block: int, nearest: bool) -> None:
    """Each entry is within half a step of what it was, a step being the row's largest value over the largest integer."""
    top = 127 if bits == 8 else 7
    rounded = [n for n in done.nodes if is_operator(n, "graphopt.fake_quantize_channels")]
    linears = [n for n in done.nodes if is_operator(n, "aten.linear")]
    others = {arguments(n)["weight"] for n in linears} - set(rounded)
    # a table that tokens are looked up in is stored as values are, tied or not
    assert all(done.weights[n.args[0].name].name == "table" for n in others), "a matrix is not in few bits"
    found = interpret(done, done.bind((), tokens(2, 6)), record=[*rounded, *(n.args[0] for n in rounded)])
    for node in rounded:
        matrix, stored = found[node.args[0].name], found[node.name]
        groups = block if block and matrix.shape[1] % block == 0 else matrix.shape[1]
        steps = matrix.unflatten(1, (-1, groups)).abs().amax(2) / top
        steps = steps.repeat_interleave(groups, 1)
        whole = stored / steps
        assert bool(((whole - whole.round()).abs() < 1e-4).all()), "not a whole number of steps"
        assert float(whole.abs().max()) <= top + 1e-4
        if nearest:
            assert bool(((stored - matrix).abs() <= steps * 0.5001).all())


def _activations(done: Program, fitted: Program, data: list[dict[str, torch.Tensor]], bits: int) -> None:
    """Each value is within half a step of what it was, or cut at the ends that calibration met."""
    steps = (1 << bits) - 1
    rounded = [n for n in done.nodes if is_operator(n, "graphopt.fake_quantize")]
    computed = {n.name for n in fitted.nodes if n.op == "call_function"}
    sources = [n.args[0].name for n in rounded]
    missing = [
        n for n in fitted.nodes
        if is_operator(n, "aten.linear", "graphopt.attention", "aten.mul") and n.name not in sources
        and n.meta["val"].is_floating_point() and n.meta["val"].dim() > 2
    ]  # fmt: skip
    assert not missing, "a value is not in few bits"
    ends: dict[str, tuple[float, float]] = {}
    for batch in data:
        wanted = [n for n in fitted.nodes if n.name in sources and n.name in computed]
        for name, value in interpret(fitted, fitted.bind((), batch), record=wanted).items():
            if name in sources and isinstance(value, torch.Tensor):
                low, high = ends.get(name, (0.0, 0.0))
                ends[name] = min(low, float(value.min())), max(high, float(value.max()))
    found = interpret(done, done.bind((), data[0]), record=[*rounded, *(n.args[0] for n in rounded)])
    checked = 0
    for node in rounded:
        name = node.args[0].name
        if name not in ends or not is_operator(node.args[0], "aten.linear", "graphopt.attention", "aten.mul"):
            continue  # what is only moved has the range of what it was, and masks one of their own
        low, high = ends[name]
        step = (high - low) / steps
        value, stored = found[name], found[node.name]
        beyond = (low - value).clamp(min=0) + (value - high).clamp(min=0)
        assert bool(((stored - value).abs() <= step * 1.01 + beyond).all()), name
        assert float(arguments(node)["scale"]) < step * 1.001 + 1e-12, (
            "steps are wider than calibration needs"
        )
        checked += 1
    assert checked > 4
