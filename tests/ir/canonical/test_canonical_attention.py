"""Attention in any spelling becomes one operator, with the mask's meaning; what is not attention stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from amounts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from graphopt.frontends.compare import compare_outputs
from graphopt.frontends.torch_module import capture_module
from graphopt.ir.checking.verify import verify
from graphopt.ir.program import Program
from graphopt.ir.schema import arguments, is_operator

D = torch.float64
HEADS, KV, HEAD, SIZE = 4, 2, 6, 16


@dataclass(frozen=True)
class Spelling:
    """How an attention is written."""

    product: str = "matmul"  # matmul, bmm, einsum, sdpa, baddbmm
    mask: str = "none"
    window: int | None = None
    both_ways: bool = False
    padding: str = "none"  # none, filled, added, joined, numbers
    bias: str = "none"  # none, slopes, given
    groups: str = "none"  # none, repeat, expand, tile
    softcap: float | None = None
    steadied: bool = False
    scaled: str = "after"  # after, query, divided


class Attention(nn.Module):
    """Attention over (batch, length, 16), spelled as asked."""

    def __init__(self, spelling: Spelling):
        super().__init__()
        self.spelling = spelling
        generator = torch.Generator().manual_seed(4)
        kv = HEADS if spelling.groups == "none" else KV

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=D) / 3)

        self.query, self.key, self.value = (
            draw(HEADS * HEAD, SIZE),
            draw(kv * HEAD, SIZE),
            draw(kv * HEAD, SIZE),
        )
        self.out, self.slopes, self.kv = draw(SIZE, HEADS * HEAD), draw(HEADS), kv
        self.register_buffer("lower", torch.tril(torch.ones(64, 64, dtype=torch.bool)))

    def split(self, x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
        return F.linear(x, weight).view(*x.shape[:2], count, HEAD).transpose(1, 2)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        b, kv, n, d = x.shape
        times = HEADS // KV
        if self.spelling.groups == "repeat":
            return x.repeat_interleave(times, dim=1)
        if self.spelling.groups == "expand":
            return x[:, :, None].expand(b, kv, times, n, d).reshape(b, kv * times, n, d)
        return x.repeat(1, times, 1, 1) if self.spelling.groups == "tile" else x

    def seen(self, n: int) -> torch.Tensor | None:
        """Which key each query sees, true where it does."""
        s, i = self.spelling, torch.arange(n)
        distance = i[:, None] - i[None, :]
        if s.window is not None:
            return distance.abs() < s.window if s.both_ways else (distance >= 0) & (distance < s.window)
        styles: dict[str, Callable[[], torch.Tensor]] = {
            "tril": lambda: torch.tril(torch.ones(n, n, dtype=torch.bool)),
            "buffer": lambda: self.lower[:n, :n],
            "arange": lambda: i[None, :] <= i[:, None],
            "where": lambda: distance >= 0,
            "swapped": lambda: distance >= 0,
            "added": lambda: torch.full((n, n), float("-inf"), dtype=D).triu(1),
            "subtracted": lambda: torch.ones(n, n, dtype=D).triu(1) * 1e9,
        }
        return styles[s.mask]() if s.mask in styles else None

    def masked(self, scores: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        if seen is None:
            return scores
        if seen.dtype is not torch.bool:
            return scores - seen if self.spelling.mask == "subtracted" else scores + seen
        if self.spelling.mask == "where":
            return torch.where(seen, scores, torch.finfo(D).min)
        if self.spelling.mask == "swapped":
            return torch.where(~seen, torch.tensor(-1e30, dtype=D), scores)
        return scores.masked_fill(~seen, float("-inf"))

    def padded(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return scores
        if self.spelling.padding == "filled":
            return scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        if self.spelling.padding == "joined":
            both = mask[:, None, None, :] * mask[:, None, :, None]
            return scores.masked_fill(both == 0, torch.finfo(D).min)
        return scores + (1.0 - (mask[:, None, None, :] != 0).to(D)) * torch.finfo(D).min / 2

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        s, (b, n, _) = self.spelling, x.shape
        q, k, v = (
            self.split(x, self.query, HEADS),
            self.split(x, self.key, self.kv),
            self.split(x, self.value, self.kv),
        )
        k, v = self.grouped(k), self.grouped(v)
        if s.bias == "slopes":
            bias = self.slopes[:, None, None] * (torch.arange(n)[None, :] - torch.arange(n)[:, None]).to(D)
        if s.product == "sdpa":
            return self.fused(q, k, v, mask, bias)
        q = q * HEAD**-0.5 if s.scaled == "query" else q
        flat = s.product in ("bmm", "baddbmm")
        if flat:
            q, k, v = (t.reshape(b * HEADS, n, HEAD) for t in (q, k, v))
        if s.product == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        elif s.product == "baddbmm" and bias is not None:
            spread = bias.expand(b, HEADS, n, n).reshape(b * HEADS, n, n)
            scores = torch.baddbmm(spread, q, k.transpose(1, 2), beta=2.0, alpha=HEAD**-0.5)
            bias = None
        else:
            scores = torch.bmm(q, k.transpose(1, 2)) if flat else q @ k.transpose(-1, -2)
            if s.scaled == "after" or s.product == "baddbmm":
                scores = scores * HEAD**-0.5
            elif s.scaled == "divided":
                scores = scores / math.sqrt(HEAD)
        scores = scores.view(b, HEADS, n, n)
        if s.softcap is not None:
            scores = torch.tanh(scores / s.softcap) * s.softcap
        scores = scores if bias is None else scores + bias
        scores = self.padded(self.masked(scores, self.seen(n)), mask)
        if s.steadied:
            scores = torch.max(scores, torch.tensor(torch.finfo(D).min, dtype=D))
            scores = scores - scores.amax(-1, keepdim=True)
        weights = F.dropout(torch.softmax(scores, -1, dtype=D), 0.1, training=False)
        if flat:
            out = torch.bmm(weights.view(b * HEADS, n, n), v).view(b, HEADS, n, HEAD)
        else:
            out = torch.einsum("bhqk,bhkd->bhqd", weights, v) if s.product == "einsum" else weights @ v
        return F.linear(out.transpose(1, 2).flatten(2), self.out)

    def fused(self, q: Any, k: Any, v: Any, mask: Any, bias: Any) -> torch.Tensor:
        seen = self.seen(q.shape[2])
        causal = self.spelling.mask == "fused"
        if mask is not None:
            visible = mask[:, None, None, :] != 0
            seen = visible if seen is None else visible & (seen if seen.dtype is torch.bool else seen == 0)
        if bias is not None and seen is not None:
            seen = bias.masked_fill(~seen, float("-inf")) if seen.dtype is torch.bool else seen + bias
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias if seen is None else seen, is_causal=causal
        )
        return F.linear(out.transpose(1, 2).flatten(2), self.out)


def inputs(spelling: Spelling, batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    made = {"x": torch.randn(batch, length, SIZE, generator=generator, dtype=D)}
    if spelling.padding != "none":
        made["mask"] = torch.ones(batch, length, dtype=torch.long)
        made["mask"][0, -(length // 3) :] = 0
        if spelling.padding == "numbers":
            made["mask"] *= torch.randint(1, 9, (batch, length), generator=generator)
    if spelling.bias == "given":
        made["bias"] = torch.randn(batch, 1, length, length, generator=generator, dtype=D)
    return made


def captured(model: Attention) -> tuple[Program, list[dict[str, Any]]]:
    """Capture, compare at two sizes where no padding is, and return the arguments of the attentions."""
    spelling = model.spelling
    program = capture_module(model, inputs(spelling, 2, 5), compare=False)
    for shape in ((2, 5), (3, 8)):
        given = inputs(spelling, *shape)
        where = given["mask"] != 0 if "mask" in given else None
        error = compare_outputs(program, model, given, where)
        assert error < 1e-11, f"{error}\n{program.text()}"
    verify(program)
    return program, [arguments(n) for n in program.nodes if is_operator(n, "graphopt.attention")]


MASKS = ["none", "tril", "buffer", "arange", "where", "swapped", "added", "subtracted"]


@st.composite
def spellings(draw: Any) -> Spelling:
    product = draw(st.sampled_from(["matmul", "bmm", "einsum", "sdpa", "baddbmm"]))
    plain = [m for m in MASKS if product != "sdpa" or m != "subtracted"]
    return Spelling(
        product=product,
        mask=draw(st.sampled_from(plain)),
        window=draw(st.sampled_from([None, None, 3])),
        both_ways=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "filled", "added", "joined", "numbers"])),
        bias=draw(st.sampled_from(["none", "none", "slopes", "given"])),
        groups=draw(st.sampled_from(["none", "repeat", "expand", "tile"])),
        softcap=draw(st.sampled_from([None, 5.0])) if product not in ("sdpa", "baddbmm") else None,
        steadied=draw(st.booleans()) and product != "sdpa",
        scaled=draw(st.sampled_from(["after", "query", "divided"])),
    )


@settings(max_examples=examples(40), deadline=None)
@given(spelling=spellings())
def test_random_spellings_become_one_attention(spelling: Spelling) -> None:
    """Wrong if some mixture of masks, biases and products were not raised, or were raised to another."""
    _, found = captured(Attention(spelling))
    assert len(found) == 1, spelling
    (attention,) = found
    if spelling.window is None:
        assert attention["causal"] is (spelling.mask != "none")
    else:
        assert attention["causal"] is not spelling.both_ways
    assert attention["window"] == spelling.window
    assert attention["softcap"] == spelling.softcap
    assert (attention["bias"] is not None) is (spelling.bias != "none")
    assert (attention["key_mask"] is not None) is (spelling.padding != "none")
    kv = KV if spelling.groups in ("repeat", "expand") else HEADS
    assert attention["k"].meta["val"].shape[1] == attention["v"].meta["val"].shape[1] == kv


class Function(nn.Module):
    """Attention whose scores a function makes of the raw products, on top of the plain one."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.inner, self.function = Attention(Spelling()), function
        self.spelling = Spelling()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.inner
        q, k, v = (inner.split(x, w, HEADS) for w in (inner.query, inner.key, inner.value))
        return F.linear(self.function(q, k, v, mask).transpose(1, 2).flatten(2), inner.out)


def _causal_from_the_first_key(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q[:, :, :3], k, v, is_causal=True)


LEFT_ALONE: dict[str, Callable[..., torch.Tensor]] = {
    "softmax over queries": lambda q, k, v, m: torch.softmax(q @ k.mT, -2) @ v,
    "scores kept above a floor": lambda q, k, v, m: torch.softmax((q @ k.mT).clamp(min=-0.1), -1) @ v,
    "the larger of two scores": lambda q, k, v, m: torch.softmax(torch.maximum(q @ k.mT, k @ q.mT), -1) @ v,
    "only the last query": lambda q, k, v, m: torch.softmax(q @ k.mT, -1)[:, :, -1:] @ v,
    "causal masking aligned with the first key": _causal_from_the_first_key,
    "scaled after the cap": lambda q, k, v, m: torch.softmax(torch.tanh(q @ k.mT / 5) * 5 * 0.5, -1) @ v,
    "bias inside the cap": lambda q, k, v, m: (
        torch.softmax(torch.tanh((q @ k.mT + v @ v.mT) / 5) * 5, -1) @ v
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_attention_cannot_say_is_left_alone(name: str) -> None:
    """Wrong if something outside the operator's meaning were dropped to make it fit."""
    _, found = captured(Function(LEFT_ALONE[name]))  # type: ignore[arg-type]
    assert not found


def test_a_maximum_over_queries_is_a_bias() -> None:
    """Wrong if any maximum taken from scores were held for the one that a softmax ignores."""

    def shifted(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
        scores = q @ k.mT
        return torch.softmax(scores - scores.amax(-2, keepdim=True), -1) @ v

    _, (attention,) = captured(Function(shifted))  # type: ignore[arg-type]
    assert attention["bias"] is not None


@pytest.mark.parametrize("length", [2, 40])
def test_a_window_is_found_at_any_length_or_kept_as_it_is(length: int) -> None:
    """Wrong if a window longer than the mask was tried with were taken for none."""

    def windowed(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
        i = torch.arange(q.shape[2])
        distance = i[:, None] - i[None, :]
        return torch.softmax((q @ k.mT).masked_fill((distance < 0) | (distance >= length), -1e30), -1) @ v

    program, (attention,) = captured(Function(windowed))  # type: ignore[arg-type]
    assert (attention["causal"], attention["window"], attention["bias"]) == (True, length, None)
    assert compare_outputs(program, Function(windowed), inputs(Spelling(), 1, length + 5)) < 1e-11


def test_a_window_too_long_for_short_inputs() -> None:
    """Wrong if a sliding window of thousands vanished because no short input shows it."""

    def windowed(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
        i = torch.arange(q.shape[2])
        distance = i[:, None] - i[None, :]
        return torch.softmax((q @ k.mT).masked_fill((distance < 0) | (distance >= 1800), -1e30), -1) @ v

    program, (attention,) = captured(Function(windowed))  # type: ignore[arg-type]
    assert (attention["causal"], attention["window"], attention["bias"]) == (True, 1800, None)
    assert compare_outputs(program, Function(windowed), inputs(Spelling(), 1, 1810)) < 1e-11


def test_segments_are_not_taken_for_padding() -> None:
    """Wrong if rows that see only their own segment came to see another because one number was zero."""

    def own(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m[:, None, :, None] == m[:, None, None, :])

    model = Function(own)
    given = inputs(Spelling(padding="filled"), 2, 5)
    program = capture_module(model, given, compare=False)
    given["mask"] = torch.tensor([[0, 0, 1, 1, 2], [1, 0, 1, 0, 0]])
    assert compare_outputs(program, model, given) < 1e-11


def test_weights_that_are_returned_stay_in_the_graph() -> None:
    """Wrong if raising an attention lost the probabilities that the model gives as well."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(Spelling())

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v = (
                self.inner.split(x, w, HEADS) for w in (self.inner.query, self.inner.key, self.inner.value)
            )
            weights = torch.softmax(q @ k.mT, -1)
            return weights @ v, weights

    program = capture_module(Both(), inputs(Spelling(), 2, 5))
    assert program.operators["graphopt.attention"] == 0
    assert program.operators["aten.softmax"] == 1


def test_sinks_take_part_in_the_softmax() -> None:
    """Wrong if the column that only soaks up attention were read as a key."""

    def sunk(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
        column = model.inner.slopes.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        joined = torch.cat([q @ k.mT * 0.3, column], -1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return torch.softmax(joined, -1)[..., :-1] @ v

    model = Function(sunk)
    _, (attention,) = captured(model)  # type: ignore[arg-type]
    assert attention["sinks"] is not None
    assert attention["scale"] == pytest.approx(0.3)


def test_a_choice_between_two_biases_hides_nothing() -> None:
    """Wrong if the other side of a choice were dropped as if it hid the key."""

    def chosen(q: Any, k: Any, v: Any, m: Any) -> torch.Tensor:
        near = torch.tril(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool))
        bias = torch.where(near, (q @ k.mT).tanh(), 0.5)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    _, (attention,) = captured(Function(chosen))  # type: ignore[arg-type]
    assert not attention["causal"]
