"""Cost of a whole decoder-only transformer in closed form, from its sizes alone.

Weights and KV cache are the only bytes counted, attention is causal, and the arithmetic is that of the
matrix products: norms, softmax and activations are left out (LLM-Viewer, arXiv 2402.16363, with the causal
half of attention instead of the full square and every LM head at 2 · hidden · vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir.cost.devices import Device
from graphopt.ir.cost.operands import Work
from graphopt.ir.cost.roofline import Timing, time_call


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of a dense transformer with grouped heads.

    Attributes:
        layers: number of layers.
        hidden: channels of the residual stream.
        heads: query heads.
        kv_heads: key-value heads.
        head_size: channels of a head.
        inner: channels inside the feed-forward.
        vocabulary: rows of the LM head.
        gated: the feed-forward has a gate, hence three matrices.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    gated: bool = True

    @property
    def layer_parameters(self) -> int:
        """Parameters of the linear operators of one layer."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return attention + (3 if self.gated else 2) * self.hidden * self.inner

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head."""
        return self.hidden * self.vocabulary

    @property
    def linear_parameters(self) -> int:
        """Parameters read in every step: all linear operators and the LM head."""
        return self.layers * self.layer_parameters + self.head_parameters

    def cache_bytes(self, element: int = 2) -> int:
        """Return bytes of KV cache per token, ``element`` bytes each value."""
        return 2 * self.layers * self.kv_heads * self.head_size * element


def forward_work(
    model: Transformer,
    *,
    batch: int,
    new: int,
    cached: int = 0,
    head_rows: int | None = None,
    weight_element: float = 2,
    cache_element: int = 2,
) -> Work:
    """Return the work of one forward pass.

    Args:
        model: sizes.
        batch: sequences.
        new: new tokens per sequence: 1 in decoding, more in verification and prefill.
        cached: tokens per sequence already in the cache.
        head_rows: positions per sequence that reach the LM head; all new ones if None.
        weight_element: bytes per weight; 0.5 for four bits.
        cache_element: bytes per value of the cache.

    Returns:
        ``2 · P · rows`` FLOPs for linears and ``4 · B · H · hd · T · (S + (T + 1) / 2)`` per layer for
        attention; bytes of weights and, as activations, of the cache read and written.
    """
    rows = new if head_rows is None else head_rows
    linear = 2 * batch * (new * model.layers * model.layer_parameters + rows * model.head_parameters)
    attention = 2 * batch * model.heads * model.head_size * model.layers * new * (2 * cached + new + 1)
    weights = round(model.linear_parameters * weight_element)
    return Work(linear + attention, weights, batch * (cached + new) * model.cache_bytes(cache_element))


def decode_time(
    model: Transformer,
    device: Device,
    *,
    batch: int,
    cached: int,
    new: int = 1,
    weight_element: float = 2,
    cache_element: int = 2,
    kind: str = "bfloat16",
) -> Timing:
    """Return the time of one step of decoding, or of verifying ``new`` tokens at once."""
    work = forward_work(
        model, batch=batch, new=new, cached=cached, weight_element=weight_element, cache_element=cache_element
    )
    return time_call(int(work.flops), int(work.bytes), device, kind)


def prefill_time(
    model: Transformer,
    device: Device,
    *,
    batch: int,
    new: int,
    weight_element: float = 2,
    cache_element: int = 2,
    kind: str = "bfloat16",
) -> Timing:
    """Return the time of reading a prompt of ``new`` tokens; the LM head sees the last position only."""
    work = forward_work(
        model, batch=batch, new=new, head_rows=1, weight_element=weight_element, cache_element=cache_element
    )
    return time_call(int(work.flops), int(work.bytes), device, kind)
