"""Feed-forwards of several widths in one operator: each token gets its own, and pays for no more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graphopt.ir.operators.activations import ACTIVATIONS, gated_by

composites = torch.ops.graphopt
WIDE = torch.float64


def matrices(size: int, width: int, gated: bool, biased: bool, seed: int) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=WIDE)

    return {
        "up": drawn(width, size), "down": drawn(size, width), "gate": drawn(width, size) if gated else None,
        "up_bias": drawn(width) if biased else None, "gate_bias": drawn(width) if gated and biased else None,
        "down_bias": drawn(size) if biased else None,
    }  # fmt: skip


def by_hand(x: torch.Tensor, width: int, activation: str, m: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """One token through the first channels of a dense feed-forward."""
    if width == 0:
        return torch.zeros(m["down"].shape[0], dtype=WIDE)

    def first(name: str) -> torch.Tensor | None:
        return None if m[name] is None else m[name][:width]

    up = F.linear(x, first("up"), first("up_bias"))
    gate = up if m["gate"] is None else F.linear(x, first("gate"), first("gate_bias"))
    hidden = gated_by(gate, None if m["gate"] is None else up, activation, 7.0, 1.0)
    return F.linear(hidden, m["down"][:, :width], m["down_bias"])


cases = st.fixed_dictionaries(
    {
        "size": st.integers(1, 7),
        "widths": st.lists(st.integers(0, 12), min_size=1, max_size=5),
        "shape": st.sampled_from([(1,), (5,), (2, 3), (0,), (1, 17)]),
        "gated": st.booleans(),
        "biased": st.booleans(),
        "activation": st.sampled_from(
            [a for a in ACTIVATIONS if "_clamped" not in a and "_softcapped" not in a]
        ),
        "seed": st.integers(0, 1000),
    }
)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_each_token_gets_its_width(case) -> None:
    width = max(12, *case["widths"])
    m = matrices(case["size"], width, case["gated"], case["biased"], case["seed"])
    x = torch.randn(*case["shape"], case["size"], dtype=WIDE)
    choice = torch.randint(len(case["widths"]), case["shape"])
    found = composites.nested_ffn(x, choice, case["widths"], *m.values(), activation=case["activation"])
    assert found.shape == x.shape
    rows, chosen = x.reshape(-1, case["size"]), choice.reshape(-1).tolist()
    for row, way, got in zip(rows, chosen, found.reshape(-1, case["size"]), strict=True):
        expected = by_hand(row, case["widths"][way], case["activation"], m)
        assert torch.allclose(got, expected, atol=1e-10)


@given(cases)
@settings(max_examples=25, deadline=None)
def test_traced_and_direct_forms_agree_with_their_gradients(case) -> None:
    """Export, compile and training see one function."""
    from torch.fx.experimental.proxy_tensor import make_fx

    width = max(12, *case["widths"])
    m = matrices(case["size"], width, case["gated"], case["biased"], case["seed"])
    x = torch.randn(*case["shape"], case["size"], dtype=WIDE)
    choice = torch.randint(len(case["widths"]), case["shape"])
    given_ = [x, *(t for t in m.values() if t is not None)]
    names = [n for n, t in m.items() if t is not None]

    def call(x: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
        weights = {**dict.fromkeys(m), **dict(zip(names, held, strict=True))}
        return composites.nested_ffn(
            x, choice, case["widths"], *weights.values(), activation=case["activation"]
        )

    leaves = [t.clone().requires_grad_() for t in given_]
    direct = call(*leaves)
    traced = make_fx(call)(*given_)
    again = [t.clone().requires_grad_() for t in given_]
    other = traced(*again)
    assert torch.allclose(direct, other, atol=1e-9)
    if direct.requires_grad:  # not where every token goes around
        factor = torch.randn_like(direct)
        first = torch.autograd.grad(direct, leaves, factor, allow_unused=True)
        second = torch.autograd.grad(other, again, factor, allow_unused=True)
        for a, b in zip(first, second, strict=True):
            zero = torch.zeros(1, dtype=WIDE)
            assert torch.allclose(zero if a is None else a, zero if b is None else b, atol=1e-8)


@given(cases, st.data())
@settings(max_examples=25, deadline=None)
def test_a_token_does_not_depend_on_the_choices_of_others(case, data) -> None:
    m = matrices(case["size"], max(12, *case["widths"]), case["gated"], case["biased"], case["seed"])
    x = torch.randn(6, case["size"], dtype=WIDE)
    choice = torch.randint(len(case["widths"]), (6,))
    here = data.draw(st.integers(0, 5))
    other = torch.randint(len(case["widths"]), (6,))
    other[here] = choice[here]
    one, two = (
        composites.nested_ffn(x, c, case["widths"], *m.values(), activation=case["activation"])
        for c in (choice, other)
    )
    assert torch.allclose(one[here], two[here], atol=1e-10)


@given(cases)
@settings(max_examples=25, deadline=None)
def test_soft_choice_is_the_mean_of_hard_ones(case) -> None:
    if max(case["widths"]) == 0:
        case["widths"].append(3)
    m = matrices(case["size"], max(12, *case["widths"]), case["gated"], case["biased"], case["seed"])
    x = torch.randn(*case["shape"], case["size"], dtype=WIDE)
    ways = len(case["widths"])
    shares = torch.rand(*case["shape"], ways, dtype=WIDE)
    found = composites.soft_nested_ffn(x, shares, case["widths"], *m.values(), activation=case["activation"])
    expected = sum(
        shares[..., way, None]
        * composites.nested_ffn(
            x, torch.full(case["shape"], way), case["widths"], *m.values(), activation=case["activation"]
        )
        for way in range(ways)
    )
    assert torch.allclose(found, expected, atol=1e-9)


@given(cases, st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True))
@settings(max_examples=25, deadline=None)
def test_similarity_is_what_its_formula_says(case, widths) -> None:
    widths = sorted({*widths, 12})
    m = matrices(case["size"], 12, case["gated"], case["biased"], case["seed"])
    x = torch.randn(*case["shape"], case["size"], dtype=WIDE)
    found = composites.nested_similarity(x, widths, *m.values(), activation=case["activation"])
    outputs = [
        composites.nested_ffn(
            x, torch.full(case["shape"], i), widths, *m.values(), activation=case["activation"]
        )
        for i in range(len(widths))
    ]
    whole = (outputs[-1] * outputs[-1]).sum(-1)
    for way, out in enumerate(outputs):
        expected = torch.where(whole == 0, torch.ones_like(whole), (out * outputs[-1]).sum(-1) / whole)
        assert torch.allclose(found[..., way], expected, atol=1e-8)
    assert bool((found[..., -1] == 1).all()), "the whole is exactly like itself"


def test_similarity_of_nothing_with_nothing_is_one() -> None:
    m = matrices(3, 4, False, False, 0)
    found = composites.nested_similarity(
        torch.zeros(2, 3, dtype=WIDE), [2, 4], *m.values(), activation="relu"
    )
    assert found.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@given(
    st.lists(st.floats(-40, 40), min_size=2, max_size=6), st.floats(0, 1), st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_the_dial_only_widens(logits, first, second, dtype) -> None:
    """More is asked for: nobody gets less. At 1 it is the last way, whatever rounding says of sums; at 0 the first."""
    low, high = sorted((first, second))
    row = torch.tensor([logits], dtype=dtype)

    def choose(value: float) -> int:
        return int(composites.choose_width(row, torch.tensor(value, dtype=WIDE)))

    assert choose(low) <= choose(high)
    assert choose(1.0) == len(logits) - 1
    assert choose(0.0) == 0
    summed = row.to(torch.promote_types(dtype, torch.float32)).softmax(-1).cumsum(-1)[0, :-1].tolist()
    reached = [way for way, total in enumerate(summed) if total >= 0.5]
    assert choose(0.5) == (reached[0] if reached else len(logits) - 1)


def test_half_is_the_likelier_of_two() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 5.0]])
    assert composites.choose_width(logits, torch.tensor(0.5, dtype=WIDE)).tolist() == [0, 1, 1]


@pytest.mark.parametrize("mean", [0.25, 0.5, 1.0])
def test_arithmetic_is_proportional_to_the_mean_width(mean: float) -> None:
    """Counted where it happens: a masked form would pay for all channels."""
    from torch.utils.flop_counter import FlopCounterMode

    m = {n: None if t is None else t.float() for n, t in matrices(16, 64, True, False, 0).items()}
    x = torch.randn(200, 16)
    choice = torch.zeros(200, dtype=torch.long)
    choice[: round(200 * (mean * 4 - 1) / 3)] = 1
    with FlopCounterMode(display=False) as counted:
        composites.nested_ffn(x, choice, [16, 64], *m.values())
    channels = int(torch.tensor([16, 64])[choice].sum())
    assert counted.get_total_flops() == 2 * 3 * 16 * channels
