"""Linear attention against a plain loop over tokens: decays, the delta rule, pieces, trees, and what counts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.operators import linear_attention, linear_attention_state

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130]


@dataclass(frozen=True)
class Operands:
    """What an operator takes, and the state before the first token."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor | None
    state: torch.Tensor

    @property
    def tokens(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    def at(self, index: list[int], row: slice = slice(None)) -> Operands:
        """Return some of the tokens."""
        picked = [None if t is None else t[row][:, :, index] for t in self.tokens]
        return Operands(*picked, self.state[row])


def drawn(
    tokens: int, seed: int = 0, *, by_channel: bool, delta: bool, heads: int = 4, key_heads: int = 4, rows: int = 2,
    keys: int = 3, values: int = 5, decay: float = 1.0, dtype: torch.dtype = torch.float64,
) -> Operands:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = normal(rows, key_heads, tokens, keys), normal(rows, key_heads, tokens, keys)
    if delta:
        # longer keys would let states grow without end
        k = torch.nn.functional.normalize(k, dim=-1)
    g = -decay * torch.rand(rows, heads, tokens, *[keys] * by_channel, generator=generator).double()
    beta = torch.rand(rows, heads, tokens, generator=generator).double() if delta else None
    made = Operands(q, k, normal(rows, heads, tokens, values), g, beta, normal(rows, heads, keys, values))
    return Operands(
        *(None if t is None else t.to(dtype) for t in (*made.tokens, made.state))  # type: ignore[arg-type]
    )


def loop(x: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and the state after the last token, one token after another as the docstring says it."""
    state, group = x.state.double(), x.v.shape[1] // x.k.shape[1]
    q, k = (t.double().repeat_interleave(group, 1) for t in (x.q, x.k))
    results = []
    for t in range(x.v.shape[2]):
        decay = x.g[:, :, t].double().exp()
        state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        value = x.v[:, :, t].double()
        if x.beta is not None:
            found = torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
            value = x.beta[:, :, t, None].double() * (value - found)
        state = state + k[:, :, t, :, None] * value[:, :, None]
        results.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return (torch.stack(results, 2) if results else x.v.double()), state


def close(found: torch.Tensor, expected: torch.Tensor, error: float = 1e-12) -> bool:
    """Tell whether two results are one; a NaN is no result."""
    return found.shape == expected.shape and bool(
        ((found.double() - expected).abs() <= error * expected.abs().max().clamp(min=1.0)).all()
    )


KINDS = pytest.mark.parametrize(
    ("by_channel", "delta"), [(False, False), (False, True), (True, False), (True, True)],
    ids=["by head", "by head, delta", "by channel", "by channel, delta"],
)  # fmt: skip


@KINDS
@pytest.mark.parametrize("tokens", LENGTHS)
def test_any_length_is_the_loop(tokens: int, by_channel: bool, delta: bool) -> None:
    """Lengths around the sizes of chunks, in which what one chunk leaves must reach the next."""
    x = drawn(tokens, by_channel=by_channel, delta=delta, heads=2, key_heads=1, keys=2, values=3)
    expected, after = loop(x)
    assert close(linear_attention(*x.tokens, x.state), expected)
    everything = torch.ones(2, tokens, dtype=torch.bool)
    assert close(linear_attention_state(*x.tokens[1:], x.state, everything), after)
    nothing = replace(x, state=torch.zeros_like(x.state))
    assert close(linear_attention(*x.tokens), loop(nothing)[0])


@KINDS
def test_no_tokens_leave_the_state(by_channel: bool, delta: bool) -> None:
    x = drawn(0, by_channel=by_channel, delta=delta)
    nothing, alone = torch.ones(2, 0, dtype=torch.bool), torch.ones(2, 0, 0, dtype=torch.bool)
    for mask in (None, alone):
        assert linear_attention(*x.tokens, x.state, mask).shape == (2, 4, 0, 5)
        assert torch.equal(linear_attention_state(*x.tokens[1:], x.state, nothing, mask), x.state)


@settings(max_examples=examples(60))
@given(
    tokens=st.integers(1, 70),
    kind=st.tuples(st.booleans(), st.booleans()),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    decay=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    cuts=st.lists(st.integers(0, 70), max_size=4),
    seed=st.integers(0, 1 << 20),
)
def test_pieces_of_any_sizes(
    tokens: int, kind: tuple[bool, bool], heads: tuple[int, int], sizes: tuple[int, int], decay: float,
    cuts: list[int], seed: int,
) -> None:  # fmt: skip
    """A sequence that is cut anywhere, pieces of no tokens among them, with strong decays and with none."""
    x = drawn(
        tokens, seed, by_channel=kind[0], delta=kind[1], heads=heads[0], key_heads=heads[1], keys=sizes[0],
        values=sizes[1], decay=decay, rows=1,
    )  # fmt: skip
    expected, after = loop(x)
    places = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    found, state = [], x.state
    for first, end in itertools.pairwise(places):
        piece = x.at(list(range(first, end)))
        found.append(linear_attention(*piece.tokens, state))
        state = linear_attention_state(*piece.tokens[1:], state, torch.ones(1, end - first, dtype=torch.bool))
    assert close(torch.cat(found, 2), expected)
    assert close(state, after)


@KINDS
@pytest.mark.parametrize("counts", [(0, 3), (20, 7), (65, 66), (70, 0)])
def test_rows_that_take_fewer_tokens(counts: tuple[int, int], by_channel: bool, delta: bool) -> None:
    """What a row does not take must not reach its state, whatever it is."""
    tokens = max(counts)
    x = drawn(tokens, by_channel=by_channel, delta=delta)
    taken = torch.arange(tokens) < torch.tensor(counts)[:, None]
    found = linear_attention_state(*x.tokens[1:], x.state, taken)
    for row, count in enumerate(counts):
        part = slice(row, row + 1)
        assert close(found[part], loop(x.at(list(range(count)), part))[1])


def a_tree(nodes: int, generator: torch.Generator) -> tuple[list[list[int]], torch.Tensor]:
    """Return the path to each node of a random tree (several roots are allowed), and what is on it."""
    paths: list[list[int]] = []
    mask = torch.zeros(nodes, nodes, dtype=torch.bool)
    for node in range(nodes):
        parent = int(torch.randint(-1, node, (), generator=generator)) if node else -1
        paths.append([*(paths[parent] if parent >= 0 else []), node])
        mask[node, paths[node]] = True
    return paths, mask


@settings(max_examples=examples(30))
@given(
    nodes=st.integers(1, 14),
    kind=st.tuples(st.booleans(), st.booleans()),
    grouped=st.booleans(),
    decay=st.sampled_from([0.0, 1.0, 50.0]),
    seed=st.integers(0, 1 << 20),
)
def test_a_tree_is_each_of_its_paths_alone(
    nodes: int, kind: tuple[bool, bool], grouped: bool, decay: float, seed: int
) -> None:
    """Rows with trees of their own; the state may be committed at any node, or before the first."""
    generator = torch.Generator().manual_seed(seed)
    x = drawn(
        nodes, seed, by_channel=kind[0], delta=kind[1], key_heads=2 if grouped else 4, decay=decay, keys=2,
        values=2,
    )  # fmt: skip
    paths, masks = zip(*(a_tree(nodes, generator) for _ in range(2)), strict=True)
    mask = torch.stack(masks)
    y = linear_attention(*x.tokens, x.state, mask)
    for node in range(nodes):
        taken = torch.zeros(2, nodes, dtype=torch.bool)
        alone = []
        for row in range(2):
            taken[row, paths[row][node]] = True
            alone.append(loop(x.at(paths[row][node], slice(row, row + 1))))
        assert close(y[:, :, node], torch.cat([found[:, :, -1] for found, _ in alone]))
        after = linear_attention_state(*x.tokens[1:], x.state, taken, mask)
        assert close(after, torch.cat([state for _, state in alone]))
    untaken = torch.zeros(2, nodes, dtype=torch.bool)
    assert close(linear_attention_state(*x.tokens[1:], x.state, untaken, mask), x.state)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [50.0, 2000.0])
def test_strong_decays_stay_finite(decay: float, dtype: torch.dtype, by_channel: bool, delta: bool) -> None:
    """Sums far below what an exponential can hold, in chunks, trees and states, forward and backward."""
    x = drawn(70, by_channel=by_channel, delta=delta, decay=decay, dtype=dtype)
    error = 1e-5 if dtype is torch.float32 else 1e-12
    expected, after = loop(x)
    mask = torch.ones(70, 70, dtype=torch.bool).tril().expand(2, -1, -1)
    everything = torch.ones(2, 70, dtype=torch.bool)
    for tree in (None, mask):
        # differences of sums as large as these lose bits
        assert close(linear_attention(*x.tokens, x.state, tree), expected, error * decay)
        assert close(linear_attention_state(*x.tokens[1:], x.state, everything, tree), after, error * decay)
    g = x.g.clone().requires_grad_()
    linear_attention(x.q, x.k, x.v, g, x.beta, x.state).sum().backward()
    assert g.grad is not None
    assert bool(g.grad.isfinite().all())


@KINDS
def test_bfloat16(by_channel: bool, delta: bool) -> None:
    """As near as the type lets it be, of the type of the values; a state keeps its own type."""
    x = drawn(20, by_channel=by_channel, delta=delta, dtype=torch.bfloat16)
    expected, after = loop(x)
    everything = torch.ones(2, 20, dtype=torch.bool)
    for state in (x.state, x.state.float()):
        y = linear_attention(*x.tokens, state)
        assert y.dtype is torch.bfloat16
        assert close(y, expected, 0.05)
        found = linear_attention_state(*x.tokens[1:], state, everything)
        assert found.dtype is state.dtype
        assert close(found, after, 0.05)


@pytest.mark.parametrize(
    ("by_channel", "delta", "tree"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_a_graph_for_any_length_computes_the_same(by_channel: bool, delta: bool, tree: bool) -> None:
    """Exported with a length that varies, where no loop over chunks can be written."""

    class Both(torch.nn.Module):
        def forward(
            self, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, taken: Any, mask: Any
        ) -> Any:
            y = torch.ops.graphopt.linear_attention(q, k, v, g, beta, state, mask)
            after = torch.ops.graphopt.linear_attention_state(k, v, g, beta, state, taken, mask)
            return y, after

    def given_(tokens: int) -> tuple[Any, ...]:
        x = drawn(tokens, by_channel=by_channel, delta=delta, key_heads=2)
        mask = torch.ones(2, tokens, tokens, dtype=torch.bool).tril() if tree else None
        return (*x.tokens, x.state, torch.arange(tokens) < torch.tensor([tokens, tokens // 2])[:, None], mask)

    inputs, length = given_(9), torch.export.Dim("length", min=2)
    dynamic = tuple(
        None if t is None else {1: length, **({2: length} if t.dim() == 3 else {})} if t.dtype is torch.bool
        else {} if t is inputs[5] else {2: length}
        for t in inputs
    )  # fmt: skip
    exported = torch.export.export(Both(), inputs, dynamic_shapes=dynamic).run_decompositions({})
    for tokens in (2, 17, 70):
        expected = Both()(*given_(tokens))
        for found, wanted in zip(exported.module()(*given_(tokens)), expected, strict=True):
            assert close(found, wanted)
