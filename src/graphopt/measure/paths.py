"""Every path of one token through a program whose choices are inputs, with the earlier tokens unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from ..ir.errors import UsageError
from ..ir.running.evaluate import evaluate
from ..ir.running.execute import interpret
from ..ir.running.fold import fold
from ..ir.schema import arguments, is_operator
from ..ir.sizes import expression

if TYPE_CHECKING:
    from ..ir.program import Program

composites = torch.ops.graphopt


class Paths:
    """Walks the tree of paths depth first, in batches of paths that share a prefix.

    Values that do not depend on the choices are computed once for the row and sliced at the token's position; an
    attention reads the keys and values of earlier tokens computed with the largest width everywhere.

    Args:
        program: a program with an input ``routing`` (feed-forwards, batch, sequence).
        layers: number of feed-forwards with a choice.
        ways: number of choices of each.
        largest: index of the largest choice, which earlier tokens use.
        at_once: number of paths computed together.
    """

    def __init__(self, program: Program, layers: int, ways: int, largest: int, at_once: int):
        self.program = fold(program)
        self.layers, self.ways, self.largest, self.at_once = layers, ways, largest, max(ways, at_once)
        self.routing = self.program.input_nodes["routing"]
        self.choices = {n for n in self.routing.users if is_operator(n, "aten.select")}
        moving: set[fx.Node] = {self.routing}
        for node in self.program.graph.nodes:
            if any(n in moving for n in node.all_input_nodes):
                moving.add(node)
        self.order = [n for n in self.program.graph.nodes if n in moving and n.op == "call_function"]
        self.logits = self.program.outputs["logits"]
        self.order = self.order[: self.order.index(self.logits) + 1] if self.logits in moving else self.order
        inside = set(self.order)
        read = {n for node in self.order for n in node.all_input_nodes} - inside - {self.routing}
        self.weights = {
            n: self.program.weights[n.name].source.load() for n in read if n.name in self.program.weights
        }
        self.still = [n for n in read if n not in self.weights]
        self.attentions = [n for n in self.order if is_operator(n, "graphopt.attention")]
        self.last_use = {n: node for node in self.order for n in node.all_input_nodes if n in inside}
        sizes = {name: symbol for symbol, name in self.program.symbols.items()}
        first = next(s for s in self.program.signature.inputs["input_ids"].shape if isinstance(s, str))
        if "sequence" not in sizes:
            raise UsageError("paths can only be followed in programs whose rows may have any length")
        self.batch, self.sequence = sizes[first], sizes["sequence"]
        self.row: dict[str, Any] = {}
        self.all_largest = float("nan")

    def begin(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Run a row, (1, sequence), with the largest width everywhere, and store the values that paths read."""
        keys_and_values = [arguments(n)[name] for n in self.attentions for name in ("k", "v")]
        self.row = interpret(self.program, inputs, record=dict.fromkeys([*self.still, *keys_and_values]))

    def losses(self, position: int, following: int, budget: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of every path, and the paths (paths, layers), for the token after a position.

        Args:
            position: position of the token whose path varies.
            following: the token that comes after it.
            budget: if given, only paths with exactly this number of largest choices.
        """
        self.all_largest = _next_token_loss(self.row["logits"][:, position], following)[0].item()
        results: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            self._walk(0, {}, torch.zeros(1, 0, dtype=torch.int64), position, following, budget, results)
        return torch.cat([f[0] for f in results]), torch.cat([f[1] for f in results])

    def _walk(
        self, start: int, values: dict[fx.Node, Any], choices: torch.Tensor, position: int, following: int,
        budget: int | None, results: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:  # fmt: skip
        values = dict(values)
        count = len(choices)
        for index in range(start, len(self.order)):
            node = self.order[index]
            if node in self.choices:
                if count * self.ways > self.at_once and count > 1:
                    half = count // 2
                    for rows in (torch.arange(half), torch.arange(half, count)):
                        subset = {n: self._rows(n, v, rows) for n, v in values.items()}
                        self._walk(index, subset, choices[rows], position, following, budget, results)
                    return
                origin = torch.arange(count).repeat_interleave(self.ways)
                chosen = torch.arange(self.ways).repeat(count)
                extended = torch.cat([choices[origin], chosen[:, None]], 1)
                if budget is not None:
                    largest_count = (extended == self.largest).sum(1)
                    allowed = (largest_count <= budget) & (
                        largest_count + self.layers - extended.shape[1] >= budget
                    )
                    origin, chosen, extended = origin[allowed], chosen[allowed], extended[allowed]
                values = {n: self._rows(n, v, origin) for n, v in values.items()}
                choices, count = extended, len(extended)
                values[node] = chosen.reshape([-1] + [1] * (node.meta["val"].dim() - 1))
                continue
            for operand in node.all_input_nodes:
                if operand not in values:
                    values[operand] = self._still(operand, position, count)
            values[node] = (
                self._attend(node, values, position, count)
                if node in self.attentions
                else evaluate(node, values)
            )
            for operand in node.all_input_nodes:
                # values that do not depend on the choices are sliced again for the new number of paths
                if operand not in self.last_use or self.last_use[operand] is node:
                    values.pop(operand, None)
        results.append((_next_token_loss(values[self.logits].reshape(count, -1), following), choices))

    def _still(self, node: fx.Node, position: int, count: int) -> Any:
        if node in self.weights:
            return self.weights[node]
        value, fake = self.row[node.name], node.meta["val"]
        if isinstance(fake, torch.SymInt):
            return int(expression(fake).subs({self.batch: count, self.sequence: 1}))
        if not isinstance(value, torch.Tensor):
            return value
        for dim, size in enumerate(fake.shape):
            symbols = expression(size).free_symbols if isinstance(size, torch.SymInt) else set[sympy.Symbol]()
            if self.sequence in symbols:
                # rows are computed one at a time, so that a flattened dimension is the sequence
                value = value.narrow(dim, position, 1)
            if self.batch in symbols:
                value = value.expand(*value.shape[:dim], count, *value.shape[dim + 1 :])
        return value

    def _rows(self, node: fx.Node, value: Any, rows: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and self.batch in expression(size).free_symbols:
                return value.index_select(dim, rows)
        return value

    def _attend(self, node: fx.Node, values: dict[fx.Node, Any], position: int, count: int) -> torch.Tensor:
        args = dict(arguments(node))
        window = args["window"]
        first = 0 if window is None else max(0, position + 1 - int(window))
        q = values[args["q"]]
        earlier = [self.row[args[n].name][:, :, first:position].expand(count, -1, -1, -1) for n in ("k", "v")]
        k, v = (torch.cat([b, values[args[n]]], 2) for b, n in zip(earlier, ("k", "v"), strict=True))
        bias = None
        if args["bias"] is not None:
            full_bias = self.row[args["bias"].name]
            bias = (
                full_bias[..., position : position + 1, first : position + 1]
                if full_bias.shape[-2] > 1
                else full_bias[..., first : position + 1]
            )
        sinks = None if args["sinks"] is None else values[args["sinks"]]
        result: torch.Tensor = composites.attention(
            q,
            k,
            v,
            None,
            bias,
            sinks,
            None,
            scale=args["scale"],
            causal=False,
            window=None,
            softcap=args["softcap"],
        )
        return result


def _next_token_loss(logits: torch.Tensor, following: int) -> torch.Tensor:
    return -logits.double().log_softmax(-1)[:, following]
