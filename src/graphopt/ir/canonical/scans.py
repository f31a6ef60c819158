"""Recognition of linear attention whose decays are constants, written as a product with a table of decays.

Retention (arXiv 2307.08621) and lightning attention (2405.17381) compute ``((q @ k^T) * D) @ v`` with
``D[i, j] = exp(g * (i - j))`` for every token ``j`` up to ``i``. Whether a table is such a ``D`` is found by evaluating it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from ..infer import same_size
from ..operators.traits import Trait, has
from ..running.region import cut, leaf_value
from ..schema import arguments, is_operator

if TYPE_CHECKING:
    from ..program import Program

aten = torch.ops.aten
_PRODUCTS = ("aten.matmul", "aten.bmm")
_TOKENS = 33
_ROUNDINGS = 8


def recognise_scans(program: Program) -> None:
    """Replace products with tables of decays by ``graphopt.linear_attention``, and drop their reads of empty states."""
    for node in list(program.graph.nodes):
        if node._erased or not is_operator(node, *_PRODUCTS):
            continue
        found = _operands(node)
        if found is None:
            continue
        q, k, v, table = found
        decays = _decays(program, table, q)
        if decays is None:
            continue
        name = f"decays_of_{node.name}"
        weight = program.edit.add_weight(name, decays, kind="constant", persistent=False)
        with program.edit.before(node):
            shape = program.size_nodes(list(v.meta["val"].shape[:3]))
            g = program.edit.call(aten.reshape.default, weight, [1, -1, 1])
            g = program.edit.call(aten.expand.default, g, shape)
            new = program.edit.call(torch.ops.graphopt.linear_attention.default, q, k, v, g)
        program.edit.replace(node, new, record=False)
        _without_empty_state(program, new)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """Return queries, keys, values and the table of ``((q @ k^T) * table) @ v``."""
    weighted, v = node.args[:2]
    if not isinstance(v, fx.Node) or v.meta["val"].dim() != 4 or not is_operator(weighted, "aten.mul"):
        return None
    for scores, table in (weighted.args[:2], weighted.args[1::-1]):  # type: ignore[union-attr]
        if not is_operator(scores, *_PRODUCTS) or not isinstance(table, fx.Node):
            continue
        assert isinstance(scores, fx.Node)
        q, transposed = scores.args[:2]
        if not isinstance(q, fx.Node) or not is_operator(transposed, "aten.permute"):
            continue
        assert isinstance(transposed, fx.Node)
        k, order = transposed.args[:2]
        if list(order) == [0, 1, 3, 2] and isinstance(k, fx.Node):  # type: ignore[arg-type]
            tokens = [x.meta["val"].shape[2] for x in (q, k, v)]
            if isinstance(tokens[0], torch.SymInt) and all(same_size(tokens[0], size) for size in tokens):
                return q, k, v, table
    return None


def _decays(program: Program, table: fx.Node, q: fx.Node) -> torch.Tensor | None:
    """Return the logarithm of each head's decay, (heads,), if a table depends on no input and is one of decays."""
    heads = q.meta["val"].shape[1]
    value = table.meta["val"]
    if (
        not value.dtype.is_floating_point
        or value.dim() not in (3, 4)
        or not isinstance(heads, int)
        or not same_size(value.shape[-3], heads)
    ):
        return None
    region = cut(program, [table], lambda n: isinstance(n.meta.get("val"), torch.SymInt))
    if any(isinstance(n.meta.get("val"), torch.Tensor) for n in region.leaves):
        return None
    if any(program.weights[n.name].trainable for n in region.weights):
        return None
    limits = program.signature.sizes
    sizes = {n: min(_TOKENS, r.high or _TOKENS) if r.low <= _TOKENS else r.hint for n, r in limits.items()}
    try:
        values = {n.name: leaf_value(program, n, sizes, 0) for n in region.leaves}
        found = region.run(values, lambda n: program.weights[n.name].source.load())[0]
    except (RuntimeError, IndexError):
        return None
    found = found.reshape(-1, *found.shape[-3:])
    tokens = found.shape[-1]
    if (
        found.shape[0] != 1
        or tokens < 2
        or found.shape[-2] != tokens
        or not bool((found[0, :, 1, 0] > 0).all())
    ):
        return None
    # of a table in few bits, entries of middle size say most about a decay
    columns = found[0, :, 1:, 0]
    middle = (columns.clamp(min=1e-30).log() + 1).abs().argmin(-1, keepdim=True)
    g = (columns.gather(1, middle).log() / (middle + 1)).squeeze(1)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    expected = (g[:, None, None] * distance.clamp(min=0)).exp() * (distance >= 0)
    close = _ROUNDINGS * torch.finfo(value.dtype).eps
    if not bool((g <= 0).all()) or not torch.allclose(found[0], expected, rtol=0.0, atol=close):
        return None
    return g if value.dtype is torch.float64 else g.float()


def _without_empty_state(program: Program, new: fx.Node) -> None:
    """Drop what is read from a state of zeros and added to the result: ``(q * decay) @ zeros``."""
    for user in list(new.users):
        if not is_operator(user, "aten.add"):
            continue
        other = next((n for n in user.all_input_nodes if n is not new), None)
        if other is None or not is_operator(other, *_PRODUCTS):
            continue
        state = arguments(other).get("other", other.args[1])
        if isinstance(state, fx.Node) and has(state, Trait.FILL) and is_operator(state, "aten.zeros"):
            program.edit.replace(user, new, record=False)


__all__ = ["recognise_scans"]
