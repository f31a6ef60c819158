"""Attention over the latents that keys and values are projected from, so that caches hold these (DeepSeek V2, 2405.04434).

Where every head's values are rows of one matrix times a latent of each token, and its keys are too, beside a part that all
heads share, scores and outputs are those of heads that share the latents themselves as keys and values:

    q_h . [U_h c, r]  =  [U_h^T q_h, r-part of q_h] . [c, r]          sum_j w_j V_h c_j  =  V_h (sum_j w_j c_j)

Which entries of keys and values come from the matrix is found by moving numbers through the graph. New tokens cost more
multiplications, earlier ones take less memory; so this is done only where caches become smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...ir.infer import same_size
from ...ir.operators.traits import Trait, has
from ...ir.ranks.rank_programs import ranks_of
from ...ir.schema import arguments, is_operator, normal_call
from .moved_entries import ELSEWHERE, Untraceable, by_head, moved, sizes_of

if TYPE_CHECKING:
    from ...ir.program import Program
    from .positions import Decoder

aten = torch.ops.aten


@dataclass(frozen=True)
class Latent:
    """What the keys and values of one attention are projected from.

    Attributes:
        source: (batch, tokens, size) or (batch, 1, tokens, size), the latent of each token.
        weight: (rows, size), the matrix.
        shared: (batch, 1, tokens, other size), the part of keys that all heads share; None if there is none.
        key_rows: (heads, size), the row of the matrix for each projected entry of a key.
        value_rows: (heads, size), the same of values.
        projected: first and last of the entries of a key that are projected.
        others: first and last of those that are shared.
    """

    source: fx.Node
    weight: fx.Node
    shared: fx.Node | None
    key_rows: torch.Tensor
    value_rows: torch.Tensor
    projected: tuple[int, int]
    others: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of entries of a latent."""
        return int(self.weight.meta["val"].shape[1])

    @property
    def saves(self) -> bool:
        """Whether caches of latents are smaller than those of keys and values."""
        heads = self.key_rows.shape[0]
        whole = self.key_rows.shape[1] + self.others[1] - self.others[0] + self.value_rows.shape[1]
        return self.size + self.others[1] - self.others[0] < heads * whole


def latent_of(program: Program, node: fx.Node) -> Latent | None:
    """Return the latent that the keys and values of an attention come from; None if they are none of this kind."""
    args = arguments(node)
    k, v = args["k"], args["v"]
    if ranks_of(program):
        return None
    ends = _ends(v)
    if len(ends) != 1:
        return None
    product = ends[0]
    call = arguments(product) if is_operator(product, "aten.linear") else {}
    weight, source = call.get("weight"), call.get("input")
    if not isinstance(weight, fx.Node) or not isinstance(source, fx.Node) or call.get("bias") is not None:
        return None
    if weight.op != "placeholder":
        return None  # stored in few bits, of which kernels multiply all rows
    places = sizes_of(program, product)
    if len(places) not in (3, 4) or not places[-1] or any(s != 1 for s in places[1:-2]):
        return None
    numbers = torch.arange(places[-1]).expand(places).contiguous()
    try:
        values = by_head(moved(program, v, {product: numbers}))
        keys = by_head(moved(program, k, {**_nowhere(program, _ends(k)), product: numbers}))
    except (Untraceable, RuntimeError):
        return None
    if bool((values == ELSEWHERE).any()) or keys.shape[0] != values.shape[0]:
        return None
    from_latent = (keys != ELSEWHERE).all(0)
    if not torch.equal(from_latent, (keys != ELSEWHERE).any(0)):
        return None
    projected, others = _span(from_latent), _span(~from_latent)
    if projected is None or projected[0] == projected[1] or others is None:
        return None
    shared = None
    if others[0] != others[1]:
        shared = _shared_part(program, k, others)
        if shared is None:
            return None
    found = Latent(source, weight, shared, keys[:, projected[0] : projected[1]], values, projected, others)
    return found if found.saves else None


def _ends(value: fx.Node) -> list[fx.Node]:
    """Return the values that a value's entries are moved from without being changed."""
    found: dict[fx.Node, None] = {}
    work, seen = [value], {value}
    while work:
        node = work.pop()
        if _moves(node):
            following = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt)]
            work.extend(n for n in following if n not in seen)
            seen.update(following)
        else:
            found[node] = None
    return list(found)


def _moves(node: fx.Node) -> bool:
    return has(node, Trait.CAST) or (
        has(node, Trait.MOVEMENT) and not has(node, Trait.PADDING | Trait.LOOKUP)
    )


def _span(chosen: torch.Tensor) -> tuple[int, int] | None:
    """Return the first and last of the places that are chosen, (0, 0) for none; None if they do not follow one another."""
    places = chosen.nonzero()[:, 0]
    if not len(places):
        return 0, 0
    first, last = int(places[0]), int(places[-1]) + 1
    return (first, last) if last - first == len(places) else None


def _shared_part(program: Program, keys: fx.Node, others: tuple[int, int]) -> fx.Node | None:
    """Return the value (batch, 1, tokens, size) that all heads have at these places of their keys."""
    size = others[1] - others[0]
    length = keys.meta["val"].shape[2]
    nowhere = _nowhere(program, _ends(keys))
    work, seen = [keys], {keys}
    while work:
        node = work.pop(0)
        value = node.meta.get("val")
        shape = list(value.shape) if isinstance(value, torch.Tensor) else []
        if len(shape) == 4 and shape[1] == 1 and shape[3] == size and same_size(shape[2], length):
            numbers = torch.arange(size).expand(sizes_of(program, node)).contiguous()
            try:
                placed = by_head(moved(program, keys, {**nowhere, node: numbers}))
            except (Untraceable, RuntimeError):
                placed = torch.empty(0, 0)
            if placed.numel() and bool((placed[:, others[0] : others[1]] == torch.arange(size)).all()):
                return node
        if _moves(node):
            following = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt)]
            work.extend(n for n in following if n not in seen)
            seen.update(following)
    return None


def _nowhere(program: Program, nodes: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    return {node: torch.full(sizes_of(program, node), ELSEWHERE) for node in nodes}


def attend_to_latents(
    program: Program, decoder: Decoder, node: fx.Node, latent: Latent, keys: fx.Node | None = None
) -> fx.Node:
    """Rewrite an attention to one over latents, and return its new keys, which are its values as well.

    Args:
        program: changed in place.
        decoder: of it.
        node: the attention.
        latent: what its keys and values come from.
        keys: the new keys, if another attention that reads the same keys and values has them already.
    """
    call = program.edit.call
    operands = dict(arguments(node))
    q = operands["q"]
    with program.edit.before(node):
        into, out = (_matrices(program, latent, rows) for rows in (latent.key_rows, latent.value_rows))
        projected = call(aten.slice.Tensor, q, 3, *latent.projected)
        queries = [call(aten.matmul.default, projected, into)]
        if latent.shared is not None:
            queries.append(call(aten.slice.Tensor, q, 3, *latent.others))
        new_q = queries[0] if len(queries) == 1 else call(aten.cat.default, queries, -1)
        new_k = _keys(program, decoder, latent) if keys is None else keys
        # the values are the first entries of the keys, so that one cache holds both
        operands |= {"q": new_q, "k": new_k, "v": new_k}
        args, kwargs = normal_call(node.target, operands)
        mixed = call(node.target, *args, **kwargs)
        latents = call(aten.slice.Tensor, mixed, 3, 0, latent.size)
        new = call(aten.matmul.default, latents, call(aten.permute.default, out, [0, 2, 1]))
    program.edit.replace(node, new, record=False)
    decoder.moving.update([projected, *queries, new_q, new_k, mixed, latents, new])
    return new_k


def _keys(program: Program, decoder: Decoder, latent: Latent) -> fx.Node:
    """Return latents, with what heads share of their keys, as keys of one head."""
    call, source = program.edit.call, latent.source
    if source.meta["val"].dim() == 3:
        source = call(aten.unsqueeze.default, source, 1)
        decoder.moving.add(source)
    return source if latent.shared is None else call(aten.cat.default, [source, latent.shared], -1)


def _matrices(program: Program, latent: Latent, rows: torch.Tensor) -> fx.Node:
    """Return the matrices of all heads, (heads, entries, size)."""
    call = program.edit.call
    heads, entries = rows.shape
    flat = rows.reshape(-1)
    names = {w.name for w in program.weights.values()}
    number = next(i for i in range(len(names) + 1) if f"latent.rows_{i}" not in names)
    index = program.edit.add_weight(f"latent.rows_{number}", flat, kind="constant", persistent=False)
    taken = call(aten.index_select.default, latent.weight, 0, index)
    return call(aten.reshape.default, taken, [heads, entries, latent.size])


__all__ = ["Latent", "attend_to_latents", "latent_of"]
