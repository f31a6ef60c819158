"""Test calls of every kernel: small ones to compare with references, large ones to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir.operators.activations import ACTIVATIONS
from ...ir.operators.quantized import payload_bytes, quantize_pack

Scale = Literal["ragged", "even", "large"]
RAGGED: Scale = "ragged"
EVEN: Scale = "even"
LARGE: Scale = "large"

GATES = tuple(a for a in ACTIVATIONS if a not in ("tanh",))


@dataclass
class Tensors:
    """Makes random tensors, or with ``meta`` tensors without values."""

    dtype: torch.dtype
    device: str = "cpu"
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._placed((torch.randn(shape, generator=self.generator) * scale).to(dtype))

    def integers(self, *shape: int, high: int, low: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers from ``low`` to below ``high``."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._placed(torch.randint(low, high, shape, generator=self.generator).to(dtype))

    def order(self, count: int) -> Tensor:
        """A permutation."""
        if self.device == "meta":
            return torch.empty(count, dtype=torch.int64, device="meta")
        return self._placed(torch.randperm(count, generator=self.generator))


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        operator: its name.
        what: describes the call.
        args: of the call, made by a :class:`Tensors`.
        exact: whether the kernel's result equals the reference bit for bit.
        typed: whether it is tried in several floating-point types; False if the call fixes its types.
    """

    operator: str
    what: str
    args: Callable[[Tensors], tuple[tuple[Any, ...], dict[str, Any]]]
    exact: bool = False
    typed: bool = True


def _norms(scale: Scale) -> Iterator[Case]:
    rows, size = {LARGE: (64, 4096), EVEN: (4, 64), RAGGED: (5, 72)}[scale]

    def call(add: bool, weight: bool, **options: Any) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            first = (m.normal(2, rows, size), *([m.normal(2, rows, size)] if add else []))
            return (*first, m.normal(size) if weight else None, 1e-5), options

        return make_case

    for add in (False, True):
        name = "add_rms_norm" if add else "rms_norm"
        yield Case(name, "weight", call(add, True))
        yield Case(name, "no weight", call(add, False))
        yield Case(name, "weight before cast", call(add, True, weight_before_cast=True))


def _products(scale: Scale) -> Iterator[Case]:
    rows, size = {LARGE: (64, 8192), EVEN: (2, 1024), RAGGED: (3, 1100)}[scale]
    for activation in GATES if scale == RAGGED else ("silu", "gelu"):

        def halves(m: Tensors, activation: str = activation) -> Any:
            gate, up = m.normal(2, rows, 2 * size, scale=3.0).chunk(2, -1)
            return (gate, up), {"activation": activation, "limit": 2.5, "alpha": 1.3}

        yield Case("gated_product", activation, halves)
    if scale == RAGGED:

        def broken(m: Tensors) -> Any:
            gate = m.normal(rows, size)
            gate[0, 3] = float("nan")
            return (gate, m.normal(rows, size)), {"activation": "relu"}

        yield Case("gated_product", "NaN", broken)
        yield Case(
            "gated_product",
            "one row of a wider one",
            lambda m: ((m.normal(size, 2)[:, 0], m.normal(size)), {}),
        )
    yield Case("gated_product", "separate", lambda m: ((m.normal(rows, size), m.normal(rows, size)), {}))


def _nested(scale: Scale) -> Iterator[Case]:
    tokens, size, inner = {LARGE: (512, 2048, 8192), EVEN: (32, 64, 128), RAGGED: (37, 40, 80)}[scale]
    widths = [16, 80, 0, 48] if scale == RAGGED else [inner // 4, inner]

    def call(gated: bool, bias: bool, activation: str, tokens: int = tokens) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            args: list[Any] = [
                m.normal(1, tokens, size),
                m.integers(1, tokens, high=len(widths)),
                widths,
                m.normal(inner, size, scale=size**-0.5),
                m.normal(size, inner, scale=inner**-0.5),
                m.normal(inner, size, scale=size**-0.5) if gated else None,
                m.normal(inner) if bias else None,
                m.normal(inner) if bias and gated else None,
                m.normal(size) if bias else None,
            ]
            return tuple(args), {"activation": activation}

        return make_case

    yield Case("nested_ffn", "gated", call(True, False, "silu"))
    yield Case("nested_ffn", "gated with biases", call(True, True, "silu"))
    yield Case("nested_ffn", "plain with biases", call(False, True, "gelu"))
    if scale == RAGGED:
        yield Case("nested_ffn", "tokens of a whole prompt", call(True, True, "silu", tokens=150))


def _routed(scale: Scale) -> Iterator[Case]:
    tokens, per_token, experts, size, inner = {
        LARGE: (512, 8, 64, 2048, 1024), EVEN: (16, 1, 4, 32, 64), RAGGED: (21, 2, 5, 40, 48)
    }[scale]  # fmt: skip

    def call(bias: bool = False, absent: bool = False, **options: Any) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            wide = inner * (2 if options.get("gated", True) else 1)
            up = m.normal(experts, wide, size, scale=size**-0.5)
            down = m.normal(experts, size, inner, scale=inner**-0.5)
            if options.get("transposed"):
                up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
            first = m.integers(1, high=3, low=2) if absent else None
            args = (
                m.normal(tokens, size),
                m.integers(tokens, per_token, high=experts),
                m.normal(tokens, per_token).softmax(-1),
                up,
                down,
                m.normal(experts, wide) if bias else None,
                m.normal(experts, size) if bias else None,
                first,
            )
            return args, options

        return make_case

    yield Case("routed_ffn", "gated", call())
    yield Case("routed_ffn", "plain with biases", call(bias=True, gated=False, activation="gelu"))
    yield Case("routed_ffn", "input first", call(transposed=True))
    yield Case("routed_ffn", "weighed inputs", call(weigh_inputs=True))
    yield Case("routed_ffn", "experts of other ranks", call(absent=True, bias=True))
    yield Case(
        "routed_ffn",
        "interleaved, clamped, with biases",
        call(True, interleaved=True, activation="swiglu_clamped", limit=1.5, alpha=1.7),
    )


def _attention(scale: Scale) -> Iterator[Case]:
    batch, heads, kv_heads, queries, keys, size, value = {
        LARGE: (4, 32, 8, 16, 4096, 64, 64), EVEN: (1, 4, 4, 16, 1024, 32, 32), RAGGED: (2, 6, 2, 5, 150, 24, 16)
    }[scale]  # fmt: skip

    def call(
        mask: bool = False,
        sinks: bool = False,
        tokens: int = queries,
        keys: int = keys,
        full: bool = False,
        size: int = size,
        value: int = value,
        **options: Any,
    ) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            visible = m.integers(batch, 1, tokens, keys, high=2, dtype=torch.bool)
            if m.device != "meta" and not full:
                # the end of the cache is hidden, and the first of several queries sees nothing
                visible[..., keys // 2 :] = False
                if tokens > 1:
                    visible[0, :, 0] = False
            args = (
                m.normal(batch, heads, tokens, size),
                m.normal(batch, kv_heads, keys, size),
                m.normal(batch, kv_heads, keys, value),
                m.integers(batch, keys, high=2, dtype=torch.bool) if mask else None,
                None,
                m.normal(heads) if sinks else None,
                None,
                visible,
            )
            return args, {"scale": size**-0.5, **options}

        return make_case

    yield Case("attention", "tree", call())
    yield Case("attention", "one token", call(tokens=1))
    yield Case("attention", "key mask and softcap", call(mask=True, softcap=2.0))
    yield Case("attention", "sinks", call(sinks=True))
    yield Case(
        "attention", "keys in several shares", call(tokens=2, keys=max(keys, 1700), full=True, sinks=True)
    )
    if scale == LARGE:
        yield Case("attention", "wide heads", call(size=128, value=128))
        yield Case("attention", "one token, widest heads", call(tokens=1, size=256, value=256))


def _convolutions(scale: Scale) -> Iterator[Case]:
    batch, channels, tokens, taps = {LARGE: (4, 4096, 512, 4), EVEN: (2, 64, 64, 4), RAGGED: (2, 75, 70, 3)}[
        scale
    ]

    def call(
        bias: bool = False, state: bool = False, tokens: int = tokens, turned: bool = False, taps: int = taps
    ) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            x = (
                m.normal(batch, tokens, channels).transpose(1, 2)
                if turned
                else m.normal(batch, channels, tokens)
            )
            before = m.normal(batch, channels, taps - 1) if state else None
            return (x, m.normal(channels, 1, taps), m.normal(channels) if bias else None, before), {}

        return make_case

    yield Case("causal_conv1d", "a prompt", call(turned=True))
    yield Case("causal_conv1d", "one token after a state, with bias", call(True, True, 1))
    yield Case("causal_conv1d", "a piece after a state", call(False, True))
    if scale == RAGGED:
        yield Case("causal_conv1d", "fewer tokens than taps", call(True, True, 2, taps=6))
        yield Case("causal_conv1d", "one tap", call(taps=1, state=True))


def _linear_attention(scale: Scale) -> Iterator[Case]:
    batch, heads, groups, keys, values, tokens = {
        LARGE: (4, 32, 16, 128, 128, 512), EVEN: (2, 2, 2, 16, 32, 3), RAGGED: (2, 6, 2, 12, 20, 5)
    }[scale]  # fmt: skip

    def call(
        state: bool = True, beta: bool = False, by_key: bool = False, after: bool = False, tokens: int = tokens,
        heads: int = heads, groups: int = groups, keys: int = keys, values: int = values,
    ) -> Callable[[Tensors], Any]:  # fmt: skip
        def make_case(m: Tensors) -> Any:
            decays = (batch, heads, tokens, keys) if by_key else (batch, heads, tokens)
            # keys of length one, as layers with a delta rule have them: others make the state grow
            q, k = (m.normal(batch, groups, tokens, keys, scale=keys**-0.5) for _ in range(2))
            v = m.normal(batch, heads, tokens, values)
            g = -m.normal(*decays).abs()
            strength = m.normal(batch, heads, tokens).sigmoid() if beta else None
            held = m.normal(batch, heads, keys, values) if state else None
            if not after:
                return (q, k, v, g, strength, held), {}
            # the first tokens of each row: none of the first one's
            count = torch.arange(batch, device=m.device)[:, None] * (tokens // 2 + 1)
            taken = torch.arange(tokens, device=m.device) < count
            return (k, v, g, strength, held, taken), {}

        return make_case

    for name, after in (("linear_attention", False), ("linear_attention_state", True)):
        yield Case(name, "delta rule", call(beta=True, after=after))
        if scale != EVEN:
            yield Case(name, "one decay a head", call(after=after))
            yield Case(name, "one token", call(tokens=1, beta=True, after=after))
        few = {LARGE: 16, EVEN: 8, RAGGED: 5}[scale]
        many = {LARGE: 4096, EVEN: 64, RAGGED: 37}[scale]
        scan = call(by_key=True, after=after, heads=many, groups=1, keys=few, values=1)
        yield Case(name, "a channel a head, a decay a key", scan)
        if scale == RAGGED:
            yield Case(name, "delta rule, a decay a key", call(beta=True, by_key=True, after=after))
            yield Case(name, "many values", call(values=150, keys=70, after=after))
    if scale == RAGGED:
        yield Case("linear_attention", "without a state", call(state=False))
    if scale == LARGE:
        yield Case("linear_attention", "widest keys", call(keys=256, values=256, tokens=1, beta=True))


def _lora(scale: Scale) -> Iterator[Case]:
    tokens, size, width, rank = {
        LARGE: (64, 2048, 8192, 16),
        EVEN: (16, 64, 128, 16),
        RAGGED: (21, 72, 150, 6),
    }[scale]

    def call(high: int) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            marks = m.integers(2, tokens, high=high) if high else m.integers(2, tokens, high=1)
            if high and m.device != "meta":
                marks[:, : tokens // 2] = 0
            down, up = m.normal(rank, size, scale=size**-0.5), m.normal(width, rank)
            return (m.normal(2, tokens, width), m.normal(2, tokens, size), down, up, marks, 2.0), {}

        return make_case

    yield Case("gated_lora", "some marked", call(3))
    yield Case("gated_lora", "none marked", call(0), exact=True)


def _heads(scale: Scale) -> Iterator[Case]:
    rows, size, vocabulary = {LARGE: (8, 2048, 128256), EVEN: (8, 128, 256), RAGGED: (3, 72, 300)}[scale]

    def call(bias: bool, k: int) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            bias_values = m.normal(vocabulary) if bias else None
            return (m.normal(2, rows, size), m.normal(vocabulary, size, scale=size**-0.5), bias_values, k), {}

        return make_case

    yield Case("linear_top_k", "ten", call(False, 10))
    if scale == RAGGED:

        def edges(m: Tensors) -> Any:
            x, weight, bias = m.normal(2, rows, size), m.normal(70, size, scale=size**-0.5), m.normal(70)
            x[0, 0] = float("nan")
            bias[5:65] = float("-inf")
            return (x, weight, bias, 8), {}

        yield Case("linear_top_k", "NaN, and few finite values", edges)
    yield Case("linear_top_k", "one, with bias", call(True, 1))


def _packing(scale: Scale) -> Iterator[Case]:
    tokens, features = {LARGE: (64, 4096), EVEN: (2, 512), RAGGED: (3, 203)}[scale]

    def call(bits: int, kept: int, block: int, permuted: bool, unpack: bool) -> Callable[[Tensors], Any]:
        def make_case(m: Tensors) -> Any:
            outliers = features - kept
            width = payload_bytes(features, kept, bits, block) + 3
            columns = m.order(features) if permuted else None
            static = None
            if not block:
                static = m.normal(3, outliers, dtype=torch.float32)
                static = static.abs() + 0.1 if m.device != "meta" else static
            if not unpack:
                order = None if static is None else static[0]
                return (
                    m.normal(2, tokens, features, scale=2.0),
                    columns,
                    order,
                    kept,
                    bits,
                    block,
                    width,
                ), {}
            if m.device == "meta":
                payload = torch.empty(3, tokens, width, dtype=torch.uint8, device="meta")
            else:
                pieces = [
                    quantize_pack(
                        m.normal(tokens, features, scale=2.0), None, None if static is None else static[r], kept,
                        bits, block, width,
                    )
                    for r in range(3)
                ]  # fmt: skip
                payload = torch.stack(pieces)
            return (payload, columns, static, features, kept, bits, block), {}

        return make_case

    for bits in range(2, 9) if scale == RAGGED else (4, 5):
        block = 32 if bits % 2 else 0
        label = f"{bits} bits, {'travelling' if block else 'static'} scales"
        yield Case("quantize_pack", label, call(bits, bits % 3, block, bits > 4, False), True)
        yield Case("unpack_sum", label, call(bits, bits % 3, block, bits > 4, True), typed=False)


def cases(scale: Scale = RAGGED) -> list[Case]:
    """Return all calls: small ones whose sizes do or do not fill tiles, or those of a model with a billion weights."""
    every = (
        _norms, _products, _nested, _routed, _attention, _convolutions, _linear_attention, _lora, _heads, _packing,
    )  # fmt: skip
    return [case for family in every for case in family(scale)]
