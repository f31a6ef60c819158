"""The graph of a program with caches as it runs step by step: caches are written in place and read up to their end."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ..ir.facts import KVCache
from ..ir.operators.traits import Trait, has
from ..ir.program import Program
from ..ir.ranks.rank_programs import runnable
from ..ir.running.evaluate import evaluate, needed_for
from ..ir.running.fold import fold
from ..ir.schema import arguments, is_operator
from .compiled import in_pieces
from .prepared import TOKENS, Prepared, preparable
from .reading import read_late
from .states import attend_linearly, convolve
from .step import Buffer, Step, attend, positions_of_slots, store, store_whole
from .weights import Weights, few_bit_linear, few_bit_rows, joined_linear, linears_of_one_value

REPEATED = 2
"""How often a step of some shapes is run until it is prepared."""
KEPT = 16
"""Number of shapes that are prepared or counted, the last ones."""


def _later_readers(graph: fx.Graph) -> set[fx.Node]:
    """Return the attentions that read the keys of an earlier one; the first one's queries are made where keys are."""
    seen: set[Buffer] = set()
    found: set[fx.Node] = set()
    for node in graph.nodes:
        layer = node.args[-1] if node.target is attend else None
        if layer in seen:
            found.add(node)
        elif layer is not None:
            seen.add(layer)
    return found


class Running:
    """A graph that computes some outputs of a program with caches.

    Args:
        program: with a cache.
        capacity: number of slots of each cache.
        weights: shared with other graphs of the program; missing ones are loaded.
        outputs: names of the outputs; nothing else is computed.
        device: where it runs.
        decoding: leave out the layers that are skipped after the prompt.
        taken: names of outputs that are supplied as inputs, not computed.
        compiled: compile everything between attentions.
        marked: the new tokens may include mask tokens; else what is computed only for mask tokens is left out.
        prepared: prepare steps whose shapes come again.
        through: attention to what an earlier layer stored may leave out tokens that are not read, since nobody counts
            what they attend to.

    Attributes:
        buffers: the caches it writes, with number of heads, size and dtype of each.
        states: the states it reads, with the shape of a row and dtype of each.
    """

    def __init__(
        self, program: Program, capacity: int, weights: Weights, outputs: Iterable[str],
        device: torch.device, decoding: bool = True, taken: Iterable[str] = (), compiled: bool = False,
        marked: bool = False, prepared: bool = True, through: bool = True,
    ):  # fmt: skip
        self.device, self.decoding, self.marked = device, decoding, marked
        self.weights = weights
        self.source = fold(runnable(program))
        self.capacity = capacity
        self.outputs = list(outputs)
        self.buffers: dict[Buffer, tuple[int, int, torch.dtype]] = {}
        self.states: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.inputs: list[str] = []
        copy = self.source.copy()
        roots = [copy.outputs[name] for name in self.outputs]
        supplied = {name: copy.outputs[name] for name in taken}
        windows, sizes = self._rewrite(copy, copy.graph, needed_for(roots, dict.fromkeys(supplied.values())))
        roots = [windows.get(n, n) for n in roots]
        given = {windows.get(n, n): name for name, n in supplied.items()}
        needed = needed_for(roots, given)
        self._sized = any(n in needed for n in sizes)
        for size in sizes:
            size.replace_all_uses_with(capacity)  # type: ignore[arg-type]
        # what reads the step may write to caches and states
        later = _later_readers(copy.graph) if through else set()
        whole = [n for n in needed if self.step in n.all_input_nodes and n not in later]
        tokens = program.input_nodes[program.facts[KVCache].tokens].meta["val"]
        roots = read_late(copy.graph, self.step, tokens, roots, whole, given, early=not compiled)
        graph = self._cut(copy, roots, given)
        self._lock = threading.RLock()
        self._prepared: dict[tuple[object, ...], Prepared | int] = {}
        self.prepares = prepared and not compiled and device.type == "cpu" and preparable(graph)
        self._graph = graph
        if compiled:
            self.module = in_pieces(graph, next(iter(graph.nodes)))
        else:
            self.module = fx.GraphModule(torch.nn.Module(), graph)

    def __call__(self, step: Step, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one step and return the outputs by name, at the tokens that it reads."""
        if self.prepares and step.read is None and step.positions.shape[1] <= TOKENS:
            key = tuple((value.shape, value.dtype) for value in (inputs[name] for name in self.inputs))
            # threads may run one program
            with self._lock:
                found = self._prepared.pop(key, 0)
                if not isinstance(found, Prepared):
                    found += 1
                    if found >= REPEATED:
                        values = [inputs[name] for name in self.inputs]
                        found = Prepared(self._graph, self.constants, self.outputs, step, values)
                        self._remember(key, found)
                        first, found.first = found.first, {}
                        return first
                self._remember(key, found)
                if isinstance(found, Prepared):
                    return found(step, (inputs[name] for name in self.inputs))
        with torch.inference_mode():
            values = self.module(step, *self.constants, *(inputs[name] for name in self.inputs))
        return dict(zip(self.outputs, values, strict=True))

    def _remember(self, key: tuple[object, ...], found: Prepared | int) -> None:
        self._prepared[key] = found
        if len(self._prepared) > KEPT:
            del self._prepared[next(iter(self._prepared))]

    def fits(self, capacity: int) -> bool:
        """Tell whether it runs with caches of so many slots."""
        return not self._sized or capacity == self.capacity

    def _rewrite(
        self, program: Program, graph: fx.Graph, needed: Collection[fx.Node]
    ) -> tuple[dict[fx.Node, fx.Node], list[fx.Node]]:
        """Replace cache operators with in-place versions; return the replacement of each node, and sizes of caches."""
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            self.step = graph.placeholder("decoding_step")
        replaced: dict[fx.Node, fx.Node] = {}
        buffers: dict[fx.Node, Buffer] = {}
        nodes = list(graph.nodes)
        for node in nodes:
            if node.op != "call_function":
                continue
            target: Any = None
            args: tuple[Any, ...] = ()
            if is_operator(node, "graphopt.cache_store"):
                operator_args = arguments(node)
                buffer = self._buffer(operator_args["cache"])
                buffers[node] = buffer
                # a cache's new contents are read as outputs too, which nothing here needs
                readers = [u for u in node.users if u in needed]
                read = all(is_operator(u, "graphopt.attention", "graphopt.cache_load") for u in readers)
                target = store if read else store_whole
                args = (self.step, buffer, operator_args["values"])
            elif is_operator(node, "graphopt.cache_positions"):
                target, args = positions_of_slots, (self.step,)
            elif is_operator(node, "graphopt.attention") and arguments(node)["visible"] is not None:
                operator_args = arguments(node)
                window = arguments(operator_args["visible"])["window"]
                operands = [operator_args[n] for n in ("q", "k", "v", "bias", "sinks", "scale", "softcap")]
                stored = operator_args["k"]
                layer = None
                if is_operator(stored, "graphopt.cache_store"):
                    layer = self._buffer(arguments(stored)["cache"])
                elif stored in buffers:
                    layer = buffers[stored]
                target, args = attend, (self.step, *operands, window, layer)
            elif (found := self._with_state(node)) is not None:
                target, args = found
            elif (phased := is_operator(node, "graphopt.skipped")) or (
                not self.marked and has(node, Trait.MARKED)
            ):
                operand = node.args[0 if self.decoding or not phased else 1]
                assert isinstance(operand, fx.Node)
                node.replace_all_uses_with(operand)
                replaced[node] = operand
            if target is not None:
                with graph.inserting_before(node):
                    call = graph.call_function(target, args)
                call.meta = dict(node.meta)
                if node in buffers:
                    buffers[call] = buffers[node]
                node.replace_all_uses_with(call)
                replaced[node] = call
        sizes: list[fx.Node] = []
        for node in nodes:
            # every cache has the full capacity
            if is_operator(node, "aten.sym_size") and "_cache_" in str(node.args[0].meta.get("input", "")):
                sizes.append(node)
        return replaced, sizes

    def _with_state(self, node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
        """Return the function for a mixer that reads a state, and its arguments; None for any other node."""
        if not is_operator(node, "graphopt.causal_conv1d", "graphopt.linear_attention"):
            return None
        operands = arguments(node)
        state = operands["state"]
        if state is None:
            return None
        name, value = str(state.meta["input"]), state.meta["val"]
        self.states[name] = (tuple(int(size) for size in value.shape[1:]), value.dtype)
        if is_operator(node, "graphopt.causal_conv1d"):
            return convolve, (self.step, name, *(operands[n] for n in ("x", "weight", "bias")))
        return attend_linearly, (self.step, name, *(operands[n] for n in ("q", "k", "v", "g", "beta")))

    def _buffer(self, cache: fx.Node) -> Buffer:
        first, last = 0, int(cache.meta["val"].shape[1])
        source = cache
        if is_operator(cache, "aten.slice"):
            args = arguments(cache)
            first, last, source = int(args["start"] or 0), int(args["end"]), args["self"]
        buffer = (str(source.meta["input"]), first, last)
        value = source.meta["val"]
        self.buffers[buffer] = (last - first, int(value.shape[-1]), value.dtype)
        return buffer

    def _cut(
        self,
        program: Program,
        roots: list[fx.Node],
        supplied: dict[fx.Node, str],
    ) -> fx.Graph:
        """Return the graph that the outputs need; values that depend on no input are computed here, once."""
        needed = needed_for(roots, dict.fromkeys(supplied))
        order = [n for n in program.graph.nodes if n in needed or n is self.step]
        lowered = self._lowered([n for n in order if n not in supplied], program)
        values: dict[fx.Node, Any] = {}
        for node in order:
            if node.op == "placeholder" and node.name in program.weights:
                # what is read in few bits alone is not loaded otherwise
                if any(u not in lowered for u in node.users if u in needed) or node in roots:
                    values[node] = self.weights.load(program, node)
                else:
                    values[node] = None
            elif (
                node.op == "call_function"
                and node not in supplied
                and node not in lowered
                and all(n in values for n in node.all_input_nodes)
            ):
                with torch.inference_mode():
                    values[node] = evaluate(node, values)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {self.step: graph.placeholder("decoding_step")}
        constants = [
            n for n in order
            if n in values and any(u in needed and u not in values and u not in lowered for u in n.users)
        ]  # fmt: skip
        constants += [n for n in roots if n in values and n not in constants]
        self.constants = [values[n] for n in constants]
        for node in constants:
            copies[node] = graph.placeholder(f"constant_{node.name}")
        for group in {id(g): g for g in lowered.values()}.values():
            self.constants += group.place(graph)
        for node in order:
            if node.op == "placeholder" and node is not self.step and node not in values:
                copies[node] = graph.placeholder(node.name)
                self.inputs.append(str(node.meta["input"]))
        for node in order:
            if node in supplied:
                copies[node] = graph.placeholder(node.name)
                self.inputs.append(supplied[node])
        for node in order:
            if node.op == "call_function" and node not in values and node not in supplied:
                if node in lowered:
                    copies[node] = lowered[node].call(graph, node, copies)
                else:
                    copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output([copies[n] for n in roots])
        return graph

    def _lowered(self, nodes: list[fx.Node], program: Program) -> dict[fx.Node, _Lowered]:
        """Return the nodes that are computed otherwise: linears together with others, matrices in few bits."""
        lowered: dict[fx.Node, _Lowered] = {}
        if self.weights.plain:
            return lowered
        for group in linears_of_one_value(nodes, program):
            few = [n for n in group if self.weights.in_few_bits(program, arguments(n)["weight"])]
            plain = [n for n in group if n not in few]
            together = self._few_bit_linears(few, program)
            if together is None:
                for node in few:
                    lowered[node] = self._few_bit_linears([node], program)  # type: ignore[assignment]
            else:
                lowered.update(dict.fromkeys(few, together))
            if len(plain) > 1 and (joined := self._joined_linears(plain, program)) is not None:
                lowered.update(dict.fromkeys(plain, joined))
        for node in nodes:
            if is_operator(node, "aten.embedding"):
                args = arguments(node)
                if self.weights.in_few_bits(program, args["weight"]):
                    table = self.weights.product(program, [args["weight"]])
                    dtype = program.weights[args["weight"].name].source.dtype
                    lowered[node] = _Lowered([node], few_bit_rows, args["indices"], [table], (dtype,))
        return lowered

    def _few_bit_linears(self, group: list[fx.Node], program: Program) -> _Lowered | None:
        operands = [arguments(n) for n in group]
        product = self.weights.product(program, [a["weight"] for a in operands]) if group else None
        if product is None:
            return None
        bias = None
        if operands[0]["bias"] is not None:
            bias = self.weights.join(program, [a["bias"] for a in operands])
            if bias is None and len(group) > 1:
                return None
            if bias is None:
                bias = self.weights.load(program, operands[0]["bias"])
        return _Lowered(group, few_bit_linear, operands[0]["input"], [product, bias], (_sizes(group),))

    def _joined_linears(self, group: list[fx.Node], program: Program) -> _Lowered | None:
        operands = [arguments(n) for n in group]
        weight = self.weights.join(program, [a["weight"] for a in operands])
        bias = None
        if weight is not None and operands[0]["bias"] is not None:
            bias = self.weights.join(program, [a["bias"] for a in operands])
            if bias is None:
                return None
        if weight is None:
            return None
        return _Lowered(group, joined_linear, operands[0]["input"], [weight, bias], (_sizes(group),))


def _sizes(group: list[fx.Node]) -> list[int]:
    return [int(n.meta["val"].shape[-1]) for n in group]


class _Lowered:
    """Nodes that one function computes: of a value, of operands that are known beforehand, and of options."""

    def __init__(
        self, members: list[fx.Node], function: Callable[..., Any], value: fx.Node, operands: list[Any],
        options: tuple[Any, ...],
    ):  # fmt: skip
        self.members, self.function, self.value = members, function, value
        self.operands, self.options = operands, options
        self.placed: list[fx.Node | None] = []
        self.result: fx.Node | None = None

    def place(self, graph: fx.Graph) -> list[Any]:
        """Add placeholders for the operands, and return their values."""
        name = self.members[0].name
        self.placed = [
            None if operand is None else graph.placeholder(f"operand_{number}_{name}")
            for number, operand in enumerate(self.operands)
        ]
        return [operand for operand in self.operands if operand is not None]

    def call(self, graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Return the result of one member, computing all of them if it is the first."""
        if self.result is None:
            arguments_of_call = (copies[self.value], *self.placed, *self.options)
            self.result = graph.call_function(self.function, arguments_of_call)
            if self.function is few_bit_rows:
                self.result.meta = dict(node.meta)
        if self.function is few_bit_rows:
            return self.result
        item = graph.call_function(operator.getitem, (self.result, self.members.index(node)))
        item.meta = dict(node.meta)
        return item
