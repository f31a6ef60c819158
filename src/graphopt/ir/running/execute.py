"""Running a program: compiled if it fits in memory, otherwise streamed weight by weight."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..program import Program, program_method
from ..ranks.rank_programs import StandIns, runnable, stand_ins
from ..weights import TensorSource
from .evaluate import evaluate, last_uses, needed_for
from .fold import fold

Hook = Callable[[fx.Node, Any], Any]

COMPILED, DECODING = "compiled", "decoding"
"""What is derived of a program and holds its weights: a function, and what decoders keep."""


def memory_available() -> int:
    """Return the bytes of memory available without swapping or exceeding a limit; a guess where unknown."""
    available, used = 4 << 30, 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if limit != resource.RLIM_INFINITY:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmData:"):
                    used = int(line.split()[1]) * 1024
            available = min(available, max(limit - used, 0))
    return available


@program_method("run")
def run(
    program: Program, inputs: Mapping[str, torch.Tensor], *, streamed: bool | None = None
) -> dict[str, Any]:
    """Run on flat inputs and return flat outputs.

    Args:
        program: what to run.
        inputs: a tensor per input and run-time setting.
        streamed: load each weight at its first use and free it after its last; decided by size if None.
    """
    program = runnable(program)
    if streamed is None:
        streamed = sum(weight.bytes for weight in program.weights.values()) > memory_available() // 2
    if streamed:
        return interpret(program, inputs)
    compiled: Callable[..., Any] = program.derived(COMPILED, lambda: compile_graph(program))
    values = compiled(inputs)
    return dict(zip(program.signature.output_names, values, strict=True))


def release(program: Program) -> None:
    """Free the weights that were loaded to run a program; they are loaded again when it runs again."""
    for running in {id(p): p for p in (program, runnable(program))}.values():
        for key in (COMPILED, DECODING):
            running._derived.pop(key, None)
        for _, made in list(running._derived.values()):
            # such as the program with caches
            if isinstance(made, Program) and made is not program:
                release(made)


def return_memory() -> None:
    """Return freed memory to the system where the C library keeps it, as glibc does after calibration."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def compile_graph(program: Program) -> Callable[[Mapping[str, torch.Tensor]], Any]:
    """Return a function of the inputs in which everything that depends on weights alone is computed once."""
    folded = fold(program)
    module = fx.GraphModule(torch.nn.Module(), folded.graph)
    placeholders = folded.graph.find_nodes(op="placeholder")
    # unused weights, such as a matrix of which each rank has its shard, are not loaded
    loaded = {
        n.name: _load_shared(folded.weights[n.name].source)
        for n in placeholders
        if n.name in folded.weights and n.users
    }
    order = [(n.name, str(n.meta.get("input", "")), n.name in folded.weights) for n in placeholders]

    def call(inputs: Mapping[str, torch.Tensor]) -> Any:
        arguments = (
            (loaded[name].tensor if name in loaded else None) if weight else inputs[label]
            for name, label, weight in order
        )
        with torch.no_grad():
            return module(*arguments)

    return call


@dataclass(frozen=True, eq=False)
class _Loaded:
    """The values of a source, for as long as some program uses them; keeping the source keeps its id unique."""

    source: TensorSource
    tensor: torch.Tensor


_HELD: weakref.WeakValueDictionary[int, _Loaded] = weakref.WeakValueDictionary()


def _load_shared(source: TensorSource) -> _Loaded:
    """Return the values of a source, shared with other programs that loaded it: passes change few weights."""
    loaded = _HELD.get(id(source))
    if loaded is None:
        loaded = _HELD[id(source)] = _Loaded(source, source.load())
    return loaded


def interpret(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    *,
    record: Iterable[fx.Node] = (),
    stop: bool = False,
    hook: Hook | None = None,
    sources: Mapping[str, TensorSource] | None = None,
    known: Mapping[fx.Node, Any] | None = None,
    only: Iterable[fx.Node] | None = None,
) -> dict[str, Any]:
    """Run node by node and return outputs and recorded values; weights are loaded at first use and freed after the last.

    Args:
        program: what to run.
        inputs: a tensor per input and run-time setting.
        record: nodes whose values are also returned, under their node names.
        stop: end once the recorded values are known, instead of computing the outputs.
        hook: called with each node and its value; its result replaces the value.
        sources: replacements for the values of weights, by node name.
        known: values that are known beforehand; nodes that only these need are not computed.
        only: compute these nodes, for ``hook`` to see, and neither keep them nor compute outputs.

    Returns:
        Outputs by flat name, unless ``stop``, and recorded values by node name. If a sharded program runs
        in one process, a value that differs between ranks is a list with one entry per rank.
    """
    recorded = list(record)
    seen = None if only is None else list(only)
    stand_in = stand_ins(program)
    if stand_in is not None:
        return _interpret_ranks(stand_in, inputs, recorded, stop, hook, sources, known or {}, seen)
    targets = [*recorded, *(seen or ([] if stop or seen is not None else [program.output_node]))]
    needed = needed_for(targets, known or {})
    order = [n for n in program.graph.nodes if n in needed]
    freed = last_uses(order, recorded)
    values: dict[fx.Node, Any] = dict(known or {})
    results: dict[str, Any] = {}

    def ready(node: fx.Node) -> None:
        for used in node.all_input_nodes:
            if used not in values:
                values[used] = (sources or {}).get(used.name, program.weights[used.name].source).load()

    with torch.no_grad():
        for node in order:
            if node.op == "placeholder" and node.name in program.weights:
                continue
            if node not in values:
                ready(node)
                if node.op == "output":
                    outputs = fx.map_arg(node.args[0], lambda n: values[n])
                    results.update(zip(program.signature.output_names, outputs, strict=True))
                elif node.op == "placeholder":
                    values[node] = inputs[str(node.meta["input"])]
                else:
                    values[node] = evaluate(node, values)
            if hook is not None and node in values:
                values[node] = hook(node, values[node])
            for dead in freed.get(node, ()):
                values.pop(dead, None)
    for node in recorded:
        if node not in values and node.name in program.weights:
            values[node] = (sources or {}).get(node.name, program.weights[node.name].source).load()
        results[node.name] = values[node]
    return results


def _interpret_ranks(
    stand_in: StandIns,
    inputs: Mapping[str, torch.Tensor],
    recorded: list[fx.Node],
    stop: bool,
    hook: Hook | None,
    sources: Mapping[str, TensorSource] | None,
    known: Mapping[fx.Node, Any],
    only: list[fx.Node] | None,
) -> dict[str, Any]:
    """Run a sharded program through its stand-in: the unrolled program, or the program of this process's rank."""
    values_by_copy: dict[fx.Node, Any] = {}
    for node, value in known.items():
        copies = stand_in.nodes(node)
        values_by_copy.update(
            zip(copies, value if isinstance(value, list) else [value] * len(copies), strict=True)
        )
    record = [copy for node in recorded for copy in stand_in.nodes(node)]
    seen = None if only is None else [copy for node in only for copy in stand_in.nodes(node)]
    outputs = interpret(
        stand_in.program, inputs, record=record, stop=stop, hook=hook, sources=sources, known=values_by_copy,
        only=seen,
    )  # fmt: skip
    names = {copy.name for copy in record}
    results = {name: value for name, value in outputs.items() if name not in names}
    for node in recorded:
        values = [outputs[copy.name] for copy in stand_in.nodes(node)]
        results[node.name] = values[0] if len(values) == 1 else values
    return results
