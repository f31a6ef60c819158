"""The cost of running a program: parameters, FLOPs, bytes, peak memory and time, in total and by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
from torch import fx

from ..operators.work import Work
from .communication import sent_bytes
from .devices import Device, find_device
from .formulas import work
from .liveness import Peak, find_peak
from .regions import regions
from .resolve import Numbers, symbol_names
from .roofline import Bound, Timing, time_call, total
from .survey import Survey, survey
from .weights import count_weights

if TYPE_CHECKING:
    from ..program import Program


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block, or of the embedding, the head or everything else.

    Attributes:
        operators: number of operators that compute something; views and folded operators do not.
        flops: floating-point operations.
        bytes: bytes moved.
        weight_bytes: bytes of weights among them.
        time_seconds: time by roofline; None without a device.
        bound: what limits it for most of its time; None without a device.
    """

    operators: int
    flops: int
    bytes: int
    weight_bytes: int
    time_seconds: float | None = None
    bound: Bound | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a program.

    Attributes:
        sizes: the named sizes it was computed for.
        parameters: number of trained values that the program reads, after folding what depends on weights alone.
        parameter_bytes: their bytes.
        resident_bytes: bytes of all weights, buffers included: the memory a device needs between runs.
        flops: floating-point operations; a multiplication and an addition count as two.
        bytes: bytes moved to and from memory, no operator fused with another.
        weight_bytes: bytes of weights among them, read once per operator that reads them.
        peak_memory: largest number of bytes of activations alive at once, inputs and outputs included.
        peak_node: the operator that runs then.
        device: name of the device; None if none was asked for.
        time_seconds: time by roofline, nothing overlapping; None without a device.
        bound: what limits it for most of that time; None without a device.
        expressions: ``flops`` and ``bytes`` as expressions of the program's size symbols.
        names: the names of those symbols.
        blocks: share by block name, in execution order, then ``embedding``, ``head`` and ``other``.
        unknown: operators without a formula, and how often they are called; only their bytes are counted.
    """

    sizes: dict[str, int]
    parameters: int
    parameter_bytes: int
    resident_bytes: int
    flops: int
    bytes: int
    weight_bytes: int
    peak_memory: int
    peak_node: str
    device: str | None = None
    time_seconds: float | None = None
    bound: Bound | None = None
    expressions: dict[str, sympy.Expr] = field(default_factory=dict)
    names: dict[sympy.Symbol, str] = field(default_factory=dict)
    blocks: dict[str, BlockCost] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; expressions are text in the names of the sizes."""
        plain = {
            name: value
            for name, value in vars(self).items()
            if name not in ("expressions", "names", "blocks")
        }
        named = {symbol: sympy.Symbol(name) for symbol, name in self.names.items()}
        return plain | {
            "sizes": dict(self.sizes),
            "unknown": dict(self.unknown),
            "expressions": {name: str(value.xreplace(named)) for name, value in self.expressions.items()},
            "blocks": {name: dict(vars(block)) for name, block in self.blocks.items()},
        }


def cost(
    program: Program, sizes: Mapping[str, int] | None = None, device: Device | str | None = None
) -> Cost:
    """Return the cost of one run of a program.

    Args:
        program: a canonical program.
        sizes: sizes by name, such as ``{"batch": 1, "sequence": 4096}``; the others as at capture.
        device: the device to estimate time for, or its name.

    Raises:
        UsageError: a size or the device has no such name, or a size is out of range.
    """
    target_device = find_device(device) if isinstance(device, str) else device
    calls = survey(program)
    number = Numbers(program, sizes)
    works, timings = _works(calls, number, target_device)
    tally = _Tally(works, timings)
    everything = tally.of(calls.call_of.values())
    weights = count_weights(program)
    peak: Peak = find_peak(program, number)
    return Cost(
        sizes=dict(number.sizes),
        parameters=weights.parameters,
        parameter_bytes=weights.parameter_bytes,
        resident_bytes=weights.bytes,
        flops=everything.flops,
        bytes=everything.bytes,
        weight_bytes=everything.weight_bytes,
        peak_memory=peak.bytes,
        peak_node=peak.node,
        device=None if target_device is None else target_device.name,
        time_seconds=everything.time_seconds,
        bound=everything.bound,
        expressions=expressions(program),
        names=symbol_names(program),
        blocks=_blocks(program, calls, tally),
        unknown=calls.unknown(),
    )


def run_totals(program: Program) -> dict[str, int]:
    """Return the totals that reports compare: parameters, parameter_bytes, flops, bytes and peak_memory,
    as in :class:`Cost`, and the bytes that a rank sends."""
    calls = survey(program)
    number = Numbers(program, None)
    works, _ = _works(calls, number, None)
    everything = _Tally(works, None).of(calls.call_of.values())
    weights = count_weights(program)
    return {
        "parameters": weights.parameters,
        "parameter_bytes": weights.parameter_bytes,
        "flops": everything.flops,
        "bytes": everything.bytes,
        "peak_memory": find_peak(program, number).bytes,
        "sent_bytes": sent_bytes(program),
    }


def works_by_node(program: Program, sizes: Mapping[str, int] | None = None) -> dict[fx.Node, Work]:
    """Return the work, in numbers, of every operator that computes something when the program runs.

    Views and operators on weights alone are left out.
    """
    calls = survey(program)
    works, _ = _works(calls, Numbers(program, sizes), None)
    return {node: works[index] for node, index in calls.call_of.items()}


def expressions(program: Program) -> dict[str, sympy.Expr]:
    """Return the program's ``flops`` and ``bytes`` as expressions of its size symbols."""

    def find() -> dict[str, sympy.Expr]:
        calls = survey(program)
        pairs = list(zip(calls.symbolic, calls.counts(), strict=True))
        return {
            "flops": sympy.expand(sympy.Add(*(count * item.flops for item, count in pairs))),
            "bytes": sympy.expand(sympy.Add(*(count * item.bytes for item, count in pairs))),
        }

    return dict(program.derived("cost_expressions", find))


def _works(calls: Survey, number: Numbers, device: Device | None) -> tuple[list[Work], list[Timing] | None]:
    """Return the work of each distinct call in numbers, and its time where there is a device.

    Formulas are evaluated on numbers, which is faster than substituting in their expressions.
    """
    works = [work(call.at(number)) for call in calls.calls]
    if device is None:
        return works, None
    timings = [
        time_call(int(item.flops), int(item.bytes), device, call.kind)
        for call, item in zip(calls.calls, works, strict=True)
    ]
    return works, timings


@dataclass
class _Tally:
    """Adds up calls given by index."""

    works: list[Work]
    timings: list[Timing] | None

    def of(self, indices: Any) -> BlockCost:
        counts: dict[int, int] = {}
        for index in indices:
            counts[index] = counts.get(index, 0) + 1
        timing = None
        if self.timings is not None:
            timing = total((self.timings[index], count) for index, count in counts.items())
        return BlockCost(
            operators=sum(counts.values()),
            flops=sum(count * int(self.works[i].flops) for i, count in counts.items()),
            bytes=sum(count * int(self.works[i].bytes) for i, count in counts.items()),
            weight_bytes=sum(count * int(self.works[i].weight_bytes) for i, count in counts.items()),
            time_seconds=None if timing is None else timing.seconds,
            bound=None if timing is None else timing.bound,
        )


def _blocks(program: Program, program_calls: Survey, tally: _Tally) -> dict[str, BlockCost]:
    region_of = regions(program)
    calls: dict[str, list[int]] = {block.name: [] for block in program.anatomy.blocks}
    calls |= {"embedding": [], "head": [], "other": []}
    for node, index in program_calls.call_of.items():
        calls[region_of[node]].append(index)
    return {name: tally.of(indices) for name, indices in calls.items() if indices}
