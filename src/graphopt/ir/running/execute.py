"""Running a program: compiled where it fits in memory, streamed weight by weight where it does not."""

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


def memory_available() -> int:
    """Bytes of memory that can be had without swapping or passing a limit; a guess where nothing says."""
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
        inputs: a tensor per input and dial.
        streamed: load each weight at its first use and free it after its last; decided by size if None.
    """
    program = runnable(program)
    if streamed is None:
        streamed = sum(weight.bytes for weight in program.weights.values()) > memory_available() // 2
    if streamed:
        return interpret(program, inputs)
    compiled: Callable[..., Any] = program.derived("compiled", lambda: compile_graph(program))
    values = compiled(inputs)
    return dict(zip(program.signature.output_names, values, strict=True))


def release(program: Program) -> None:
    """Free the weights that were loaded to run a program; they are loaded again when it runs again."""
    for running in {id(p): p for p in (program, runnable(program))}.values():
        running._derived.pop("compiled", None)


def return_memory() -> None:
    """Give what was freed back to the system where the C library keeps it, as glibc does of what calibration took."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def compile_graph(program: Program) -> Callable[[Mapping[str, torch.Tensor]], Any]:
    """Return a function of the inputs with everything that depends on weights alone computed once."""
    folded = fold(program)
    module = fx.GraphModule(torch.nn.Module(), folded.graph)
    placeholders = folded.graph.find_nodes(op="placeholder")
    # what nothing reads, such as a matrix of which each rank has its part, is not loaded
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
    """The values of a source, for as long as some program holds them; the source stays, so that its id is its own."""

    source: TensorSource
    tensor: torch.Tensor


_HELD: weakref.WeakValueDictionary[int, _Loaded] = weakref.WeakValueDictionary()


def _load_shared(source: TensorSource) -> _Loaded:
    """Load a source, or share what another program has of it: passes change few weights of a program."""
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
    given: Mapping[fx.Node, Any] | None = None,
) -> dict[str, Any]:
    """Run node by node; a weight is loaded at its first use and freed after the last.

    Args:
        program: what to run.
        inputs: a tensor per input and dial.
        record: nodes whose values are returned too, under their node names.
        stop: end once the recorded values are known, instead of computing the outputs.
        hook: called with each node and its value; what it returns takes the value's place.
        sources: other values for weights, by node name.
        given: values known beforehand; what only they need is not computed.

    Returns:
        Outputs by flat name, unless ``stop``, and recorded values by node name. Of a sharded program that runs
        in one process, a value that differs from rank to rank is a list, one a rank.
    """
    recorded = list(record)
    stand_in = stand_ins(program)
    if stand_in is not None:
        return _interpret_ranks(stand_in, inputs, recorded, stop, hook, sources, given or {})
    targets = recorded if stop else [*recorded, program.output_node]
    needed = needed_for(targets, given or {})
    order = [n for n in program.graph.nodes if n in needed]
    freed = last_uses(order, recorded)
    values: dict[fx.Node, Any] = dict(given or {})
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
    given: Mapping[fx.Node, Any],
) -> dict[str, Any]:
    """Run a sharded program by the nodes that stand for its own: of all ranks, or of this process's."""
    values_by_copy: dict[fx.Node, Any] = {}
    for node, value in given.items():
        copies = stand_in.nodes(node)
        values_by_copy.update(
            zip(copies, value if isinstance(value, list) else [value] * len(copies), strict=True)
        )
    record = [copy for node in recorded for copy in stand_in.nodes(node)]
    outputs = interpret(
        stand_in.program, inputs, record=record, stop=stop, hook=hook, sources=sources, given=values_by_copy
    )
    names = {copy.name for copy in record}
    results = {name: value for name, value in outputs.items() if name not in names}
    for node in recorded:
        values = [outputs[copy.name] for copy in stand_in.nodes(node)]
        results[node.name] = values[0] if len(values) == 1 else values
    return results
