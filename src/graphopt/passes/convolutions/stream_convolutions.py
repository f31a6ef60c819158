"""Streaming a causal temporal network: input in pieces, the past in recurrent states that it takes and returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.checking.report import PassReport
from ...ir.checking.streaming import compare_in_chunks
from ...ir.errors import ContractError
from ...ir.export_blockers import block_export
from ...ir.facts import Streaming
from ...ir.inputs import add_input, limit_size
from ...ir.operators.traits import Trait, has
from ...ir.option import option
from ...ir.program import Program
from ...ir.running.fold import depends_on_weights_alone
from ...ir.schema import arguments, is_operator, normal_call
from ...ir.sizes import expression
from ..framework.base import Pass
from ..framework.contracts import ExactInChunks
from ..framework.plan import Plan, Refused, Site
from .forms import Form
from .geometry import Axis, one_after_another
from .reading import CONVOLUTIONS, POOLINGS, NotLinear, read_operator
from .windows import stream_windows, windowed
from .writing import CONVOLUTION

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten


@dataclass
class _Reach:
    """One convolution along time: its value, its input, and how many frames back it reads.

    ``chain`` is the convolution with the padding before it and the slices after it.
    """

    root: fx.Node
    node: fx.Node
    source: fx.Node
    frames: int
    axis: int
    chain: list[fx.Node]


@dataclass(frozen=True, kw_only=True)
class StreamConvolutions(Pass):
    """Replace zero padding in the past by the past itself, kept in recurrent states.

    A convolution that reads L frames back reads them from a recurrent state, the last L frames of its previous
    input. Attention with a window (see window-attention) reads the keys and values of the last frames, and which of them
    there have been, from ``key_state_0``, ``value_state_0`` and ``seen_state_0``. All states are inputs ``state_0``,
    ``state_1``, ... and their successors are outputs ``next_state_0``, ...; they start as zeros. For pieces of any length,
    the concatenated outputs equal the outputs of the whole; this is checked on random pieces in float64.
    """

    name = "stream-convolutions"
    contract = ExactInChunks()
    together = True
    provides = (Streaming,)
    excludes = (Streaming,)
    paper = "arXiv 2406.02652, 2409.09018"

    axis: str = option(
        "auto", help="the name of the size that is time; auto takes the only one besides the batch"
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Find convolutions and attention that read earlier frames; refuse what reads later ones or all of them."""
        plan = Plan()
        time = self._time(program)
        if time is None:
            plan.refused.append(
                Refused("inputs", f"no size to take for time: {', '.join(program.signature.sizes)}")
            )
            return plan
        plan = self.findings(program).plan()
        if plan.refused:
            return replace(plan, sites=[])
        if plan.sites:
            problem = self._trial(program, plan)
            if problem is not None:
                plan.refused.append(problem)
                plan.sites, plan.trial = [], None
        return plan

    def find(self, program: Program) -> Iterator[tuple[Site, Any] | Refused]:
        """Yield each value whose past is read, with its readers, and what cannot stream."""
        time = self._time(program)
        if time is None:
            return
        states: dict[fx.Node, list[_Reach]] = {}
        for reach in _reaches(program, time):
            if isinstance(reach, Refused):
                yield reach
            else:
                states.setdefault(reach.source, []).append(reach)
        for source, reaches in states.items():
            frames, readers = max(r.frames for r in reaches), [r.root.name for r in reaches]
            yield Site(source.name, frames=frames, readers=readers, time=time), (source, reaches)
        for node in windowed(program, time):
            if isinstance(node, Refused):
                yield node
            else:
                frames = int(arguments(node)["window"]) - 1
                yield Site(node.name, frames=frames, readers=["attention"], time=time), (node, None)

    def _time(self, program: Program) -> str | None:
        names = list(program.signature.sizes)
        if self.axis != "auto":
            return self.axis if self.axis in names else None
        first = {str(spec.shape[0]) for spec in program.signature.inputs.values() if spec.shape}
        others = [name for name in names if name not in first]
        return others[0] if len(others) == 1 else None

    def _trial(self, program: Program, plan: Plan) -> Refused | None:
        """Compare pieces with the whole: values that depend on other frames in a way no recurrent state holds differ."""
        mismatch = compare_in_chunks(
            program, self.tried(program, plan), plan.sites[0]["time"], every_value=True
        )
        if mismatch is None or mismatch.error <= ExactInChunks.limit:
            return None
        node = next((n for n in program.graph.nodes if n.name == mismatch.name), None)
        line = program.source_line(node) if node is not None else ""
        return Refused(
            mismatch.name,
            "its values depend on frames outside the piece, which no convolution or window explains",
            line,
        )

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Prepend a recurrent state to each value whose past is read, and add the next state as an output."""
        if not plan.sites:
            return
        time = plan.sites[0]["time"]
        constant = set(depends_on_weights_alone(program))
        windows: list[fx.Node] = []
        number = -1
        for site, (site_source, reaches) in self.chosen(program, plan):
            if reaches is None:
                windows.append(program.edit.now(site_source))
                continue
            number += 1
            source, frames, axis = program.edit.now(site_source), int(site["frames"]), reaches[0].axis
            by_name = {reach.root.name: reach for reach in reaches}
            shape = list(source.meta["val"].shape)
            shape[axis] = frames
            state = add_input(program, f"state_{number}", shape, source.meta["val"].dtype)
            with program.edit.after(source):
                joined = program.edit.call(aten.cat.default, [state, source], axis)
            for reader in site["readers"]:
                _read_with_state(program, by_name[reader], joined, frames, constant)
            with program.edit.after(joined):
                following = program.edit.call(aten.slice.Tensor, joined, axis, -frames)
            program.add_output(f"next_state_{number}", following)
        stream_windows(program, windows)
        limit_size(program, time, 1)
        program.facts.add(Streaming(time))
        block_export(program, "a streaming program has recurrent states, which no checkpoint holds")

    def check(self, before: Program, after: Program, entry: PassReport) -> None:
        """Compare pieces with the whole; see :class:`~graphopt.passes.framework.contracts.ExactInChunks`."""
        mismatch = compare_in_chunks(before, after, after.facts[Streaming].time)
        entry.checks, entry.error = 1, 0.0 if mismatch is None else mismatch.error
        if mismatch is not None and not mismatch.error <= ExactInChunks.limit:
            raise ContractError(
                f"{self.name}: output {mismatch.name} of pieces differs from that of the whole by {mismatch.error:.2g}"
            )


def _reaches(program: Program, time: str) -> Iterator[_Reach | Refused]:
    """Yield the reach of each convolution along time, or why it cannot stream."""
    constant = depends_on_weights_alone(program)
    symbol = next(s for s, name in program.symbols.items() if name == time)
    for node in program.graph.nodes:
        if not is_operator(node, *CONVOLUTIONS, *POOLINGS):
            continue
        axes = [
            i for i, s in enumerate(node.args[0].meta["val"].shape) if symbol in expression(s).free_symbols
        ]
        if not axes:
            continue
        reach = _reach(node, constant, axes[0])
        if isinstance(reach, str):
            yield Refused(node.name, reach, program.source_line(node))
        elif reach is not None:
            yield reach


def _reach(node: fx.Node, constant: set[fx.Node], axis: int) -> _Reach | str | None:
    """Return a convolution's reach along time, why it cannot stream, or None if it reads no other frame."""
    if axis < 2:
        return "it mixes frames as channels"
    try:
        form = read_operator(node, constant)
        if form is None:
            return "it is no convolution of the kind that streams"
        reach = _chain_along(node, form, constant, axis)
    except NotLinear as problem:
        return str(problem)
    if isinstance(reach, str):
        return reach
    chain, kernel_axis = reach
    if kernel_axis.stride != 1:
        return "it has a stride along time"
    if kernel_axis.count == 1 and kernel_axis.first == 0 and kernel_axis.high == 0:
        return None
    if kernel_axis.last > 0:
        return f"it reads {kernel_axis.last} frames ahead"
    source: Any = chain[0].args[0]
    sizes = [n.meta["val"].shape[axis] for n in (source, chain[-1])]
    if expression(sizes[0]) != expression(sizes[1]):
        return "it returns another number of frames than it reads"
    return _Reach(chain[-1], node, source, -kernel_axis.first, axis, chain)


def _chain_along(
    node: fx.Node, form: Form, constant: set[fx.Node], axis: int
) -> tuple[list[fx.Node], Axis] | str:
    """Return a convolution with the padding before it and the slice after it, and their kernel offsets along time.

    Other axes are left to the operators themselves, which are repeated unchanged there.
    """
    chain, kernel_axis = [node], form.axes[axis - 2]
    current = form.source
    while has(current, Trait.PADDING):
        try:
            before = read_operator(current, constant)
        except NotLinear:
            break  # it pads with a value other than zero, which states would not hold
        if before is None:
            break
        pad_axis = before.axes[axis - 2]
        if pad_axis.extends and before.mode != "zeros":
            return f"its past is padded by {before.mode}, not by zeros"
        if (pad_axis.low < 0 < kernel_axis.low) or (pad_axis.high < 0 < kernel_axis.high):
            break  # frames are removed and replaced by zeros
        chain.insert(0, current)
        kernel_axis = one_after_another(pad_axis, kernel_axis)
        current = before.source
    while len(chain[-1].users) == 1 and is_operator(user := next(iter(chain[-1].users)), "aten.slice"):
        after = read_operator(user, constant)
        if after is None:
            break
        chain.append(user)
        kernel_axis = one_after_another(kernel_axis, after.axes[axis - 2])
    return chain, kernel_axis


def _read_with_state(
    program: Program, reach: _Reach, joined: fx.Node, frames: int, constant: set[fx.Node]
) -> None:
    """Let a convolution read the recurrent state and the piece, without padding along time."""
    time_axis = reach.axis
    with program.edit.before(reach.root):
        value = joined
        if frames > reach.frames:
            value = program.edit.call(aten.slice.Tensor, joined, time_axis, frames - reach.frames)
        for node in reach.chain:
            if node is reach.node:
                value = _repeat_convolution(program, node, value, time_axis, constant)
            elif has(node, Trait.PADDING):
                value = _repeat_padding(program, node, value, time_axis)
            elif int(arguments(node)["dim"]) != time_axis:
                value = program.edit.call(node.target, value, *node.args[1:], **node.kwargs)
    program.edit.replace(reach.root, value)


def _repeat_padding(program: Program, node: fx.Node, value: fx.Node, time_axis: int) -> fx.Node:
    """Repeat a padding without its part along time."""
    pad = list(arguments(node)["pad"])
    index = 2 * (node.meta["val"].dim() - 1 - time_axis)
    if index < len(pad):
        pad[index : index + 2] = [0, 0]
    if not any(pad):
        return value
    args, kwargs = normal_call(node.target, arguments(node) | {"self": value, "pad": pad})
    return program.edit.call(node.target, *args, **kwargs)


def _repeat_convolution(
    program: Program, node: fx.Node, value: fx.Node, time_axis: int, constant: set[fx.Node]
) -> fx.Node:
    """Repeat a convolution or pooling without its padding along time."""
    call_args = arguments(node)
    form = read_operator(node, constant)
    assert form is not None
    ends = [(0, 0) if index == time_axis - 2 else (a.low, a.high) for index, a in enumerate(form.axes)]
    if any(low != high for low, high in ends):
        # an even kernel with padding of the same size has one more at the far end
        pad = [size for pair in reversed(ends) for size in pair]
        value = program.edit.call(aten.pad.default, value, pad)
        ends = [(0, 0)] * len(ends)
    source = "self" if is_operator(node, *POOLINGS) else "input"
    target = CONVOLUTION[len(form.axes)] if isinstance(call_args["padding"], str) else node.target
    args, kwargs = normal_call(target, call_args | {source: value, "padding": [low for low, _ in ends]})
    return program.edit.call(target, *args, **kwargs)
