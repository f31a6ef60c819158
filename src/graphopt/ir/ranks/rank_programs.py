"""Running a sharded program: all ranks in one process, or one rank in each process.

A sharded program is one graph that every rank runs: each rank takes its shard with ``local_slice``, and combines values
with the other ranks' through collectives. Unrolled, the graph holds the nodes of all ranks and collectives are sums
and concatenations, so that it runs, trains, is compared in float64 and exported like any other program. Bound to
a rank, local slices are plain slices and collectives are those of a process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import groups
from ..errors import UsageError, VerificationError
from ..facts import OwnRank, TensorParallel
from ..operators.traits import Trait, has
from ..program import Program
from ..schema import arguments, is_operator, operator_name

aten = torch.ops.aten

ON_RANKS = Trait.COLLECTIVE | Trait.PER_RANK
"""Traits of operators that are replaced when a program is unrolled or bound to a rank."""


def ranks_of(program: Program) -> int:
    """Return the number of ranks of a program; 0 if it is not sharded, or is the program of one rank."""
    sharded = program.facts.get(TensorParallel)
    return 0 if sharded is None or OwnRank in program.facts else sharded.ranks


def synchronisations(program: Program) -> list[fx.Node]:
    """Return the collectives of a program in execution order."""
    return [n for n in program.graph.nodes if has(n, Trait.COLLECTIVE)]


class _Unroller:
    """Copies a graph node by node, once or once per rank."""

    def __init__(self, graph: fx.Graph, ranks: int):
        self.old = graph
        self.ranks = ranks
        self.new = fx.Graph()
        self.copies: dict[fx.Node, list[fx.Node]] = {}

    def run(self) -> None:
        # first, so that they keep the names by which they receive values
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.copies[node] = [self.copy(node, 0)]
        for node in self.old.nodes:
            if node.op == "output":
                self.output(node)
            elif node.op != "placeholder":
                rule = getattr(self, operator_name(node.target).rpartition(".")[2], None)
                if rule is not None and has(node, ON_RANKS):
                    rule(node)
                else:
                    self.plain(node)

    def at(self, node: fx.Node, rank: int) -> fx.Node:
        copies = self.copies[node]
        return copies[rank] if len(copies) > 1 else copies[0]

    def copy(self, node: fx.Node, rank: int) -> fx.Node:
        return self.new.node_copy(node, lambda n: self.at(n, rank))

    def call(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        node = self.new.call_function(target, args)
        for key in ("val", "stack_trace", "nn_module_stack", "custom"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        return node

    def plain(self, node: fx.Node) -> None:
        apart = any(len(self.copies[n]) > 1 for n in node.all_input_nodes)
        self.copies[node] = [self.copy(node, r) for r in range(self.ranks if apart else 1)]

    def local_slice(self, node: fx.Node) -> None:
        args = arguments(node)
        slices: dict[Any, fx.Node] = {}
        copies = []
        for rank in range(self.ranks):
            source, start = self.at(args["x"], rank), args["starts"][rank]
            if (source, start) not in slices:
                slices[source, start] = self.call(
                    node, aten.slice.Tensor, source, args["dim"], start, start + args["length"]
                )
            copies.append(slices[source, start])
        self.copies[node] = copies if self.ranks > 1 else copies[:1]

    def terms(self, node: fx.Node) -> list[fx.Node]:
        source = arguments(node)["x"]
        return [self.at(source, rank) for rank in range(self.ranks)]

    def total(self, node: fx.Node, terms: list[fx.Node], like: fx.Node) -> fx.Node:
        """Return the sum of the terms in float32 or wider, in the order of ranks, rounded once."""
        dtype = like.meta["val"].dtype
        narrow = dtype in (torch.float16, torch.bfloat16) and len(terms) > 1

        def typed(value: fx.Node, target_dtype: torch.dtype) -> fx.Node:
            cast = self.call(like, aten.to.dtype, value, target_dtype)
            cast.meta["val"] = like.meta["val"].to(target_dtype)
            return cast

        if narrow:
            terms = [typed(term, torch.float32) for term in terms]
        total = terms[0]
        for term in terms[1:]:
            total = self.call(like, aten.add.Tensor, total, term)
            total.meta["val"] = term.meta["val"]
        return typed(total, dtype) if narrow else total

    def all_reduce(self, node: fx.Node) -> None:
        self.copies[node] = [self.total(node, self.terms(node), node)]

    def all_gather(self, node: fx.Node) -> None:
        self.copies[node] = [self.call(node, aten.cat.default, self.terms(node), arguments(node)["dim"])]

    def reduce_scatter(self, node: fx.Node) -> None:
        args = arguments(node)
        total = self.total(node, self.terms(node), args["x"])
        size = int(node.meta["val"].shape[args["dim"]])
        self.copies[node] = [
            self.call(node, aten.slice.Tensor, total, args["dim"], rank * size, (rank + 1) * size)
            for rank in range(self.ranks)
        ]

    def unreduced(self, node: fx.Node) -> None:
        self.copies[node] = self.copies[arguments(node)["x"]]

    def quantized_all_reduce(self, node: fx.Node) -> None:
        args = arguments(node)
        fixed = [self.at(args[n], 0) for n in ("order", "inverse", "scales", "reduced")]
        settings = [args[n] for n in ("kept", "bits", "block", "algorithm", "crossover")]
        target = torch.ops.graphopt.quantized_sum.default
        self.copies[node] = [self.call(node, target, self.terms(node), *fixed, *settings)]

    def output(self, node: fx.Node) -> None:
        values: Any = node.args[0]
        self.new.output([n for value in values for n in self.copies[value]])


def unroll(graph: fx.Graph, ranks: int) -> tuple[fx.Graph, dict[fx.Node, list[fx.Node]]]:
    """Return the graph of all ranks, and the copies of each node: one where all ranks have the same value.

    Outputs that differ between ranks are returned once per rank.
    """
    unroller = _Unroller(graph, ranks)
    unroller.run()
    return unroller.new, unroller.copies


def unrolled(program: Program) -> Program:
    """Return a sharded program as an ordinary one that computes all ranks.

    Raises:
        VerificationError: ranks would return different values.
    """
    result: Program = program.derived("unrolled", lambda: _unrolled(program)[0])
    return result


def rank_copies(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """Return the copies of each node in the unrolled program: one, or one per rank."""
    unrolled(program)
    copies: dict[fx.Node, list[fx.Node]] = program.derived("rank_copies", dict)
    return copies


def _unrolled(program: Program) -> tuple[Program, dict[fx.Node, list[fx.Node]]]:
    graph, copies = unroll(program.graph, ranks_of(program))
    for name, node in program.outputs.items():
        if len(copies[node]) > 1:
            raise VerificationError(
                f"output {name} differs from rank to rank", node=node.name, source=program.source_line(node),
                hint="a partial or sharded value must be reduced or gathered before it is returned",
            )  # fmt: skip
    output = next(iter(graph.find_nodes(op="output")))
    output.args = (tuple(output.args[0]),)
    output.meta["val"] = tuple(n.meta["val"] for n in output.args[0])
    other = Program(graph, program.mode, dict(program.weights), program.signature)
    other.symbols, other.dials, other.origin = dict(program.symbols), dict(program.dials), program.origin
    other.facts = program.facts.copy()
    other.facts.discard(TensorParallel)
    other.checkpoint = {
        name: copies[node][0] for name, node in program.checkpoint.items() if len(copies[node]) == 1
    }
    program.derived("rank_copies", lambda: copies)
    return other, copies


def rank_program(program: Program, rank: int) -> Program:
    """Return the program of one rank: its slices of the weights, and collectives over the bound group.

    Weights are not read here; when they are, only the rank's shard of each is.
    """
    ranks = ranks_of(program)
    if not 0 <= rank < ranks:
        raise UsageError(f"there is no rank {rank}; the program is for {ranks}")
    key = f"rank {rank}"
    result: Program = program.derived(key, lambda: _bound_to(program, rank))
    return result


def _bound_to(program: Program, rank: int) -> Program:
    result = program.copy()
    for node in list(result.graph.nodes):
        if is_operator(node, "graphopt.local_slice"):
            args = arguments(node)
            start = args["starts"][rank]
            with result.edit.before(node):
                local = result.edit.call(
                    aten.slice.Tensor, args["x"], args["dim"], start, start + args["length"]
                )
            result.edit.replace(node, local, same=False)
        elif is_operator(node, "graphopt.unreduced"):
            result.edit.replace(node, arguments(node)["x"], same=False)
    result.facts.add(OwnRank(rank))
    result.checkpoint.clear()  # one rank's shards cannot be mapped to the checkpoint
    replaced = dict(result.edit.journal)
    result.derived("replaced by", lambda: replaced)
    result.edit.end()
    return result


@dataclass(frozen=True)
class StandIns:
    """The program that runs in place of a sharded one, and the mapping of nodes to it."""

    program: Program
    copies: dict[fx.Node, list[fx.Node]] | None
    by_name: dict[str, fx.Node]

    def nodes(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that compute a value: one, or one per rank where ranks differ."""
        return [self.by_name[node.name]] if self.copies is None else self.copies[node]


def stand_ins(program: Program) -> StandIns | None:
    """Return the program that runs for a sharded one in this process; None if the program itself runs."""
    running = runnable(program)
    if running is program:
        return None
    if OwnRank not in running.facts:
        return StandIns(running, rank_copies(program), {})
    names = running.derived("replaced by", dict)
    return StandIns(running, None, {n.name: n for n in running.graph.nodes} | names)


def runnable(program: Program) -> Program:
    """Return the program that this process runs: the program itself, all ranks unrolled, or this process's rank.

    Raises:
        UsageError: the number of processes is not the program's number of ranks.
    """
    ranks = ranks_of(program)
    if not ranks:
        return program
    bound = groups.group_for(ranks)
    return unrolled(program) if bound is None else rank_program(program, bound.rank)
