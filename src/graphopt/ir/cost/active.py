"""FLOPs that a run actually used, given narrow widths, inactive experts and skipped layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..running.evaluate import needed_for
from ..schema import arguments, is_operator
from .summary import works_by_node

if TYPE_CHECKING:
    from ..program import Program


def choices_of(program: Program) -> list[fx.Node]:
    """Return the values that route tokens to widths or experts: to be recorded while the program runs."""
    choices: dict[fx.Node, None] = {}
    for node in program.nodes:
        if is_operator(node, "graphopt.nested_ffn"):
            choices[arguments(node)["choice"]] = None
        elif is_operator(node, "graphopt.routed_ffn"):
            choices[arguments(node)["experts"]] = None
    return list(choices)


def passed_over(program: Program) -> set[fx.Node]:
    """Return the nodes that are needed only by layers that are skipped during decoding."""
    if not any(is_operator(n, "graphopt.skipped") for n in program.nodes):
        return set()
    decoding_nodes: set[fx.Node] = set()
    work = list(program.outputs.values())
    while work:
        node = work.pop()
        if node not in decoding_nodes:
            decoding_nodes.add(node)
            work += (
                [arguments(node)["before"]] if is_operator(node, "graphopt.skipped") else node.all_input_nodes
            )
    return needed_for(program.outputs.values(), ()) - decoding_nodes


class ActiveWork:
    """Counts FLOPs over batches: those that tokens used, and those possible. Padding counts, since it is computed.

    Args:
        program: not sharded.
    """

    def __init__(self, program: Program):
        self.program = program
        self.routed = [
            n for n in program.nodes if is_operator(n, "graphopt.nested_ffn", "graphopt.routed_ffn")
        ]
        self.passed = passed_over(program)
        self.used = self.possible = 0.0
        self.routed_used = self.routed_possible = 0.0
        self.tokens = 0
        self._static: dict[tuple[tuple[str, int], ...], dict[fx.Node, float]] = {}

    def add(self, inputs: Mapping[str, torch.Tensor], recorded: Mapping[str, Any]) -> None:
        """Count a batch.

        Args:
            inputs: what the program ran on, by name.
            recorded: values of :func:`choices_of`, by node name.
        """
        flops = self._flops(inputs)
        total = sum(flops.values())
        self.possible += total
        saved = 0.0
        passed = self.passed if float(inputs.get("decoding", 0.0)) >= 0.5 else set()
        for node in self.passed & flops.keys():
            used = 0.0 if node in passed else flops[node]
            saved += flops[node] - used
            self.routed_used += used
            self.routed_possible += flops[node]
        for node in self.routed:
            if node in self.passed:
                continue
            share = _share(node, recorded)
            saved += flops[node] * (1 - share)
            self.routed_used += flops[node] * share
            self.routed_possible += flops[node]
        self.used += total - saved
        # without tokens, rows are counted
        read = next((inputs[n] for n in ("input_ids", "inputs_embeds") if n in inputs), None)
        self.tokens += len(next(iter(inputs.values()))) if read is None else read.shape[0] * read.shape[1]

    def _flops(self, inputs: Mapping[str, torch.Tensor]) -> dict[fx.Node, float]:
        sizes: dict[str, int] = {}
        for name, spec in self.program.signature.inputs.items():
            for size_name, size in zip(spec.shape, inputs[name].shape, strict=True):
                if isinstance(size_name, str) and size_name in self.program.signature.sizes:
                    sizes[size_name] = int(size)
        key = tuple(sorted(sizes.items()))
        if key not in self._static:
            self._static[key] = {n: float(w.flops) for n, w in works_by_node(self.program, sizes).items()}
        return self._static[key]


def _share(node: fx.Node, recorded: Mapping[str, Any]) -> float:
    args = arguments(node)
    if is_operator(node, "graphopt.nested_ffn"):
        widths = torch.tensor(args["widths"], dtype=torch.float64)
        return float(widths[recorded[args["choice"].name]].mean() / widths.max())
    experts = recorded[args["experts"].name]
    count = int(args["up"].meta["val"].shape[0])
    return float(((experts >= 0) & (experts < count)).double().mean())


__all__ = ["ActiveWork", "choices_of", "passed_over"]
