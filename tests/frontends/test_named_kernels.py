"""Functions that transformers marks by the names of kernels: found, equal to ours, and captured for any length."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.frontends.named_kernels import _KERNELS, kernel_of, named_kernels
from graphopt.ir.program import Program
from graphopt.ir.schema import is_operator

# a module of transformers in which each is, and the function there
MARKED = {
    "causal_conv1d_fn": ("mamba2", "causal_conv1d_fn"),
    "mamba_chunk_scan_combined": ("mamba2", "mamba2_chunk_scan"),
    "selective_scan_fn": ("mamba", "mamba_selective_scan"),
    "chunk_gated_delta_rule": ("qwen3_next", "torch_chunk_gated_delta_rule"),
    "chunk_kda": ("kimi_linear", "chunk_kimi_delta_attention"),
}


def module_of(model: str) -> Any:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def both(kernel: str, **given_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what our form and the library's own function give; ours must be what ran."""
    model, name = MARKED[kernel]
    module = module_of(model)
    own = getattr(module, name)
    expected = own(**given_)
    with named_kernels():
        assert getattr(module, name) is not own
        found = getattr(module, name)(**given_)
    assert getattr(module, name) is own, "the library's function was not put back"
    return tuple(x[0] if isinstance(x, tuple) else x for x in (found, expected))  # type: ignore[return-value]


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    same = found.shape == expected.shape and found.dtype == expected.dtype
    # the library's functions compute in float32, whatever they are given
    return same and bool((found - expected).abs().max() <= 3e-5 * expected.abs().max().clamp(min=1.0))


def test_every_kernel_is_still_marked() -> None:
    """Where a release of transformers marks them in another way, nothing would be captured as one operator."""
    assert set(MARKED) == set(_KERNELS)
    for kernel, (model, name) in MARKED.items():
        found = [n for n, value in vars(module_of(model)).items() if kernel_of(value) == kernel]
        assert found == [name], f"{kernel} is not marked in {model} any more"


def test_arguments_are_those_that_ours_know() -> None:
    """An argument that a release adds would be swallowed by ``**others``."""
    known = {"chunk_size", "kwargs", "use_mambapy", "use_associative_scan"}
    for kernel, (model, name) in MARKED.items():
        theirs = set(inspect.signature(getattr(module_of(model), name)).parameters)
        ours = set(inspect.signature(_KERNELS[kernel]).parameters)
        assert theirs - ours <= known, f"{kernel} takes {theirs - ours - known} too"


def test_nothing_else_is_marked() -> None:
    assert kernel_of(test_nothing_else_is_marked) is None
    assert kernel_of(torch.nn.functional.silu) is None
    assert kernel_of(len) is None

    def with_a_number(func_name: Any = None) -> Any:
        func_name = 3
        return lambda: func_name

    assert kernel_of(with_a_number()) is None


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


SIZES = {
    "tokens": st.sampled_from([1, 5, 16, 33, 64, 65, 130]),
    "seed": st.integers(0, 1 << 20),
}


@settings(max_examples=examples(20))
@given(**SIZES, biased=st.booleans(), activation=st.sampled_from([None, "silu"]))
def test_short_convolution(tokens: int, seed: int, biased: bool, activation: str | None) -> None:
    draw = torch.Generator().manual_seed(seed)
    found, expected = both(
        "causal_conv1d_fn",
        hidden_states=normal(draw, 2, 6, tokens),
        weight=normal(draw, 6, 4),
        bias=normal(draw, 6) if biased else None,
        activation=activation,
    )
    assert alike(found, expected)


@settings(max_examples=examples(20))
@given(
    **SIZES,
    chunk_size=st.sampled_from([8, 64]),
    groups=st.sampled_from([1, 2, 4]),
    limit=st.sampled_from([(0.0, float("inf")), (0.1, 0.5)]),
    softplus=st.booleans(),
    biased=st.booleans(),
    skip=st.booleans(),
)
def test_scan_of_mamba_2(
    tokens: int, seed: int, chunk_size: int, groups: int, limit: tuple[float, float], softplus: bool,
    biased: bool, skip: bool,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    found, expected = both(
        "mamba_chunk_scan_combined",
        hidden_states=normal(draw, 2, tokens, 4, 3),
        dt=normal(draw, 2, tokens, 4),
        A=-normal(draw, 4).abs(),
        B=normal(draw, 2, tokens, groups, 5),
        C=normal(draw, 2, tokens, groups, 5),
        chunk_size=chunk_size,
        D=normal(draw, 4) if skip else None,
        dt_bias=normal(draw, 4) if biased else None,
        dt_softplus=softplus,
        dt_limit=limit,
    )
    assert alike(found, expected)


@settings(max_examples=examples(15))
@given(**SIZES, gated=st.booleans(), biased=st.booleans(), skip=st.booleans())
def test_scan_of_mamba(tokens: int, seed: int, gated: bool, biased: bool, skip: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    found, expected = both(
        "selective_scan_fn",
        hidden_states=normal(draw, 2, 6, tokens),
        dt=normal(draw, 2, 6, tokens),
        A=-normal(draw, 6, 4).abs(),
        B=normal(draw, 2, 4, tokens),
        C=normal(draw, 2, 4, tokens),
        D=normal(draw, 6) if skip else None,
        z=normal(draw, 2, 6, tokens) if gated else None,
        delta_bias=normal(draw, 6) if biased else None,
        delta_softplus=True,
    )
    assert alike(found, expected)


@settings(max_examples=examples(15))
@given(**SIZES, by_channel=st.booleans(), normalised=st.booleans(), heads=st.sampled_from([(2, 2), (2, 4)]))
def test_delta_rules(
    tokens: int, seed: int, by_channel: bool, normalised: bool, heads: tuple[int, int]
) -> None:
    draw = torch.Generator().manual_seed(seed)
    key_heads, value_heads = (heads[1], heads[1]) if by_channel else heads
    q, k = (normal(draw, 2, tokens, key_heads, 4) for _ in range(2))
    if not normalised:
        k = torch.nn.functional.normalize(k, dim=-1)
    sizes = (2, tokens, value_heads)
    found, expected = both(
        "chunk_kda" if by_channel else "chunk_gated_delta_rule",
        query=q,
        key=k,
        value=normal(draw, *sizes, 3),
        g=-normal(draw, *sizes, *[4] * by_channel).abs(),
        beta=torch.rand(sizes, generator=draw),
        use_qk_l2norm_in_kernel=normalised,
    )
    assert alike(found, expected)


@pytest.mark.parametrize(
    ("kernel", "option"),
    [
        ("mamba_chunk_scan_combined", {"return_final_states": True}),
        ("selective_scan_fn", {"return_last_state": True}),
    ],
)
def test_what_ours_do_not_return_is_left_to_the_library(kernel: str, option: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    model, name = MARKED[kernel]
    rows = (
        {"hidden_states": normal(draw, 1, 5, 2, 3), "dt": normal(draw, 1, 5, 2), "A": -normal(draw, 2).abs(),
         "B": normal(draw, 1, 5, 1, 4), "C": normal(draw, 1, 5, 1, 4), "chunk_size": 4}
        if model == "mamba2"
        else {"hidden_states": normal(draw, 1, 6, 5), "dt": normal(draw, 1, 6, 5), "A": -normal(draw, 6, 4).abs(),
              "B": normal(draw, 1, 4, 5), "C": normal(draw, 1, 4, 5)}
    )  # fmt: skip
    expected = getattr(module_of(model), name)(**rows, **option)
    with named_kernels():
        found = getattr(module_of(model), name)(**rows, **option)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", list(zoo.HYBRIDS))
def test_captured_for_any_length(name: str, captured: Callable[[str], Program]) -> None:
    """One operator a mixer, right beyond the chunks of the library, and blocks that are called what they are."""
    program, model = captured(name), zoo.make(name)
    assert not isinstance(program.signature.inputs["input_ids"].shape[1], int)
    mixers = zoo.HYBRIDS[name].blocks["mixer"]
    operators = [n for n in program.nodes if is_operator(n, "graphopt.causal_conv1d")]
    assert len(operators) == mixers, "convolutions of queries, keys and values are joined by the library"
    scans = [n for n in program.nodes if is_operator(n, "graphopt.linear_attention")]
    assert len(scans) == (0 if name == "lfm2" else mixers)
    for tokens in (1, 65, 130):
        if tokens > 64 and name in ("falcon_h1", "nemotron_h", "lfm2", "qwen3_next", "kimi_linear"):
            model.config.max_position_embeddings = 256
        ids = torch.randint(3, 100, (2, tokens))
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.allclose(program(input_ids=ids)["logits"], expected, atol=2e-4), tokens
    kinds = [block.kind for block in program.anatomy.blocks]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == zoo.HYBRIDS[name].blocks


@settings(max_examples=examples(12))
@given(seed=st.integers(0, 1 << 16), tokens=st.integers(2, 70), resets=st.integers(0, 3))
def test_a_loop_without_a_kernels_name(seed: int, tokens: int, resets: int) -> None:
    """RG-LRU is written as a loop over tokens; ours starts again wherever it does."""
    owner = module_of("recurrent_gemma").RecurrentGemmaRglru
    loop = owner._rnn_scan
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 5, generator=generator)
    gate = torch.rand(2, tokens, 5, generator=generator)
    reset = torch.zeros(2, tokens, 1, dtype=torch.bool)
    reset[:, 0] = True
    reset[:, torch.randint(0, tokens, (resets,), generator=generator)] = True
    expected, state = loop(None, x, gate, reset, None)
    with named_kernels():
        assert owner._rnn_scan is not loop
        found, after = owner._rnn_scan(None, x, gate, reset, None)
        again, _ = owner._rnn_scan(None, x, gate, reset, torch.randn(2, 5))
    assert owner._rnn_scan is loop, "the library's method was not put back"
    assert alike(found, expected) and alike(after, state)
    assert torch.equal(found, again), "what an earlier call left was read"
