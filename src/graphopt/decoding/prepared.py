"""Steps of fixed shapes as straight-line code: buffers are allocated once, views are made once, operators write in place.

A step of one token is a thousand calls on a few numbers each. Run operator by operator, what it does beside reading the
weights (dispatch, allocation, views) takes as long as reading them. Here a step is run once node by node, which says
what every node gives: its sizes, its layout, and whose memory it shares. From that a function is written in which
views are gone, results go to memory that is used again, and what never changes is computed beforehand. Nothing is
assumed of an operator that is not listed here: it is called as it stands, and its result is a new tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.nn import functional as F

from ..ir.compat import int4_product
from ..ir.quantised.products import FewBitProduct
from ..ir.running.evaluate import evaluate, last_uses
from ..ir.schema import arguments, is_mutable, is_operator
from .reading import rows_read, tokens_read
from .states import attend_linearly, convolve
from .step import Buffer, Step, attend, attend_where_read, positions_of_slots, store, store_whole
from .weights import few_bit_linear, joined_linear

Outputs = dict[str, torch.Tensor]

TOKENS = 64
"""Steps of more tokens (prompts) are not prepared: arithmetic dominates them, and each length is a shape of its own."""

# what torch offers as plain functions, which are called in half the time of an overload of torch.ops
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.sub.Tensor": torch.sub,
    "aten.mul.Tensor": torch.mul,
    "aten.div.Tensor": torch.div,
    "aten.neg.default": torch.neg,
    "aten.cos.default": torch.cos,
    "aten.sin.default": torch.sin,
    "aten.exp.default": torch.exp,
    "aten.tanh.default": torch.tanh,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.sqrt.default": torch.sqrt,
    "aten.rsqrt.default": torch.rsqrt,
    "aten.pow.Tensor_Scalar": torch.pow,
    "aten.cat.default": torch.cat,
    "aten.mean.dim": torch.mean,
    "aten.bmm.default": torch.bmm,
    "aten.mm.default": torch.mm,
}  # fmt: skip
_OUT_OVERLOADS = {"aten.silu.default", "aten.gelu.default"}
_COPIES = ("aten.to", "aten.clone", "aten.contiguous", "aten._to_copy")
_VIEWS: dict[str, Callable[..., Any]] = {
    "aten.permute.default": torch.permute,
    "aten.reshape.default": torch.reshape,
    "aten.transpose.int": torch.transpose,
    "aten.unsqueeze.default": torch.unsqueeze,
    "aten.squeeze.dim": torch.squeeze,
}


@dataclass(frozen=True)
class _Layout:
    """Where the entries of a tensor lie in the storage that it shares."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> _Layout:
        return _Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @property
    def contiguous(self) -> bool:
        """Whether entries lie in order, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def dense(self) -> bool:
        """Whether entries fill their memory, in any order of dimensions."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return self.numel > 0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.size)


@dataclass
class _Seen:
    """What one run showed of a node.

    Attributes:
        layout: of its result; of each result where it gives several; None if it is no tensor.
        fixed: its sizes are the same at every step of these shapes.
        steady: its values are the same at every step.
        value: its value, if it is steady.
        shares: the node whose memory it shares, if any.
    """

    layout: _Layout | tuple[_Layout, ...] | None
    fixed: bool = False
    steady: bool = False
    value: Any = None
    shares: fx.Node | None = None


def preparable(graph: fx.Graph) -> bool:
    """Tell whether no node writes to its operands, so that results may share memory."""
    return not any(is_mutable(node.target) for node in graph.nodes)


class Prepared:
    """One step of fixed shapes.

    Args:
        graph: as :class:`Running` makes it: the step, then constants, then inputs are its placeholders.
        constants: values of the placeholders after the step.
        outputs: names of the results, in order.
        step: a step of these shapes; it is run.
        inputs: values of the remaining placeholders; further steps take tensors of the same sizes and types.

    Attributes:
        first: outputs of the step that was run.
        source: the code.
    """

    def __init__(
        self, graph: fx.Graph, constants: Sequence[Any], outputs: Sequence[str], step: Step,
        inputs: Sequence[torch.Tensor],
    ):  # fmt: skip
        self.outputs = list(outputs)
        # the step's own inputs lie in memory of their own, as these have to for their views to be the same
        inputs = [value.clone(memory_format=torch.contiguous_format) for value in inputs]
        with torch.inference_mode():
            run = _Recording(graph, constants, step, inputs)
            self.first = dict(zip(outputs, run.results, strict=True))
            writer = _Writer(run, step)
        self.source = writer.source()
        self._inputs = writer.inputs
        self._order = writer.caches
        scope = writer.scope
        exec(compile(self.source, "<prepared step>", "exec"), scope)
        self._function: Callable[..., tuple[torch.Tensor, ...]] = scope["prepared_step"]

    def __call__(self, step: Step, inputs: Iterable[torch.Tensor]) -> Outputs:
        """Run one step and return the outputs by name."""
        caches = [step.buffers[buffer] for buffer in self._order]
        with torch.inference_mode():
            for own, value in zip(self._inputs, inputs, strict=True):
                own.copy_(value)
            return dict(zip(self.outputs, self._function(step, caches), strict=True))


class _Recording:
    """A run of a graph node by node, and what it showed."""

    def __init__(self, graph: fx.Graph, constants: Sequence[Any], step: Step, inputs: Sequence[torch.Tensor]):
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        placeholders = graph.find_nodes(op="placeholder")
        self.step, *others = placeholders
        self.roots: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.inputs = others[len(constants) :]
        self.seen: dict[fx.Node, _Seen] = {}
        values: dict[fx.Node, Any] = {self.step: step}
        for node, value in zip(others, [*constants, *inputs], strict=True):
            values[node] = value
            layout = _Layout.of(value) if isinstance(value, torch.Tensor) else None
            steady = node not in self.inputs
            self.seen[node] = _Seen(layout, fixed=True, steady=steady, value=value if steady else None)
        freed = last_uses(self.nodes, [*self.roots, *others, self.step])
        for node in self.nodes:
            values[node] = evaluate(node, values)
            self.seen[node] = self._described(node, values)
            for dead in freed.get(node, ()):
                values.pop(dead, None)
        self.results = [values[n] for n in self.roots]

    def _described(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> _Seen:
        value, read = values[node], node.all_input_nodes
        if node.target in (rows_read, tokens_read):
            # prepared steps read all of their tokens
            operand: fx.Node = node.args[1]  # type: ignore[assignment]
            return replace(self.seen[operand], shares=operand)
        known = [self.seen[n] for n in read if n is not self.step]
        drawn = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        steady = self.step not in read and not drawn and all(s.steady for s in known)
        if is_operator(node, "aten.sym_size"):
            # sizes of what is fixed do not depend on its values
            steady = known[0].fixed
        if node.target in (store, store_whole, positions_of_slots):
            fixed = False
        elif node.target in (attend, attend_where_read, attend_linearly, convolve):
            fixed = True
        else:
            fixed = steady or (all(s.fixed for s in known) and _bound(node))
        several = isinstance(value, (tuple, list)) and all(isinstance(v, torch.Tensor) for v in value)
        layout: _Layout | tuple[_Layout, ...] | None = None
        if isinstance(value, torch.Tensor):
            layout = _Layout.of(value)
        elif several:
            layout = tuple(_Layout.of(v) for v in value)
        parts = [value] if isinstance(value, torch.Tensor) else list(value) if several else []
        shares = None
        for other in read:
            if other is not self.step and any(_overlap(p, values[other]) for p in parts):
                shares = other
        return _Seen(layout, fixed, steady, value if steady else None, shares)


def _bound(node: fx.Node) -> bool:
    """Tell whether the sizes of a result follow from those of the operands, not from their values."""
    if node.target in (joined_linear, few_bit_linear, operator.getitem):
        return True
    found = node.meta.get("val")
    parts: list[Any] = list(found) if isinstance(found, (tuple, list)) else [found]
    if not all(isinstance(p, torch.Tensor) for p in parts):
        return False
    sizes = [n for p in parts for n in p.shape if isinstance(n, torch.SymInt)]
    symbols = {str(s) for n in sizes for s in n.node.expr.free_symbols}
    # sizes that depend on values are called u and a number
    return not any(name.startswith("u") for name in symbols)


def _overlap(a: torch.Tensor, b: Any) -> bool:
    others = b if isinstance(b, (tuple, list)) else [b]
    return any(
        isinstance(o, torch.Tensor) and a.untyped_storage().data_ptr() == o.untyped_storage().data_ptr()
        for o in others
    )


@dataclass
class _Static:
    """A tensor that is at the same place at every step, and the name of the code for it."""

    name: str
    tensor: torch.Tensor
    root: fx.Node | None = None


@dataclass
class _Writer:
    """Writes the code of a step from a recording."""

    run: _Recording
    given: Step
    scope: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    caches: list[Buffer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.static: dict[fx.Node, _Static | tuple[_Static, ...]] = {}
        self.free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self.names: dict[int, str] = {}
        self.numbers: dict[fx.Node, int] = {}
        self.kept: list[Any] = []
        self.single = self.given.positions.shape[1] == 1
        self.fresh = self._outputs_and_their_memory()
        self.last = self._last_uses()
        for node in self.run.inputs:
            layout = self.run.seen[node].layout
            assert isinstance(layout, _Layout)
            own = torch.empty(layout.size, dtype=layout.dtype)
            self.run.seen[node].layout = _Layout.of(own)
            self.inputs.append(own)
            self.static[node] = _Static(self._global(own), own, node)
        self.scope |= {
            "store": store,
            "attend": attend,
            "norm_row": norm_row,
            "attention": F.scaled_dot_product_attention,
        }
        self.scope |= {"mm": torch.mm, "addmm": torch.addmm, "inf": math.inf, "nan": math.nan}
        for index, node in enumerate(self.run.nodes):
            seen = self.run.seen[node]
            if not seen.steady:
                self._write(node, seen)
            for dead in self.last.get(index, ()):
                self._release(dead)

    def source(self) -> str:
        """Return the code: a function of the step and its caches."""
        # memory of the step's own is written again by the next one
        results = ", ".join(self._text(n) + (".clone()" if n in self.static else "") for n in self.run.roots)
        head = ["def prepared_step(step, caches):"]
        if self.single:
            # rows are equally long: the caches are written at one place, and all of them is attended to
            head += [
                "plain = step.start is not None and step.step_mask is None and step.watch is None",
                "whole = plain and not step.weighs",
            ]
            head += ["slot = step.slots[0]", "limit = step.limit"]
        return "\n    ".join([*head, *self.lines, f"return ({results},)"]) + "\n"

    # -- which memory --------------------------------------------------------------------------------

    def _outputs_and_their_memory(self) -> set[fx.Node]:
        """Return the nodes whose results leave the step, or share the memory of one that does."""
        leaving: set[fx.Node] = set()
        for root in self.run.roots:
            node: fx.Node | None = root
            while node is not None and node not in leaving:
                leaving.add(node)
                node = self.run.seen[node].shares
        return leaving

    def _owner(self, node: fx.Node) -> fx.Node:
        """Return the node whose result is the memory that a node's value lies in."""
        while (shares := self.run.seen[node].shares) is not None:
            node = shares
        return node

    def _last_uses(self) -> dict[int, list[fx.Node]]:
        last: dict[fx.Node, int] = {}
        for index, node in enumerate(self.run.nodes):
            last[self._owner(node)] = index
            for read in node.all_input_nodes:
                if read is not self.run.step:
                    last[self._owner(read)] = index
        at: dict[int, list[fx.Node]] = {}
        for node, index in last.items():
            at.setdefault(index, []).append(node)
        return at

    def _release(self, node: fx.Node) -> None:
        """Let what a node's result lies in be used again."""
        found = self.static.get(node)
        if isinstance(found, _Static) and found.root is node and node not in self.run.inputs:
            flat = self.scope[found.name + "_memory"]
            self.free.setdefault((flat.dtype, flat.numel()), []).append(flat)
        elif isinstance(found, tuple) and node in self.run.nodes and found and found[0].root is node:
            flat = self.scope[found[0].name + "_memory"]
            self.free.setdefault((flat.dtype, flat.numel()), []).append(flat)

    def _memory(self, layout: _Layout) -> torch.Tensor:
        """Return memory for a result, which is not in use."""
        key = (layout.dtype, layout.numel)
        if self.free.get(key):
            return self.free[key].pop()
        return torch.empty(layout.numel, dtype=layout.dtype)

    def _place(self, node: fx.Node) -> torch.Tensor | None:
        """Return a static tensor for a node's result; None if it needs a new one at every step."""
        seen = self.run.seen[node]
        layout = seen.layout
        if not isinstance(layout, _Layout) or not seen.fixed or node in self.fresh or seen.shares is not None:
            return None
        if not layout.dense:
            return None
        flat = self._memory(layout)
        tensor = flat.as_strided(layout.size, layout.stride, 0)
        self._static(node, tensor, flat)
        return tensor

    def _static(self, node: fx.Node, tensor: torch.Tensor, flat: torch.Tensor) -> None:
        name = self._global(tensor)
        self.scope[name + "_memory"] = flat
        self.static[node] = _Static(name, tensor, node)

    def _view(self, node: fx.Node, seen: _Seen) -> bool:
        """Make the views that a node gives of static memory, now and for all steps; tell whether it gives any."""
        if seen.shares is None or not seen.fixed or seen.layout is None:
            return False
        others = [n for n in node.all_input_nodes if n not in (seen.shares, self.run.step)]
        if self.run.step in node.all_input_nodes and node.target is not rows_read:
            return False
        if not all(self.run.seen[n].steady for n in others):
            return False  # which part it is may be another at the next step
        owner = self._owner(node)
        found, base = self.static.get(owner), self.run.seen[owner].layout
        if found is None:
            return False
        if isinstance(found, tuple):
            assert isinstance(base, tuple)
            whole, origin = self.scope[found[0].name + "_memory"], base[0].offset
        else:
            assert isinstance(base, _Layout)
            whole, origin = found.tensor, base.offset

        def view(layout: _Layout) -> _Static:
            if layout.dtype == whole.dtype:
                tensor = whole.as_strided(layout.size, layout.stride, layout.offset - origin)
                return _Static(self._global(tensor), tensor, owner)
            # pairs of numbers as complex ones, or the reverse: offsets count in other units
            place = (
                layout.offset * layout.dtype.itemsize
                + (whole.storage_offset() - origin) * whole.dtype.itemsize
            )
            tensor = torch.empty(0, dtype=layout.dtype)
            tensor.set_(whole.untyped_storage(), place // layout.dtype.itemsize, layout.size, layout.stride)
            return _Static(self._global(tensor), tensor, owner)

        if isinstance(seen.layout, tuple):
            self.static[node] = tuple(view(part) for part in seen.layout)
        else:
            self.static[node] = view(seen.layout)
        return True

    # -- text ----------------------------------------------------------------------------------------

    def _global(self, value: Any) -> str:
        """Return a name of the code for a value."""
        if id(value) not in self.names:
            self.names[id(value)] = f"g{len(self.names)}"
            self.kept.append(value)  # an id belongs to a value for as long as the value lives
            self.scope[self.names[id(value)]] = value
        return self.names[id(value)]

    def _local(self, node: fx.Node) -> str:
        """Return the name of a local variable; a number, since names in files may be anything."""
        return f"v{self.numbers.setdefault(node, len(self.numbers))}"

    def _text(self, value: Any) -> str:
        """Return the code for an argument."""
        if isinstance(value, fx.Node):
            if value is self.run.step:
                return "step"
            seen = self.run.seen[value]
            if seen.steady:
                return self._text(seen.value)
            found = self.static.get(value)
            if isinstance(found, _Static):
                return found.name
            if isinstance(found, tuple):
                return "(" + "".join(f"{part.name}, " for part in found) + ")"
            return self._local(value)
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{self._text(v)}, " for v in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        return self._global(value)

    def _call(self, function: str, node: fx.Node) -> str:
        parts = [self._text(a) for a in node.args]
        parts += [f"{key}={self._text(a)}" for key, a in node.kwargs.items()]
        return f"{function}({', '.join(parts)}"

    # -- nodes ---------------------------------------------------------------------------------------

    def _write(self, node: fx.Node, seen: _Seen) -> None:
        """Write the code of one node."""
        if node.target is store:
            self._write_store(node)
        elif node.target in (attend, attend_where_read):
            self._write_attend(node)
        elif not self._view(node, seen):
            for applies, write in (
                (is_operator(node, "aten.linear"), self._write_linear),
                (node.target is joined_linear, self._write_joined),
                (node.target is few_bit_linear, self._write_few_bits),
                (is_operator(node, "graphopt.rms_norm"), self._write_norm),
                (is_operator(node, "graphopt.rotary"), self._write_rotary),
                (is_operator(node, *_COPIES), self._write_copy),
            ):
                if applies and write(node):
                    return
            self._write_other(node)

    def _write_other(self, node: fx.Node) -> None:
        name = str(node.target)
        function = _FUNCTIONS.get(name)
        if (function is not None or name in _OUT_OVERLOADS) and (place := self._place(node)) is not None:
            if function is None:
                function = node.target.overloadpacket.out  # type: ignore[union-attr]
            self.lines.append(f"{self._call(self._global(function), node)}, out={self._global(place)})")
            return
        called = function or _VIEWS.get(name) or node.target
        if called is operator.getitem:
            self.lines.append(f"{self._local(node)} = {self._text(node.args[0])}[{self._text(node.args[1])}]")
            return
        self.lines.append(f"{self._local(node)} = {self._call(self._global(called), node)})")

    def _write_store(self, node: fx.Node) -> None:
        _, buffer, values = node.args
        if buffer not in self.caches:
            self.caches.append(buffer)  # type: ignore[arg-type]
        text = f"store(step, {buffer!r}, {self._text(values)})"
        layout = self.run.seen[values].layout  # type: ignore[index]
        cache = self.given.buffers[buffer]  # type: ignore[index]
        if self.single and isinstance(layout, _Layout) and layout.dtype == cache.dtype:
            place = f"caches[{self.caches.index(buffer)}]"  # type: ignore[arg-type]
            plain = f"{place}.index_copy_(2, slot, {self._text(values)}).narrow(2, 0, limit)"
            text = f"{plain} if plain else {text}"
        self.lines.append(f"{self._local(node)} = {text}")

    def _write_attend(self, node: fx.Node) -> None:
        _, q, k, v, bias, sinks, scale, softcap, window, _ = node.args
        text = self._call("attend", node) + ")"
        if self.single and bias is None and sinks is None and softcap is None and window is None:
            first, second = (self.run.seen[n].layout for n in (q, k))  # type: ignore[index]
            assert isinstance(first, _Layout)
            assert isinstance(second, _Layout)
            heads, keys = first.size[1], second.size[1]
            query, *others = (self._text(n) for n in (q, k, v))
            if heads != keys:
                # heads that share keys are queries of one head: kernels for grouped heads read keys for each of them
                query = f"{query}.reshape({first.size[0]}, {keys}, {heads // keys}, {first.size[3]})"
            alone = f"attention({query}, {', '.join(others)}, scale={self._text(scale)})"
            if heads != keys:
                alone = f"{alone}.reshape({first.size[0]}, {heads}, 1, -1)"
            text = f"{alone} if whole else {text}"
        self.lines.append(f"{self._local(node)} = {text}")

    def _rows(self, node: fx.Node) -> tuple[str, int] | None:
        """Return the code for a value as a matrix, and its number of rows; None if sizes are not known."""
        seen = self.run.seen[node]
        layout = seen.layout
        if not isinstance(layout, _Layout) or not seen.fixed or len(layout.size) < 2 or not layout.numel:
            return None
        columns = layout.size[-1]
        rows = layout.numel // columns
        found = self.static.get(node)
        if isinstance(found, _Static) and layout.contiguous:
            return self._global(found.tensor.view(rows, columns)), rows
        text = self._text(node)
        return (text if len(layout.size) == 2 else f"{text}.reshape({rows}, {columns})"), rows

    def _product(self, x: str, weight: torch.Tensor, bias: Any, out: str | None) -> str:
        into = "" if out is None else f", out={out}"
        if bias is None:
            return f"mm({x}, {self._global(weight.t())}{into})"
        return f"addmm({self._text(bias)}, {x}, {self._global(weight.t())}{into})"

    def _write_linear(self, node: fx.Node) -> bool:
        args = arguments(node)
        x, weight, bias = args["input"], args["weight"], args["bias"]
        seen = self.run.seen[node]
        known = (
            isinstance(weight, fx.Node)
            and self.run.seen[weight].steady
            and (bias is None or self._steady(bias))
        )
        rows = self._rows(x) if known and isinstance(x, fx.Node) else None
        layout = seen.layout
        if rows is None or not isinstance(layout, _Layout) or not layout.contiguous:
            return False
        matrix = self.run.seen[weight].value
        place = self._place(node)
        if place is not None:
            out = self._global(place.view(rows[1], -1))
            self.lines.append(self._product(rows[0], matrix, bias, out))
        else:
            self.lines.append(
                f"{self._local(node)} = {self._product(rows[0], matrix, bias, None)}.view({layout.size})"
            )
        return True

    def _write_joined(self, node: fx.Node) -> bool:
        x, weight, bias, _ = node.args
        rows = self._rows(x)  # type: ignore[arg-type]
        out = None if rows is None else self._parts(node, rows[1])
        if rows is None or out is None:
            return False
        matrix = self.run.seen[weight].value  # type: ignore[index]
        self.lines.append(self._product(rows[0], matrix, bias, self._global(out)))
        return True

    def _write_few_bits(self, node: fx.Node) -> bool:
        x, operand, bias, _ = node.args
        product: FewBitProduct = self.run.seen[operand].value  # type: ignore[index]
        rows = self._rows(x)  # type: ignore[arg-type]
        if rows is None or not product.few_are(rows[1]):
            return False
        text, count = rows
        width = product.shape[1]
        twice = product.bits == 8
        needed = _Layout((count, 2 * width if twice else width), (1, 1), 0, torch.bfloat16)
        flat = self._memory(needed)
        out = self._parts(node, count)
        if out is None:
            return False
        self.free.setdefault((flat.dtype, flat.numel()), []).append(flat)
        given = flat.view(needed.size)
        if twice:
            # the row stands beside itself: for the high halves of the numbers, and for the low ones
            self.lines.append(
                f"{self._global(given.view(count, 2, width))}.copy_({text}.view({count}, 1, {width}))"
            )
        else:
            self.lines.append(f"{self._global(given)}.copy_({text})")
        if product.packed is None:
            result = f"{self._global(product.few)}({self._global(given)})"
        else:
            parts = ", ".join(self._global(p) for p in (given, product.packed))
            result = f"{self._global(int4_product)}({parts}, {product.group}, {self._global(product.scales)})"
            if product.scales.shape[1] != product.shape[0]:
                result += f".narrow(1, 0, {product.shape[0]})"
        self.lines.append(f"{self._global(out)}.copy_({result})")
        if bias is not None:
            self.lines.append(f"{self._global(out)}.add_({self._text(bias)})")
        return True

    def _parts(self, node: fx.Node, rows: int) -> torch.Tensor | None:
        """Return memory for linears that are computed together, (rows, outputs); None if results leave the step."""
        layouts = self.run.seen[node].layout
        if not isinstance(layouts, tuple) or node in self.fresh or not all(p.numel for p in layouts):
            return None
        width = sum(layout.size[-1] for layout in layouts)
        flat = self._memory(_Layout((rows, width), (width, 1), 0, layouts[0].dtype))
        parts = []
        for layout in layouts:
            tensor = flat.as_strided(layout.size, layout.stride, layout.offset - layouts[0].offset)
            parts.append(_Static(self._global(tensor), tensor, node))
            self.scope[parts[-1].name + "_memory"] = flat
        self.static[node] = tuple(parts)
        return flat.view(rows, width)

    def _steady(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and self.run.seen[value].steady

    def _write_norm(self, node: fx.Node) -> bool:
        args = arguments(node)
        x, weight = args["x"], args["weight"]
        layout = self.run.seen[x].layout
        found = self.static.get(x)
        if not isinstance(layout, _Layout) or layout.dtype not in (torch.float32, torch.float64):
            return False
        if not layout.contiguous or not isinstance(self.run.seen[node].layout, _Layout):
            return False
        size = layout.size[-1]
        if weight is not None:
            value = self.run.seen[weight].value
            if not self._steady(weight) or value.dtype != layout.dtype or tuple(value.shape) != (size,):
                return False
        place = self._place(node)
        if place is None or not place.is_contiguous():
            return False
        eps = float(args["eps"])
        if layout.numel == size:
            row = (
                self._global(found.tensor.view(size))
                if isinstance(found, _Static)
                else f"{self._text(x)}.view({size})"
            )
            factor = torch.ones(size, dtype=layout.dtype) if weight is None else self.run.seen[weight].value
            zero = self._zeros(size, layout.dtype)
            out = self._global(place.view(size))
            self.lines.append(f"norm_row({row}, {self._global(factor)}, {zero}, {size}, {eps!r}, {out})")
            return True
        # the reference's own arithmetic, without its allocations
        text, out = self._text(x), self._global(place)
        mean = self._global(torch.empty((*layout.size[:-1], 1), dtype=layout.dtype))
        mul, average = self._global(torch.mul), self._global(torch.mean)
        self.lines.append(f"{mul}({text}, {text}, out={out})")
        self.lines.append(f"{average}({out}, -1, True, out={mean})")
        self.lines.append(f"{mean}.add_({eps!r}).rsqrt_()")
        self.lines.append(f"{mul}({text}, {mean}, out={out})")
        if weight is not None:
            self.lines.append(f"{out}.mul_({self._text(weight)})")
        return True

    def _zeros(self, size: int, dtype: torch.dtype) -> str:
        key = f"zeros_{size}_{str(dtype).rsplit('.', 1)[-1]}"
        if key not in self.scope:
            self.scope[key] = torch.zeros(size, dtype=dtype)
        return key

    def _write_rotary(self, node: fx.Node) -> bool:
        args = arguments(node)
        operands = [args[n] for n in ("x", "cos", "sin")]
        found = [self.static.get(n) for n in operands]
        if args["interleaved"] or not all(isinstance(f, _Static) for f in found):
            return False
        x, cos, sin = (f.tensor for f in found)  # type: ignore[union-attr]
        size = x.shape[-1]
        if size % 2 or not all(t.shape[-1] == size and t.dtype == x.dtype for t in (cos, sin)):
            return False
        place = self._place(node)
        if place is None:
            return False
        (x_first, x_second), (sin_first, sin_second) = x.chunk(2, -1), sin.chunk(2, -1)
        first, second = place.chunk(2, -1)
        names = [self._global(t) for t in (first, second, x_first, x_second, sin_first, sin_second)]
        self.lines.append(
            f"{self._global(torch.mul)}({self._global(x)}, {self._global(cos)}, out={self._global(place)})"
        )
        self.lines.append(f"{names[0]}.addcmul_({names[3]}, {names[4]}, value=-1)")
        self.lines.append(f"{names[1]}.addcmul_({names[2]}, {names[5]})")
        return True

    def _write_copy(self, node: fx.Node) -> bool:
        """Write an operator that copies its operand, into another type or order."""
        operand, seen = node.args[0], self.run.seen[node]
        if not isinstance(operand, fx.Node) or not isinstance(seen.layout, _Layout):
            return False
        layout = self.run.seen[operand].layout
        if not isinstance(layout, _Layout) or layout.size != seen.layout.size:
            return False
        place = self._place(node)
        if place is None:
            return False
        self.lines.append(f"{self._global(place)}.copy_({self._text(operand)})")
        return True


def norm_row(
    x: torch.Tensor, weight: torch.Tensor, zero: torch.Tensor, size: int, eps: float, out: torch.Tensor
) -> None:
    """Compute the RMS norm of one row, with its scale as a number.

    Args:
        x: (size,).
        weight: (size,).
        zero: (size,), zeros.
        size: number of entries.
        eps: added to the mean square.
        out: (size,), written.
    """
    square = torch.dot(x, x).item() / size + eps
    scale = square**-0.5 if square > 0 else math.nan if square != square else math.inf
    torch.addcmul(zero, x, weight, value=scale, out=out)
