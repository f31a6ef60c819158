"""The graph of a program with caches as it runs step by step: caches are written in place and read up to their end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..ir.operators import attention, cache_positions, cache_visible
from ..ir.operators.traits import Trait, has
from ..ir.program import Program
from ..ir.ranks.rank_programs import runnable
from ..ir.running.evaluate import evaluate, needed_for
from ..ir.running.fold import fold
from ..ir.schema import arguments, is_operator
from .compiled import in_pieces

Buffer = tuple[str, int, int]
"""A cache input, and the first and last of its heads that this buffer holds."""


@dataclass
class Step:
    """The inputs of one call of a running graph, and the caches it writes into.

    Attributes:
        buffers: (batch, heads, capacity, size) by cache input and the range of its heads.
        positions: (batch, tokens), of the new tokens.
        slots: (batch, tokens), where the new tokens are stored.
        limit: one more than the last slot in use.
        start: the slot of the first token if all rows are equally long and tokens are consecutive; else None.
        step_mask: (batch, tokens, tokens), which new token attends to which; None if positions determine it.
    """

    buffers: dict[Buffer, torch.Tensor]
    positions: torch.Tensor
    slots: torch.Tensor
    limit: int
    start: int | None
    step_mask: torch.Tensor | None = None
    seen: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def store(self, buffer: Buffer, values: torch.Tensor) -> torch.Tensor:
        """Write new tokens into a cache and return the part of the cache in use."""
        cache = self.buffers[buffer]
        if self.start is not None:
            cache[:, :, self.start : self.limit] = values
        else:
            cache.scatter_(2, self.slots[:, None, :, None].expand(values.shape), values.to(cache.dtype))
        return cache[:, :, : self.limit]

    def visible(self, window: int | None, cache: torch.Tensor) -> torch.Tensor:
        """Return which slots new tokens attend to; computed once per step."""
        if window not in self.seen:
            self.seen[window] = cache_visible(
                self.positions, self.slots, cache, self.step_mask, window=window
            )
        return self.seen[window]


def store(step: Step, buffer: Buffer, values: torch.Tensor) -> torch.Tensor:
    """Compute ``graphopt.cache_store`` in place."""
    return step.store(buffer, values)


def attend(
    step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    sinks: torch.Tensor | None, scale: float, softcap: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Compute ``graphopt.attention`` over caches, without a mask if a single token attends to everything."""
    if bias is not None:
        bias = bias[..., : step.limit]
    visible = None
    if step.start is None or step.step_mask is not None:
        visible = step.visible(window, k)
    elif q.shape[2] == 1:
        if window is not None and window < step.limit:
            k, v = k[:, :, -window:], v[:, :, -window:]
            bias = bias if bias is None else bias[..., -window:]
    elif step.start == 0 and window is None:
        return attention(q, k, v, None, bias, sinks, scale=scale, causal=True, softcap=softcap)
    else:
        visible = step.visible(window, k)
    return attention(q, k, v, None, bias, sinks, None, visible, scale=scale, softcap=softcap)


def positions_of_slots(step: Step) -> torch.Tensor:
    """Compute ``graphopt.cache_positions`` of the slots in use."""
    return cache_positions(step.positions, step.slots, step.limit)


class Running:
    """A graph that computes some outputs of a program with caches.

    Args:
        program: with a cache.
        capacity: number of slots of each cache.
        loaded: weights by node name, shared with other graphs of the program; missing ones are added.
        outputs: names of the outputs; nothing else is computed.
        device: where it runs.
        decoding: leave out the layers that are skipped after the prompt.
        taken: names of outputs that are supplied as inputs, not computed.
        compiled: compile everything between attentions.
        marked: the new tokens may include mask tokens; else what is computed only for mask tokens is left out.

    Attributes:
        buffers: the caches it writes, with number of heads, size and dtype of each.
    """

    def __init__(
        self, program: Program, capacity: int, loaded: dict[str, torch.Tensor], outputs: Iterable[str],
        device: torch.device, decoding: bool = True, taken: Iterable[str] = (), compiled: bool = False,
        marked: bool = False,
    ):  # fmt: skip
        self.device, self.decoding, self.marked = device, decoding, marked
        self.source = fold(runnable(program))
        self.capacity = capacity
        self.outputs = list(outputs)
        self.buffers: dict[Buffer, tuple[int, int, torch.dtype]] = {}
        self.inputs: list[str] = []
        copy = self.source.copy()
        roots = [copy.outputs[name] for name in self.outputs]
        supplied = {name: copy.outputs[name] for name in taken}
        windows = self._rewrite(copy, copy.graph)
        roots = [windows.get(n, n) for n in roots]
        graph = self._cut(copy, roots, loaded, {windows.get(n, n): name for name, n in supplied.items()})
        if compiled:
            self.module = in_pieces(graph, next(iter(graph.nodes)))
        else:
            self.module = fx.GraphModule(torch.nn.Module(), graph)

    def __call__(self, step: Step, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one step and return the outputs by name."""
        with torch.inference_mode():
            values = self.module(step, *self.constants, *(inputs[name] for name in self.inputs))
        return dict(zip(self.outputs, values, strict=True))

    def _rewrite(self, program: Program, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        """Replace cache operators with in-place versions; return the replacement of each node."""
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            self.step = graph.placeholder("decoding_step")
        replaced: dict[fx.Node, fx.Node] = {}
        nodes = list(graph.nodes)
        for node in nodes:
            if node.op != "call_function":
                continue
            target: Any = None
            args: tuple[Any, ...] = ()
            if is_operator(node, "graphopt.cache_store"):
                operator_args = arguments(node)
                buffer = self._buffer(operator_args["cache"])
                target, args = store, (self.step, buffer, operator_args["values"])
            elif is_operator(node, "graphopt.cache_positions"):
                target, args = positions_of_slots, (self.step,)
            elif is_operator(node, "graphopt.attention") and arguments(node)["visible"] is not None:
                operator_args = arguments(node)
                window = arguments(operator_args["visible"])["window"]
                operands = [operator_args[n] for n in ("q", "k", "v", "bias", "sinks", "scale", "softcap")]
                target, args = attend, (self.step, *operands, window)
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
                node.replace_all_uses_with(call)
                replaced[node] = call
        for node in nodes:
            # every cache has the full capacity
            if is_operator(node, "aten.sym_size") and "_cache_" in str(node.args[0].meta.get("input", "")):
                node.replace_all_uses_with(self.capacity)
        return replaced

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
        loaded: dict[str, torch.Tensor],
        supplied: dict[fx.Node, str],
    ) -> fx.Graph:
        """Return the graph that the outputs need; values that depend on no input are computed here, once."""
        needed = needed_for(roots, dict.fromkeys(supplied))
        order = [n for n in program.graph.nodes if n in needed or n is self.step]
        values: dict[fx.Node, Any] = {}
        for node in order:
            if node.op == "placeholder" and node.name in program.weights:
                if node.name not in loaded:
                    loaded[node.name] = program.weights[node.name].source.load().to(self.device)
                values[node] = loaded[node.name]
            elif (
                node.op == "call_function"
                and node not in supplied
                and all(n in values for n in node.all_input_nodes)
            ):
                with torch.inference_mode():
                    values[node] = evaluate(node, values)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {self.step: graph.placeholder("decoding_step")}
        constants = [
            n for n in order if n in values and any(u in needed and u not in values for u in n.users)
        ]
        constants += [n for n in roots if n in values and n not in constants]
        self.constants = [values[n] for n in constants]
        for node in constants:
            copies[node] = graph.placeholder(f"constant_{node.name}")
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
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output([copies[n] for n in roots])
        return graph
