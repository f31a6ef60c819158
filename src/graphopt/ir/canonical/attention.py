"""Recognition of attention, fused or written out and with any mask, as ``graphopt.attention``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..facts import note_capture
from ..infer import same_size, same_value
from ..operators.traits import Trait, has
from ..schema import argument, arguments, is_operator
from .masks import MaskMeaning, split_mask
from .scores import Scores, peel, scaled_by_sinks

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten


def recognise_attention(program: Program) -> None:
    """Replace recognised attention by ``graphopt.attention``; attention that was not recognised is noted as a fact."""
    unrecognised: list[str] = []
    cache: dict[fx.Node, tuple[MaskMeaning | None, list[Any]]] = {}
    for node in list(program.graph.nodes):
        if node._erased:
            continue
        if is_operator(node, "aten.scaled_dot_product_attention"):
            reason = _fused(program, node, cache)
        elif is_operator(node, "aten.softmax"):
            reason = _written_out(program, node, cache)
        else:
            continue
        if reason:
            unrecognised.append(f"{node.name}: {reason}")
    note_capture(program, plain_attention=tuple(unrecognised))


def _meaning(
    program: Program, mask: fx.Node, cache: dict[fx.Node, Any]
) -> tuple[MaskMeaning | None, list[Any]]:
    if mask not in cache:
        cache[mask] = split_mask(program, mask)
    meaning: tuple[MaskMeaning | None, list[Any]] = cache[mask]
    return meaning


def _key_mask(program: Program, name: str, at: fx.Node) -> fx.Node:
    source = program.input_nodes[name]
    if source.meta["val"].dtype is torch.bool:
        return source
    for user in source.users:
        if is_operator(user, "aten.to") and user.meta["val"].dtype is torch.bool and user in _preceding(at):
            return user
    with program.edit.after(source):
        return program.edit.call(aten.to.dtype, source, torch.bool)


def _preceding(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    current = node.prev
    while current.op != "root":
        seen.add(current)
        current = current.prev
    return seen


def ungrouped(value: fx.Node) -> tuple[fx.Node, int]:
    """Return keys or values before their heads were repeated, and the number of repetitions."""
    if is_operator(value, "aten.repeat_interleave"):
        args = arguments(value)
        if args.get("dim") == 1 and isinstance(args.get("repeats"), int):
            source = args["self"]
            assert isinstance(source, fx.Node)
            return source, int(args["repeats"])
    if is_operator(value, "aten.reshape") and is_operator(value.args[0], "aten.expand"):
        expanded = value.args[0]
        assert isinstance(expanded, fx.Node)
        added = expanded.args[0]
        if is_operator(added, "aten.unsqueeze") and added.args[1] in (2, -3):  # type: ignore[union-attr, operator]
            source = added.args[0]  # type: ignore[union-attr]
            assert isinstance(source, fx.Node)
            before, after = source.meta["val"].shape, value.meta["val"].shape
            if (
                len(before) == 4
                and len(after) == 4
                and isinstance(before[1], int)
                and isinstance(after[1], int)
                and after[1] % before[1] == 0
                and all(same_size(before[d], after[d]) for d in (0, 2, 3))
            ):
                return source, after[1] // before[1]
    return value, 1


def _fused(program: Program, node: fx.Node, cache: dict[fx.Node, Any]) -> str:
    args = arguments(node)
    q, k, v = args["query"], args["key"], args["value"]
    if q.meta["val"].dim() != 4 or k.meta["val"].dim() != 4:
        return f"attention over {q.meta['val'].dim()} dimensions"
    if args["dropout_p"]:
        return "dropout inside attention"
    scale, size = args["scale"], q.meta["val"].shape[-1]
    if scale is None and not isinstance(size, int):
        return "its scale depends on a head size that varies"
    if isinstance(scale, fx.Node):
        return "its scale is computed from sizes that vary"
    scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
    if args["is_causal"] and not same_size(q.meta["val"].shape[-2], k.meta["val"].shape[-2]):
        return "causal masking aligned with the first key, with different numbers of queries and keys"
    scores = Scores(q, k, scale, [], None, bool(args["is_causal"]))
    mask = args["attn_mask"]
    if mask is not None:
        scores.added.append((mask, 1.0))
    return _install(program, node, scores, v, cache)


def _written_out(program: Program, softmax: fx.Node, cache: dict[fx.Node, Any]) -> str:
    rank = softmax.meta["val"].dim()
    if argument(softmax, "dim") not in (-1, rank - 1) or rank not in (3, 4):
        return ""
    weights: fx.Node = softmax
    while len(weights.users) == 1:
        user = next(iter(weights.users))
        along_keys = is_operator(user, "aten.slice") and argument(user, "dim") in (
            -1,
            user.meta["val"].dim() - 1,
        )
        if not along_keys and not has(user, Trait.RESHAPE | Trait.CAST):
            break
        weights = user
    products = [
        u for u in weights.users if is_operator(u, "aten.matmul", "aten.bmm") and u.args[0] is weights
    ]
    if len(weights.users) != 1 or not products:
        return ""
    product = products[0]
    v = product.args[1]
    scores = peel(program, softmax)
    if isinstance(scores, str) or not isinstance(v, fx.Node):
        return scores if isinstance(scores, str) else "values are not a node"
    if not same_size(weights.meta["val"].shape[-1], scores.k.meta["val"].shape[-2]):
        return "there is not one attention weight per key"
    return _install(program, product, scores, v, cache)


def _heads(program: Program, value: fx.Node, like: fx.Node | None) -> fx.Node:
    """Return (batch * heads, length, size) as (batch, heads, length, size), with the sizes of ``like``."""
    if value.meta["val"].dim() == 4:
        return value
    if like is None:
        # heads and rows cannot be told apart, so each becomes a row with one head
        return program.edit.call(aten.unsqueeze.default, value, 1)
    batch, heads = like.meta["val"].shape[:2]
    length, size = value.meta["val"].shape[1:]
    if is_operator(value, "aten.reshape"):
        source = value.args[0]
        before = source.meta["val"].shape  # type: ignore[union-attr]
        if len(before) == 4 and all(map(same_size, before, (batch, heads, length, size))):
            return source  # type: ignore[return-value]
    shape = program.size_nodes([batch, heads, length, size])
    return program.edit.call(aten.reshape.default, value, shape)


def _install(program: Program, node: fx.Node, scores: Scores, v: fx.Node, cache: dict[fx.Node, Any]) -> str:
    causal, window, key_mask = scores.causal, None, None
    biases: list[tuple[fx.Node, float]] = []
    seen_meaning = False
    for term, factor in scores.added:
        meaning, remaining = _meaning(program, term, cache)
        if meaning is not None and (not seen_meaning or meaning.key_mask is None or key_mask is None):
            seen_meaning = True
            causal = causal or meaning.causal
            window = min((w for w in (window, meaning.window) if w is not None), default=None)
            key_mask = meaning.key_mask or key_mask
            biases.extend((bias, factor) for bias in remaining)
        else:
            biases.append((term, factor))
    like = scores.four_dimensional
    with program.edit.before(node):
        q, k = scores.q, scores.k
        if q.meta["val"].dim() == 3:
            q, k, v = (_heads(program, x, like) for x in (q, k, v))
    k, repeats = ungrouped(k)
    ungrouped_v, repeats_v = ungrouped(v)
    heads, kv_heads = q.meta["val"].shape[1], k.meta["val"].shape[1]
    if repeats == repeats_v and same_size(ungrouped_v.meta["val"].shape[1], kv_heads):
        v = ungrouped_v
    else:
        k = scores.k if scores.k.meta["val"].dim() == 4 else k
        kv_heads = k.meta["val"].shape[1]
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        return f"{heads} heads over {kv_heads} key-value heads"
    mask_node = _key_mask(program, key_mask, node) if key_mask is not None else None
    if scores.sinks is None and (scaled := scaled_by_sinks(program, node)) is not None:
        node, scores.sinks = scaled
    with program.edit.before(node):
        bias = _bias(program, biases, q)
        new = program.edit.call(
            torch.ops.graphopt.attention.default,
            q, k, v, mask_node, bias, scores.sinks,
            scale=scores.scale, causal=causal, window=window, softcap=scores.softcap,
        )  # fmt: skip
        if node.meta["val"].dim() == 3 and like is None:
            new = program.edit.call(aten.squeeze.dim, new, 1)
        elif node.meta["val"].dim() == 3:
            new = program.edit.call(
                aten.reshape.default, new, program.size_nodes(list(node.meta["val"].shape))
            )
    if not same_value(node.meta["val"], new.meta["val"]):
        expected, actual = node.meta["val"], new.meta["val"]
        if (
            actual.dtype != expected.dtype
            or len(actual.shape) != len(expected.shape)
            or any(
                (isinstance(a, int) or isinstance(b, int)) and not same_size(a, b)
                for a, b in zip(actual.shape, expected.shape, strict=True)
            )
        ):
            program.edit.erase_dead([new])
            return "the recognised operator has another type or shape"
    program.edit.replace(node, new, record=False, same=False)
    return ""


def _bias(program: Program, terms: list[tuple[fx.Node, float]], q: fx.Node) -> fx.Node | None:
    total: fx.Node | None = None
    for term, factor in terms:
        value = term.meta["val"]
        if value.dtype is torch.bool:
            zero = program.edit.call(aten.zeros_like.default, term, dtype=q.meta["val"].dtype)
            hidden = program.edit.call(aten.bitwise_not.default, term)
            term = program.edit.call(aten.masked_fill.Scalar, zero, hidden, float("-inf"))
        elif factor != 1.0:
            term = program.edit.call(aten.mul.Tensor, term, factor)
        if term.meta["val"].dim() == 3:
            batch, heads = q.meta["val"].shape[:2]
            first = term.meta["val"].shape[0]
            if not same_size(first, batch * heads):
                term = program.edit.call(aten.unsqueeze.default, term, 0)
            else:
                shape = program.size_nodes([batch, heads, *term.meta["val"].shape[1:]])
                term = program.edit.call(aten.reshape.default, term, shape)
        total = term if total is None else program.edit.call(aten.add.Tensor, total, term)
    return total
