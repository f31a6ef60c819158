"""Short convolutions against a plain loop over tokens and taps: pieces, trees, and what counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.operators import causal_conv1d, causal_conv1d_state


def loop(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return results and the inputs that are remembered, token by token."""
    rows, taps = list(state.unbind(2)), weight.shape[2]
    results = []
    for token in x.unbind(2):
        rows.append(token)
        seen = torch.stack(rows[-taps:], 2)
        results.append((seen * weight[:, 0]).sum(2) + (0 if bias is None else bias))
    kept = rows[len(rows) - (taps - 1) :]
    return (
        torch.stack(results, 2) if results else x,
        torch.stack(kept, 2) if kept else state,
    )


def drawn(
    tokens: int, taps: int, channels: int = 3, seed: int = 0, rows: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs, taps, bias and state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, channels, tokens), (channels, 1, taps), (channels,), (rows, channels, taps - 1))
    x, weight, bias, state = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, weight, bias, state


@settings(max_examples=examples(60))
@given(
    tokens=st.integers(0, 20),
    taps=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    biased=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_pieces_of_any_sizes(tokens: int, taps: int, cuts: list[int], biased: bool, seed: int) -> None:
    """Cut anywhere, also in pieces shorter than what a convolution remembers, or empty."""
    x, weight, bias, state = drawn(tokens, taps, seed=seed)
    given_bias = bias if biased else None
    expected, after = loop(x, weight, given_bias, state)
    assert torch.allclose(causal_conv1d(x, weight, given_bias, state), expected, atol=1e-12)
    padded = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x, (taps - 1, 0)), weight, given_bias, groups=3
    ) if tokens else x  # fmt: skip
    assert torch.allclose(causal_conv1d(x, weight, given_bias), padded, atol=1e-12)
    places = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    found = []
    for first, end in itertools.pairwise(places):
        piece = x[:, :, first:end]
        found.append(causal_conv1d(piece, weight, given_bias, state))
        state = causal_conv1d_state(piece, state, torch.ones(2, end - first, dtype=torch.bool))
    assert torch.allclose(torch.cat(found, 2), expected, atol=1e-12)
    assert torch.equal(state, after)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("counts", [(0, 1), (1, 5), (3, 2), (0, 0)])
def test_rows_that_take_fewer_tokens(counts: tuple[int, int], taps: int) -> None:
    x, weight, _, state = drawn(6, taps)
    found = causal_conv1d_state(x, state, torch.arange(6) < torch.tensor(counts)[:, None])
    for row, count in enumerate(counts):
        part = slice(row, row + 1)
        assert torch.equal(found[part], loop(x[part, :, :count], weight, None, state[part])[1])


@settings(max_examples=examples(40))
@given(nodes=st.integers(0, 14), taps=st.integers(1, 5), seed=st.integers(0, 1 << 20))
def test_a_tree_is_each_of_its_paths_alone(nodes: int, taps: int, seed: int) -> None:
    """Rows with trees of their own, whose nodes read their ancestors and, above the roots, the state."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, state = drawn(nodes, taps, seed=seed)
    mask = torch.zeros(2, nodes, nodes, dtype=torch.bool)
    for row in range(2):
        for node in range(nodes):
            parent = int(torch.randint(-1, node, (), generator=generator)) if node else -1
            if parent >= 0:
                mask[row, node] = mask[row, parent]
            mask[row, node, node] = True
    y = causal_conv1d(x, weight, bias, state, mask)
    assert y.shape == x.shape
    for row in range(2):
        for node in range(nodes):
            path = mask[row, node].nonzero()[:, 0]
            expected, after = loop(x[row : row + 1, :, path], weight, bias, state[row : row + 1])
            assert torch.allclose(y[row, :, node], expected[0, :, -1], atol=1e-12)
            found = causal_conv1d_state(x, state, mask[:, node], mask)
            assert torch.equal(found[row : row + 1], after)


def test_types() -> None:
    """Results have the type of the inputs, and a state keeps its own."""
    x, weight, bias, state = (t.bfloat16() for t in drawn(7, 4))
    for kept in (state, state.float()):
        y = causal_conv1d(x, weight, bias, kept)
        assert y.dtype is torch.bfloat16
        expected, after = loop(x.double(), weight.double(), bias.double(), state.double())
        assert torch.allclose(y.double(), expected, atol=0.1)
        found = causal_conv1d_state(x, kept, torch.ones(2, 7, dtype=torch.bool))
        assert found.dtype is kept.dtype
        assert torch.equal(found.double(), after)
