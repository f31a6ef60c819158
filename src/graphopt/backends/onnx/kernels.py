"""Parts of a program that ONNX Runtime has single kernels for, found in the dataflow and put in their place."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from ...ir.compat import surely_equal
from ...ir.facts import KVCache
from ...ir.program import Program
from ...ir.running.fold import drop_unread_weights, fold
from ...ir.schema import arguments, is_operator
from .context import context_length
from .few_bits import FLOAT, LOOKUP, PRODUCT, FewBits, Stored, few_bit_nodes, layout_of
from .rotary_tables import NoTable, half_table
from .runtime_operators import NORM

aten = torch.ops.aten
ATTENTION, SKIP_NORM = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"
FLOATS = (torch.float32, torch.float16)
"""Types that the kernels take on a CPU."""
ROWS = "one row where several tokens follow earlier ones"
"""Condition of GroupQueryAttention."""


@dataclass
class KernelUse:
    """Which sites of a program ONNX Runtime computes in kernels of its own.

    Attributes:
        used: number of sites by kernel.
        rotated: how many of the attentions rotate queries and keys themselves.
        left: for each kernel, why sites that it might have taken are in standard operators, with their number.
        conditions: what such a file requires beyond the program.
        rounding: largest relative error of an output, by norm, with inputs of products with few-bit weights rounded to 8
            bits; None where they are not, or nothing was compared.
    """

    used: dict[str, int] = field(default_factory=dict)
    rotated: int = 0
    left: dict[str, dict[str, int]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    rounding: float | None = None


class _Refused(ValueError):
    """A site stays as it is; the message says why."""


def use_kernels(program: Program, level: int = FLOAT) -> tuple[Program, KernelUse]:
    """Return a copy of a program in which kernels of ONNX Runtime have taken the place of what they compute.

    Args:
        program: as it is written; not changed.
        level: accuracy level of products with few-bit weights.
    """
    lowered = fold(program).copy()
    found = _Found(lowered)
    found.attentions()
    found.norms()
    # weights that were joined become weights
    lowered.edit.erase_dead(list(lowered.graph.nodes))
    found.program = lowered = fold(lowered).copy()
    found.few_bits(level)
    lowered.edit.erase_dead(list(lowered.graph.nodes))
    drop_unread_weights(lowered)
    lowered.changed()
    return lowered, found.use()


@dataclass(frozen=True)
class _Rotated:
    """A value before its rotation, with what it is rotated by; plain values have no ``cos``."""

    value: fx.Node
    heads_first: bool
    cos: fx.Node | None = None
    sin: fx.Node | None = None
    interleaved: bool = False


class _Found:
    """Finds and replaces the sites of one program."""

    def __init__(self, program: Program):
        self.program = program
        self.counts = Counter[str]()
        self.reasons: dict[str, Counter[str]] = {}
        self.rotated = 0
        self.conditions: list[str] = []
        self.tables: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.sizes: tuple[Any, Any] | None = None
        self.lengths: tuple[fx.Node, fx.Node] | None = None
        self.order: dict[fx.Node, int] = {}

    def use(self) -> KernelUse:
        """Return what was done."""
        left = {kernel: dict(counts.most_common()) for kernel, counts in self.reasons.items()}
        return KernelUse(dict(self.counts), self.rotated, left, tuple(self.conditions))

    def _leave(self, kernel: str, reason: str) -> None:
        self.reasons.setdefault(kernel, Counter())[reason] += 1

    # -- attention ----------------------------------------------------------------------------------

    def attentions(self) -> None:
        """Replace the attentions of new tokens over caches."""
        program = self.program
        sites = [n for n in program.graph.nodes if is_operator(n, "graphopt.attention")]
        self.order = {n: i for i, n in enumerate(program.graph.nodes)}
        for node in sites:
            try:
                self._attention(node)
            except _Refused as reason:
                self._leave(ATTENTION, str(reason))

    def _attention(self, node: fx.Node) -> None:
        program, args = self.program, arguments(node)
        cache = program.facts.get(KVCache)
        if cache is None or cache.positions not in program.input_nodes:
            raise _Refused("it has no cache")
        positions = program.input_nodes[cache.positions]
        self._check(args, positions)
        key, value = args["k"], args["v"]
        stored = {n: arguments(n) for n in (key, value)}
        self._check_users(node, key, value)
        q, k, v = args["q"], stored[key]["values"], stored[value]["values"]
        if q.meta["val"].dtype not in FLOATS or any(
            n.meta["val"].dtype != q.meta["val"].dtype for n in (k, v, key, value)
        ):
            raise _Refused(f"its type is {str(q.meta['val'].dtype).removeprefix('torch.')}")
        heads, size = int(q.meta["val"].shape[1]), int(q.meta["val"].shape[3])
        groups = int(k.meta["val"].shape[1])
        if size % 8:
            raise _Refused("its heads have a size that is no multiple of 8")
        if v.meta["val"].shape[3] != size:
            raise _Refused("values have another size than keys")
        plain, cos, sin, interleaved = (q, k), None, None, False
        try:
            plain, (cos, sin), interleaved = self._rotation(q, k, positions, size)
            self.rotated += 1
        except NoTable as reason:
            if str(reason):
                self._leave(f"rotation in {ATTENTION}", str(reason))
        with program.edit.before(node):
            # sizes and lengths are made once, before the first attention
            batch, tokens = self._sizes(positions)
            last, total = self._lengths(positions)
            rows = [
                self._rows(x, batch, tokens)
                if isinstance(x, _Rotated)
                else self._rows(_Rotated(x, True), batch, tokens)
                for x in (*plain, v)
            ]
            call = torch.ops.graphopt_runtime.group_query_attention.default
            result = program.edit.call(
                call, *self._joined_rows(rows), stored[key]["cache"], stored[value]["cache"], last, total, cos, sin,
                self._bias(args["bias"], q, tokens), args["sinks"], heads=heads, groups=groups, scale=float(args["scale"]),
                window=arguments(args["visible"])["window"], softcap=args["softcap"], interleaved=interleaved,
            )  # fmt: skip
            attended, next_key, next_value = (
                program.edit.call(operator.getitem, result, i) for i in range(3)
            )
        self._put_output(node, attended, batch, tokens, heads, size)
        program.edit.replace(key, next_key, record=False)
        program.edit.replace(value, next_value, record=False)
        self.counts[ATTENTION] += 1
        if ROWS not in self.conditions:
            self.conditions.append(ROWS)

    def _check(self, args: dict[str, Any], positions: fx.Node) -> None:
        """Refuse masks and operands other than those of plain caches."""
        for name, meaning in (("key_mask", "padding is masked"), ("segments", "rows have segments")):
            if args[name] is not None:
                raise _Refused(meaning)
        if args["causal"] or args["window"] is not None:
            raise _Refused("its mask is not that of a cache")
        for name in ("k", "v"):
            stored = args[name]
            if isinstance(stored, fx.Node) and stored.target is operator.getitem:
                raise _Refused("another attention stores its keys and values")
            if not isinstance(stored, fx.Node) or not is_operator(stored, "graphopt.cache_store"):
                raise _Refused("its keys and values are not in caches of their own")
            operands = arguments(stored)
            if operands["slots"] is not positions or operands["cache"].op != "placeholder":
                raise _Refused("tokens are stored elsewhere than at their positions, as in a tree")
        visible = args["visible"]
        if not isinstance(visible, fx.Node) or not is_operator(visible, "graphopt.cache_visible"):
            raise _Refused("its mask is not that of a cache")
        seen = arguments(visible)
        if (
            seen["positions"] is not positions
            or seen["slots"] is not positions
            or seen["step_mask"] is not None
        ):
            raise _Refused("tokens are stored elsewhere than at their positions, as in a tree")
        if args["sinks"] is not None and args["sinks"].meta["val"].dtype != args["q"].meta["val"].dtype:
            raise _Refused("its sinks have another type than its queries")
        if args["softcap"] is not None and args["softcap"] <= 0:
            raise _Refused("its soft cap is not positive")

    def _check_users(self, node: fx.Node, key: fx.Node, value: fx.Node) -> None:
        """Refuse caches that another attention reads first, or together with other caches."""
        for stored in (key, value):
            for user in stored.users:
                if user.op == "output" or user is node:
                    continue
                if self.order.get(user, -1) < self.order[node]:
                    raise _Refused("another node reads its caches before it")

    def _sizes(self, positions: fx.Node) -> tuple[Any, Any]:
        """Return the numbers of rows and of tokens, as integers or nodes."""
        if self.sizes is None:
            with self.program.edit.after(positions):
                self.sizes = tuple(  # type: ignore[assignment]
                    size
                    if isinstance(size, int)
                    else self.program.edit.call(aten.sym_size.int, positions, dim)
                    for dim, size in enumerate(positions.meta["val"].shape)
                )
        assert self.sizes is not None
        return self.sizes

    def _lengths(self, positions: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the last position of each row, and the largest number of keys."""
        if self.lengths is None:
            call = self.program.edit.call
            with self.program.edit.after(positions):
                last = call(aten.select.int, positions, 1, -1)
                rows = call(aten.to.dtype, last, torch.int32)
                total = call(aten.add.Tensor, call(aten.amax.default, last, [0]), 1)
                self.lengths = rows, call(aten.to.dtype, total, torch.int32)
        return self.lengths

    def _rows(self, x: _Rotated, batch: Any, tokens: Any) -> fx.Node:
        """Return (batch, tokens, heads · size) of a value with heads first or second, without moving it twice."""
        value, heads_first = _unpermuted(x.value, x.heads_first)
        shape = value.meta["val"].shape
        heads, size = int(shape[1 if heads_first else 2]), int(shape[3])
        if not heads_first and is_operator(value, "aten.reshape"):
            source = value.args[0]
            assert isinstance(source, fx.Node)
            before = source.meta["val"].shape
            if len(before) == 3 and before[-1] == heads * size:
                return source
        call = self.program.edit.call
        if heads_first:
            value = call(aten.permute.default, value, [0, 2, 1, 3])
        return call(aten.reshape.default, value, [batch, tokens, heads * size])

    def _joined_rows(self, rows: list[fx.Node]) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
        """Return queries, keys and values, in one product if they are products of one value."""
        q, k, v = rows
        products = [arguments(n) for n in rows if is_operator(n, "aten.linear")]
        if len(products) < 3:
            return q, k, v
        weights, biases = ([p[name] for p in products] for name in ("weight", "bias"))
        alike = len({p["input"] for p in products}) == 1 and len({b is None for b in biases}) == 1
        if not alike or len({layout_of(self.program, w) for w in weights}) != 1:
            return q, k, v
        if any(len(w.users) > 1 for w in weights) or None in map(partial(layout_of, self.program), weights):
            return q, k, v
        call = self.program.edit.call
        weight = call(aten.cat.default, weights, 0)
        bias = None if biases[0] is None else call(aten.cat.default, biases, 0)
        return call(aten.linear.default, products[0]["input"], weight, bias), None, None

    def _put_output(
        self, node: fx.Node, attended: fx.Node, batch: Any, tokens: Any, heads: int, size: int
    ) -> None:
        """Replace an attention by (batch, tokens, heads · size), where its readers want that directly."""
        program = self.program
        for moved in list(node.users):
            if not is_operator(moved, "aten.permute") or list(arguments(moved)["dims"]) != [0, 2, 1, 3]:
                continue
            for flat in list(moved.users):
                shape = tuple(flat.meta["val"].shape) if is_operator(flat, "aten.reshape") else ()
                if len(shape) == 3 and shape[-1] == heads * size:
                    program.edit.replace(flat, attended, record=False)
        program.edit.erase_dead([n for n in node.users if not n.users])
        if not node._erased and node.users:
            with program.edit.after(attended):
                call = program.edit.call
                apart = call(aten.reshape.default, attended, [batch, tokens, heads, size])
                program.edit.replace(node, call(aten.permute.default, apart, [0, 2, 1, 3]), record=False)

    def _bias(self, bias: Any, q: fx.Node, tokens: Any) -> Any:
        """Return the bias with a row for each query and the type of the queries."""
        if bias is None:
            return None
        call = self.program.edit.call
        for _ in range(4 - bias.meta["val"].dim()):
            bias = call(aten.unsqueeze.default, bias, 0)
        if bias.meta["val"].dtype != q.meta["val"].dtype:
            bias = call(aten.to.dtype, bias, q.meta["val"].dtype)
        if surely_equal(bias.meta["val"].shape[2], 1):
            bias = call(aten.expand.default, bias, [-1, -1, tokens, -1])
        return bias

    # -- rotation -----------------------------------------------------------------------------------

    def _rotation(
        self, q: fx.Node, k: fx.Node, positions: fx.Node, size: int
    ) -> tuple[tuple[_Rotated, _Rotated], tuple[fx.Node, fx.Node], bool]:
        """Return queries and keys before their rotation, and its tables.

        Raises:
            NoTable: the kernel cannot rotate them; without a message if nothing rotates them.
        """
        plain = _rotated(q), _rotated(k)
        if all(x.cos is None for x in plain):
            raise NoTable("")
        first, second = plain
        if (first.cos, first.sin, first.interleaved) != (second.cos, second.sin, second.interleaved):
            raise NoTable("queries and keys are rotated differently")
        assert first.cos is not None
        assert first.sin is not None
        width = first.cos.meta["val"].shape[-1]
        if size % 16 or not isinstance(width, int) or width % 16:
            raise NoTable("its channels are no multiple of 16")
        if first.cos.meta["val"].dtype != q.meta["val"].dtype:
            raise NoTable("its angles have another type than its queries")
        key = (first.cos, first.sin, first.interleaved)
        if key not in self.tables:
            count = context_length(self.program)
            names = ("cos", "sin")
            halves = [
                half_table(self.program, n, positions, count, first.interleaved)
                for n in (first.cos, first.sin)
            ]
            number = len(self.tables)
            self.tables[key] = tuple(  # type: ignore[assignment]
                self.program.edit.add_weight(f"rotary_{name}_{number}", half, kind="buffer")
                for name, half in zip(names, halves, strict=True)
            )
            if not isinstance(self.program.facts[KVCache].capacity, int):
                condition = f"at most {count} positions"
                if condition not in self.conditions:
                    self.conditions.append(condition)
        return plain, self.tables[key], first.interleaved

    # -- weights of few bits ------------------------------------------------------------------------

    def few_bits(self, level: int) -> None:
        """Replace products with few-bit weights, and look-ups in such tables."""
        edit, weights = self.program.edit, FewBits(self.program)
        products, lookups = few_bit_nodes(self.program)
        for node in products:
            args = arguments(node)
            x, bias = args["input"], args["bias"]
            dtype = x.meta["val"].dtype
            stored = weights.stored(args["weight"], dtype) if dtype in FLOATS else None
            if not isinstance(stored, Stored):
                if stored is not None:
                    self._leave(PRODUCT, stored)
                continue
            with edit.before(node):
                new = edit.call(
                    torch.ops.graphopt_runtime.matmul_nbits.default, x, stored.words, stored.scales, stored.zeros, bias,
                    bits=stored.bits, block=stored.block, columns=stored.columns, level=level,
                )  # fmt: skip
            edit.replace(node, new, record=False)
            self.counts[PRODUCT] += 1
        for node in lookups:
            args = arguments(node)
            dtype = node.meta["val"].dtype
            stored = weights.stored(args["weight"], dtype) if dtype in FLOATS else None
            if isinstance(stored, Stored):
                stored = _lookup_reason(stored) or stored
            if not isinstance(stored, Stored):
                if stored is not None:
                    self._leave(LOOKUP, stored)
                continue
            with edit.before(node):
                new = edit.call(
                    torch.ops.graphopt_runtime.gather_blocks.default, stored.words, args["indices"], stored.scales,
                    stored.zeros, bits=stored.bits, block=stored.block, columns=stored.columns,
                )  # fmt: skip
            edit.replace(node, new, record=False)
            self.counts[LOOKUP] += 1

    # -- norms --------------------------------------------------------------------------------------

    def norms(self) -> None:
        """Join additions with the norms that read them; the norms that are left are single kernels too."""
        for node in [n for n in self.program.graph.nodes if is_operator(n, "graphopt.rms_norm")]:
            if node._erased:
                continue
            reason = self._norm_reason(node)
            if reason:
                self._leave(NORM, reason)
                continue
            if self._joined(node):
                self.counts[SKIP_NORM] += 1
            else:
                self.counts[NORM] += 1

    def _norm_reason(self, node: fx.Node) -> str:
        """Return why no kernel computes a norm; empty if one does."""
        args = arguments(node)
        return norm_reason(
            args["x"].meta["val"], None if args["weight"] is None else args["weight"].meta["val"]
        )

    def _joined(self, node: fx.Node) -> bool:
        """Replace a norm and the addition that it reads, if one kernel does both."""
        args = arguments(node)
        total = args["x"]
        if not is_operator(total, "aten.add") or args["weight"] is None or total.meta["val"].dim() != 3:
            return False
        terms = arguments(total)
        x, skip = terms["self"], terms["other"]
        value = total.meta["val"]
        for term in (x, skip):
            if not isinstance(term, fx.Node) or not isinstance(term.meta["val"], torch.Tensor):
                return False
            if term.meta["val"].dtype != value.dtype or list(term.meta["val"].shape) != list(value.shape):
                return False
        if terms["alpha"] != 1 or args["weight"].meta["val"].dim() != 1:
            return False
        edit = self.program.edit
        weight = args["weight"]
        if weight.op != "placeholder":
            return False
        with edit.before(total):
            result = edit.call(torch.ops.graphopt_runtime.skip_rms_norm.default, x, skip, weight, args["eps"])
            normed, added = edit.call(operator.getitem, result, 0), edit.call(operator.getitem, result, 1)
        edit.replace(total, added, record=False)
        edit.replace(node, normed, record=False)
        return True


def _lookup_reason(stored: Stored) -> str:
    """Return why rows of a table cannot be looked up in the kernel's layout; empty if they can."""
    if stored.zeros is not None and stored.zeros.meta["val"].dtype != torch.uint8:
        return "its zeros are no codes"
    if stored.bits == 2:
        return "its codes have two bits"
    return "its last block is shorter" if stored.columns % stored.block else ""


def norm_reason(x: Any, weight: Any) -> str:
    """Return why ONNX Runtime has no kernel for a norm of these values; empty if it has."""
    if x.dtype not in FLOATS:
        return f"its type is {str(x.dtype).removeprefix('torch.')}"
    if weight is not None and weight.dtype != x.dtype:
        return "its weight has another type"
    if weight is not None and tuple(weight.shape) != tuple(x.shape[-1:]):
        return "its weight has another shape"
    return ""


def _unpermuted(value: fx.Node, heads_first: bool) -> tuple[fx.Node, bool]:
    """Return a value without the permutation that puts heads first, and whether they are first in it."""
    while is_operator(value, "aten.permute") and list(arguments(value)["dims"]) == [0, 2, 1, 3]:
        value, heads_first = arguments(value)["self"], not heads_first
    return value, heads_first


def _rotated(value: fx.Node) -> _Rotated:
    """Return what a value is before its rotation, which may leave its last channels alone."""
    inner, heads_first = _unpermuted(value, True)
    if is_operator(inner, "graphopt.rotary"):
        args = arguments(inner)
        if args["cos"].meta["val"].shape[-1] == args["x"].meta["val"].shape[-1]:
            return _Rotated(args["x"], heads_first, args["cos"], args["sin"], bool(args["interleaved"]))
    if is_operator(inner, "aten.cat") and len(arguments(inner)["tensors"]) == 2:
        args = arguments(inner)
        turned, rest = args["tensors"]
        if args["dim"] in (-1, 3) and is_operator(turned, "graphopt.rotary"):
            operands = arguments(turned)
            width = operands["x"].meta["val"].shape[-1]
            source = _whole(operands["x"], rest)
            if source is not None and operands["cos"].meta["val"].shape[-1] == width:
                return _Rotated(
                    source, heads_first, operands["cos"], operands["sin"], bool(operands["interleaved"])
                )
    return _Rotated(inner, heads_first)


def _whole(first: fx.Node, rest: fx.Node) -> fx.Node | None:
    """Return the value of which two values are the first and the remaining channels, if there is one."""
    pieces = (first, rest)
    if all(n.op == "call_function" and n.target is operator.getitem for n in pieces):
        split = first.args[0]
        if split is rest.args[0] and [n.args[1] for n in pieces] == [0, 1]:
            assert isinstance(split, fx.Node)
            if is_operator(split, "aten.split_with_sizes") and len(split.meta["val"]) == 2:
                args = arguments(split)
                source: fx.Node = args["self"]
                return source if args["dim"] in (-1, source.meta["val"].dim() - 1) else None
    if all(is_operator(n, "aten.slice") for n in pieces):
        one, other = (arguments(n) for n in pieces)
        source = one["self"]
        size, width = source.meta["val"].shape[-1], first.meta["val"].shape[-1]
        last = source.meta["val"].dim() - 1
        same = other["self"] is source and all(
            a["dim"] in (-1, last) and a["step"] == 1 for a in (one, other)
        )
        if same and not one["start"] and other["start"] == width:
            return source if width + rest.meta["val"].shape[-1] == size else None
    return None
