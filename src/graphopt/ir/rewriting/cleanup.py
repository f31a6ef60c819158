"""Remove operators that compute nothing, and give equivalent calls one spelling."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from ..compat import symint
from ..constraints import parse_relation
from ..errors import VerificationError
from ..infer import same_value
from ..operators.traits import Trait, has
from ..schema import argument, arguments, is_mutable, normalise, operator_name
from ..sizes import expression
from ..weights import InMemory, digest
from .respelling import respelled
from .spelling import CASTS, DROPOUTS, NOTHING, SPLITS, SWAPS, TRANSPOSES, VIEWS, swapped

if TYPE_CHECKING:
    from ..program import Program

_ASSERTIONS = {
    "aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size", "aten._functional_assert_async", "aten._functional_assert_scalar",
}  # fmt: skip
_SPLITS = {*SPLITS, "aten.unsafe_chunk", "aten.unsafe_split", "aten.unsafe_split_with_sizes"}
_RENAMED = {
    "aten.logical_and": torch.ops.aten.bitwise_and.Tensor,
    "aten._softmax": torch.ops.aten.softmax.int,
}
# calls whose results differ even where their operands are equal
_NEVER_SHARED = Trait.RANDOM | Trait.EMPTY
_END = 2**63 - 1
_BEYOND = 64
_LARGEST_CONSTANT = 1 << 20
"""Bytes up to which constants are compared."""


def clean(program: Program) -> None:
    """Apply the rules of this file once, in execution order."""
    keeps_strides = any(operator_name(n.target) == "aten.as_strided" for n in program.graph.nodes)
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        usual = respelled(node.target)
        if usual is not None:
            node.target = usual
        name = operator_name(node.target)
        if name in _ASSERTIONS:
            program.graph.erase_node(node)
            continue
        if keeps_strides and name in ("aten.contiguous", "aten.clone"):
            continue
        rule = _CLEANUP_RULES.get(name)
        if rule is not None:
            rule(program, node)
        if not node._erased:
            normalise(node)
    drop_dead(program)


def settle_sizes(program: Program) -> None:
    """Replace symbolic sizes that tracing found to be fixed by plain integers, and bounds that hold in any case."""
    never: dict[sympy.Expr, bool] = {}

    def settled(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(settled(item) for item in value)
        if isinstance(value, torch.SymInt):
            size = expression(value)
            if size.is_Integer:
                return int(size)
            bounds = {
                part: part.args[1] if part.args[0].is_Integer else part.args[0]
                for part in sympy.preorder_traversal(size)
                if type(part).__name__ == "Min" and len(part.args) == 2
            }
            for part in bounds:
                if part not in never:
                    never[part] = _never_reached(program, part)
            kept = {part: other for part, other in bounds.items() if never[part]}
            return symint(program.mode, size.subs(kept), value.node.hint) if kept else value
        if isinstance(value, torch.Tensor) and any(settled(size) is not size for size in value.shape):
            return program.fake([settled(size) for size in value.shape], value.dtype)
        return value

    for node in program.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = settled(node.meta["val"])


def _never_reached(program: Program, least: sympy.Expr) -> bool:
    """Tell whether the bound of ``min(number, size)`` lies beyond all sizes that the program takes."""
    bound, symbol = sorted(least.args, key=lambda a: not a.is_Integer)
    name = program.symbols.get(symbol)
    if not bound.is_Integer or name is None:
        return False
    limits = program.signature.sizes
    beyond = torch.arange(int(bound) + 1, 2 * int(bound) + _BEYOND, dtype=torch.float64)
    taken = torch.ones_like(beyond, dtype=torch.bool)
    high = limits[name].high
    if high is not None:
        taken &= beyond <= high
    hints = {n: r.hint for n, r in limits.items()}
    for text in program.signature.constraints:
        taken &= torch.as_tensor(parse_relation(text, frozenset(limits)).holds({**hints, name: beyond}))
    return not bool(taken.any())


def respell_transposes(program: Program) -> None:
    """Rewrite every transposition as a permutation, whose inverse is known."""
    for node in list(program.graph.nodes):
        if not node._erased and operator_name(node.target) in TRANSPOSES and node.op == "call_function":
            _permute(program, node)


def drop_dead(program: Program) -> None:
    """Erase calls whose results are unused, and weights that neither the graph nor the checkpoint mapping reads."""
    from ..running.fold import drop_unread_weights

    checkpoint_nodes = set(program.checkpoint.values())
    for node in reversed(list(program.graph.nodes)):
        if (
            node.op == "call_function"
            and not node.users
            and node not in checkpoint_nodes
            and not is_mutable(node.target)
        ):
            program.graph.erase_node(node)
    drop_unread_weights(program)
    program.changed()


def share_constants(program: Program) -> None:
    """Merge equal constants, such as a number of which every layer makes a tensor of its own."""
    seen: dict[str, fx.Node] = {}
    for node in program.weight_nodes:
        weight = program.weights[node.name]
        if (
            weight.kind != "constant"
            or weight.bytes > _LARGEST_CONSTANT
            or node in program.checkpoint.values()
        ):
            continue
        first = seen.setdefault(digest(weight.source.load()), node)
        if first is not node:
            node.replace_all_uses_with(first)
            program.edit.remove_weight(node)


def share_equal(program: Program) -> None:
    """Merge equal computations on equal operands, such as masks and rotary tables computed in every layer."""
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "call_function" or is_mutable(node.target) or has(node, _NEVER_SHARED):
            continue
        try:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            first = seen.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            program.edit.replace(node, first, record=False)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    # True == 1 == 1.0, but they are different arguments
    return value if isinstance(value, fx.Node) else (type(value), value)


def _same(program: Program, node: fx.Node, source: fx.Node) -> bool:
    """Replace a node by its operand if their values have the same type and sizes."""
    if not isinstance(source, fx.Node) or not same_value(node.meta.get("val"), source.meta.get("val")):
        return False
    program.edit.replace(node, source, record=False)
    return True


def replace_or_erase(program: Program, old: fx.Node, new: fx.Node) -> bool:
    """Replace a node by one that computes the same; erase that one and return False if it has another type or shape."""
    if same_value(old.meta["val"], new.meta["val"]):
        program.edit.replace(old, new, record=False)
        return True
    program.edit.erase_dead([new])
    return False


def _drop(program: Program, node: fx.Node) -> None:
    _same(program, node, node.args[0])  # type: ignore[arg-type]


def _dropout(program: Program, node: fx.Node) -> None:
    if argument(node, "train") is False or argument(node, "p") == 0.0:
        _drop(program, node)


def _cast(program: Program, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if _same(program, node, source):
        return
    _swap(program, node, torch.ops.aten.to.dtype, source, node.meta["val"].dtype)


def _view(program: Program, node: fx.Node) -> None:
    if node.target is torch.ops.aten.view.dtype:
        return
    source, shape = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    if _same(program, node, source):
        return
    if isinstance(shape, fx.Node):
        _flatten(program, node)
        return
    _swap(program, node, torch.ops.aten.reshape.default, source, shape)


def _flatten(program: Program, node: fx.Node) -> None:
    """Rewrite a flattening, or its inverse, as a reshape; one unknown size is inferred, the others are read."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if _same(program, node, source):
        return
    sizes = list(node.meta["val"].shape)
    unknown = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    for position in unknown[-1:]:
        sizes[position] = -1
    try:
        with program.edit.before(node):
            shape = program.size_nodes(sizes)
    except VerificationError:
        return
    _swap(program, node, torch.ops.aten.reshape.default, source, shape)


def _permute(program: Program, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = source.meta["val"].dim()
    order = list(range(rank))
    name = operator_name(node.target)
    if rank < 2:
        _same(program, node, source)
        return
    if name in SWAPS:
        first, second = SWAPS[name] or (int(a) for a in node.args[1:3])  # type: ignore[arg-type]
        order = swapped(rank, first, second)
    elif name == "aten.numpy_T":
        order.reverse()
    else:
        moved = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])  # type: ignore[arg-type]
        destinations = [node.args[2]] if isinstance(node.args[2], int) else list(node.args[2])  # type: ignore[arg-type]
        remaining = [d for d in order if d not in {m % rank for m in moved}]
        for position, dim in sorted(
            zip((p % rank for p in destinations), (m % rank for m in moved), strict=True)
        ):
            remaining.insert(position, dim)
        order = remaining
    _swap(program, node, torch.ops.aten.permute.default, source, order)


def merge_permutes(program: Program, node: fx.Node) -> None:
    """Remove a permutation that changes nothing, or that undoes the one before it."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    order = [int(d) % source.meta["val"].dim() for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    if order == sorted(order):
        _same(program, node, source)
    elif operator_name(source.target) == "aten.permute":
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        first = [int(d) % len(order) for d in source.args[1]]  # type: ignore[union-attr, arg-type]
        both = [first[d] for d in order]
        if both == sorted(both):
            _same(program, node, inner)


def _split(program: Program, node: fx.Node) -> None:
    """Rewrite chunk and split as split_with_sizes where the sizes are known."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = int(argument(node, "dim"))
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        _swap(program, node, torch.ops.aten.split_with_sizes.default, source, sizes, dim)


def _expand(program: Program, node: fx.Node) -> None:
    _drop(program, node)


def _like(program: Program, node: fx.Node) -> None:
    """Let constant integers of the shape of activations read that shape's sizes instead: they depend on no activation."""
    value, source = node.meta["val"], node.args[0]
    assert isinstance(source, fx.Node)
    if value.dtype.is_floating_point or not source.meta["val"].dtype.is_floating_point:
        return
    fill = argument(node, "fill_value") if operator_name(node.target) == "aten.full_like" else None
    try:
        with program.edit.before(node):
            shape = program.size_nodes(list(value.shape))
    except VerificationError:
        return
    options = {"dtype": value.dtype, "device": value.device}
    with program.edit.before(node):
        if fill is None:
            ones = operator_name(node.target) == "aten.ones_like"
            target = torch.ops.aten.ones.default if ones else torch.ops.aten.zeros.default
            new = program.edit.call(target, shape, **options)
        else:
            new = program.edit.call(torch.ops.aten.full.default, shape, fill, **options)
    replace_or_erase(program, node, new)


def _cat(program: Program, node: fx.Node) -> None:
    """Drop parts without any element, as caches that begin empty are, and joins of a single value."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)):
        return
    kept = [p for p in parts if not (isinstance(p, fx.Node) and str(list(p.meta["val"].shape)) == "[0]")]
    if (len(kept) == len(parts) and len(parts) > 1) or node.meta["val"].dim() < 2 or not kept:
        return
    if len(kept) == 1 and isinstance(kept[0], fx.Node):
        _same(program, node, kept[0])
    else:
        node.args = (kept, *node.args[1:])
        program.changed()


def _slice(program: Program, node: fx.Node) -> None:
    values = arguments(node)
    start = values["start"]
    if isinstance(start, fx.Node):
        # as many from the end as there are
        size, back = node.args[0].meta["val"].shape[values["dim"]], start.meta["val"]  # type: ignore[union-attr]
        start = 0 if isinstance(back, torch.SymInt) and expression(back) + expression(size) == 0 else start
    if start in (None, 0) and values["step"] == 1:
        end = values["end"]
        if end is None or (isinstance(end, int) and end >= _END) or not isinstance(end, int):
            _drop(program, node)
        else:
            size = node.args[0].meta["val"].shape[values["dim"]]  # type: ignore[union-attr]
            if isinstance(size, int) and end >= size:
                _drop(program, node)


def _index(program: Program, node: fx.Node) -> None:
    """Rewrite indexing by evenly spaced constant positions as a slice."""
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(indices, (list, tuple))
    chosen = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    if len(chosen) != 1 or not isinstance(chosen[0][1], fx.Node):
        return
    dim, index = chosen[0]
    weight = program.weights.get(index.name)
    if weight is None or not isinstance(weight.source, InMemory) or weight.kind == "parameter":
        return
    positions = weight.source.tensor
    size = source.meta["val"].shape[dim]
    if (
        positions.dim() != 1
        or positions.dtype.is_floating_point
        or positions.dtype is torch.bool
        or not isinstance(size, int)
    ):
        return
    chosen_positions = [int(i) % size for i in positions]
    if not chosen_positions:
        return
    step = chosen_positions[1] - chosen_positions[0] if len(chosen_positions) > 1 else 1
    if step > 0 and chosen_positions == list(range(chosen_positions[0], chosen_positions[-1] + 1, step)):
        _swap(
            program,
            node,
            torch.ops.aten.slice.Tensor,
            source,
            dim,
            chosen_positions[0],
            chosen_positions[-1] + 1,
            step,
        )


def _extreme(program: Program, node: fx.Node) -> None:
    """Rewrite ``max`` and ``min`` of two values as ``maximum`` and ``minimum``."""
    if node.target in _EXTREMES:
        _swap(program, node, _EXTREMES[node.target], *node.args)


_EXTREMES: dict[Any, Any] = {
    torch.ops.aten.max.other: torch.ops.aten.maximum.default,
    torch.ops.aten.min.other: torch.ops.aten.minimum.default,
}


def _neutral(value: float) -> Callable[[Program, fx.Node], None]:
    def rule(program: Program, node: fx.Node) -> None:
        other = node.args[1]
        equal = isinstance(other, (int, float)) and not isinstance(other, bool) and other == value
        if equal and len(node.args) == 2 and not node.kwargs:
            _drop(program, node)

    return rule


def _rename(program: Program, node: fx.Node) -> None:
    name = operator_name(node.target)
    if name == "aten.logical_and":
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if len(operands) != 2 or any(o.meta["val"].dtype is not torch.bool for o in operands):
            return
        _swap(program, node, _RENAMED[name], *operands)
    elif argument(node, "half_to_float") is False:
        _swap(program, node, _RENAMED[name], node.args[0], node.args[1])


def _getitem(program: Program, node: fx.Node) -> None:
    source, _ = node.args
    if isinstance(source, fx.Node) and operator_name(source.target) == "aten.split_with_sizes":
        sizes = source.args[1]
        if isinstance(sizes, list) and len(sizes) == 1:
            _same(program, node, source.args[0])  # type: ignore[arg-type]


def _swap(program: Program, node: fx.Node, target: Any, *args: Any) -> None:
    """Replace the node by a call of another operator that computes the same value."""
    if node.target is target:
        return
    with program.graph.inserting_before(node):
        new = program.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    for name, mapped in list(program.checkpoint.items()):
        if mapped is node:
            program.checkpoint[name] = new
    program.graph.erase_node(node)
    program.changed()
    if target is torch.ops.aten.permute.default:
        merge_permutes(program, new)


_CLEANUP_RULES: dict[str, Callable[[Program, fx.Node], None]] = {
    **dict.fromkeys(NOTHING, _drop),
    **dict.fromkeys(DROPOUTS, _dropout),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(TRANSPOSES, _permute),
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(_RENAMED, _rename),
    "aten.permute": merge_permutes,
    "aten.flatten": _flatten,
    "aten.unflatten": _flatten,
    "aten.expand": _expand,
    "aten.expand_as": _expand,
    **dict.fromkeys(("aten.zeros_like", "aten.ones_like", "aten.full_like"), _like),
    "aten.cat": _cat,
    "aten.slice": _slice,
    "aten.index": _index,
    "aten.max": _extreme,
    "aten.min": _extreme,
    "aten.mul": _neutral(1),
    "aten.div": _neutral(1),
    "aten.add": _neutral(0),
    "aten.sub": _neutral(0),
    operator.getitem.__name__: _getitem,
}


def order_readers(program: Program) -> None:
    """Put the readers of each value in the order of the graph, as they are in a program that is loaded.

    Otherwise messages that name one of them, and whatever takes the first, depend on how the graph was edited.
    """
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    for node in places:
        readers = sorted(node.users, key=places.__getitem__)
        node.users.clear()
        node.users.update(dict.fromkeys(readers))
