"""Make a causal temporal network take its input piece by piece, its past in states that it takes and gives."""

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
from .writing import CONVOLUTION

if TYPE_CHECKING:
    from ...measure.context import Context

aten = torch.ops.aten


@dataclass
class _Reach:
    """One convolution along time: where its value is, what it reads, how many frames back.

    ``chain`` is the convolution with the padding before it and the cuts after it.
    """

    root: fx.Node
    node: fx.Node
    source: fx.Node
    frames: int
    axis: int
    chain: list[fx.Node]


@dataclass(frozen=True, kw_only=True)
class StreamConvolutions(Pass):
    """Turn zero padding in the past into the past itself.

    A convolution that reads L frames back reads them from a state, which is the last L frames of what it
    read before; all states are inputs ``state_0``, ``state_1``, ... and their successors are outputs
    ``next_state_0``, ... States of zeros are the beginning. Whatever the pieces, one frame or all, their
    outputs one after the other are the outputs of the whole: this is checked on random pieces in float64.
    """

    name = "stream-convolutions"
    contract = ExactInChunks()
    together = True
    provides = (Streaming,)
    excludes = (Streaming,)
    paper = "arXiv 2406.02652"

    axis: str = option(
        "auto", help="the name of the size that is time; auto takes the only one besides the batch"
    )

    def plan(self, program: Program, context: Context) -> Plan:
        """Find what reads earlier frames; refuse what reads later ones or all of them."""
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
        """Yield each value that is read back, with its readers, and what cannot stream."""
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

    def _time(self, program: Program) -> str | None:
        names = list(program.signature.sizes)
        if self.axis != "auto":
            return self.axis if self.axis in names else None
        first = {str(spec.shape[0]) for spec in program.signature.inputs.values() if spec.shape}
        others = [name for name in names if name not in first]
        return others[0] if len(others) == 1 else None

    def _trial(self, program: Program, plan: Plan) -> Refused | None:
        """Run both forms: what depends on other frames in a way that no state carries shows by its values."""
        wrong = compare_in_chunks(program, self.tried(program, plan), plan.sites[0]["time"], every_value=True)
        if wrong is None or wrong.error <= ExactInChunks.limit:
            return None
        node = next((n for n in program.graph.nodes if n.name == wrong.name), None)
        line = program.source_line(node) if node is not None else ""
        return Refused(
            wrong.name, "its values depend on frames outside the piece, which no convolution explains", line
        )

    def rewrite(self, program: Program, plan: Plan) -> None:
        """Put the state before each value that is read back, and return what follows it."""
        if not plan.sites:
            return
        time = plan.sites[0]["time"]
        constant = set(depends_on_weights_alone(program))
        for number, (site, (found, reaches)) in enumerate(self.chosen(program, plan)):
            source, frames, axis = program.edit.now(found), int(site["frames"]), reaches[0].axis
            by_name = {reach.root.name: reach for reach in reaches}
            shape = list(source.meta["val"].shape)
            shape[axis] = frames
            state = add_input(program, f"state_{number}", shape, source.meta["val"].dtype)
            with program.edit.after(source):
                joined = program.edit.call(aten.cat.default, [state, source], axis)
            for reader in site["readers"]:
                _reread(program, by_name[reader], joined, frames, constant)
            with program.edit.after(joined):
                following = program.edit.call(aten.slice.Tensor, joined, axis, -frames)
            program.add_output(f"next_state_{number}", following)
        limit_size(program, time, 1)
        program.facts.add(Streaming(time))
        block_export(program, "a streaming program has states, which no checkpoint holds")

    def check(self, before: Program, after: Program, entry: PassReport) -> None:
        """Compare pieces with the whole; see :class:`~graphopt.passes.framework.contracts.ExactInChunks`."""
        worst = compare_in_chunks(before, after, after.facts[Streaming].time)
        entry.checks, entry.error = 1, 0.0 if worst is None else worst.error
        if worst is not None and not worst.error <= ExactInChunks.limit:
            raise ContractError(
                f"{self.name}: output {worst.name} of pieces differs from that of the whole by {worst.error:.2g}"
            )


def _reaches(program: Program, time: str) -> Iterator[_Reach | Refused]:
    """Yield what each convolution reads along time, or why it cannot stream."""
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
        reach = _reach(program, node, constant, axes[0])
        if isinstance(reach, str):
            yield Refused(node.name, reach, program.source_line(node))
        elif reach is not None:
            yield reach


def _reach(program: Program, node: fx.Node, constant: set[fx.Node], axis: int) -> _Reach | str | None:
    """Return what a convolution reads along time, why it cannot stream, or None if it reads no other frame."""
    if axis < 2:
        return "it mixes frames as channels"
    try:
        form = read_operator(node, constant)
        if form is None:
            return "it is no convolution of the kind that streams"
        reach = _along(node, form, constant, axis)
    except NotLinear as problem:
        return str(problem)
    if isinstance(reach, str):
        return reach
    chain, line = reach
    if line.stride != 1:
        return "it has a stride along time"
    if line.count == 1 and line.first == 0 and line.high == 0:
        return None
    if line.last > 0:
        return f"it reads {line.last} frames ahead"
    source: Any = chain[0].args[0]
    sizes = [n.meta["val"].shape[axis] for n in (source, chain[-1])]
    if expression(sizes[0]) != expression(sizes[1]):
        return "it gives another number of frames than it reads"
    return _Reach(chain[-1], node, source, -line.first, axis, chain)


def _along(node: fx.Node, form: Form, constant: set[fx.Node], axis: int) -> tuple[list[fx.Node], Axis] | str:
    """Return a convolution with the padding before it and the cut after it, and what they read along time.

    Other axes are left to the operators themselves, which are repeated as they are there.
    """
    chain, line = [node], form.axes[axis - 2]
    place = form.source
    while has(place, Trait.PADDING):
        try:
            before = read_operator(place, constant)
        except NotLinear:
            break  # it pads with another value than zero, which states would not hold
        if before is None:
            break
        ends = before.axes[axis - 2]
        if ends.extends and before.mode != "zeros":
            return f"its past is padded by {before.mode}, not by zeros"
        if (ends.low < 0 < line.low) or (ends.high < 0 < line.high):
            break  # frames are cut off, and zeros put in their place
        chain.insert(0, place)
        line = one_after_another(ends, line)
        place = before.source
    while len(chain[-1].users) == 1 and is_operator(user := next(iter(chain[-1].users)), "aten.slice"):
        after = read_operator(user, constant)
        if after is None:
            break
        chain.append(user)
        line = one_after_another(line, after.axes[axis - 2])
    return chain, line


def _reread(program: Program, reach: _Reach, joined: fx.Node, frames: int, constant: set[fx.Node]) -> None:
    """Let a convolution read the past and the present, and pad nothing along time."""
    place = reach.axis
    with program.edit.before(reach.root):
        value = joined
        if frames > reach.frames:
            value = program.edit.call(aten.slice.Tensor, joined, place, frames - reach.frames)
        for node in reach.chain:
            if node is reach.node:
                value = _convolved(program, node, value, place, constant)
            elif has(node, Trait.PADDING):
                value = _padded(program, node, value, place)
            elif int(arguments(node)["dim"]) != place:
                value = program.edit.call(node.target, value, *node.args[1:], **node.kwargs)
    program.edit.replace(reach.root, value)


def _padded(program: Program, node: fx.Node, value: fx.Node, place: int) -> fx.Node:
    """Repeat a padding, that along time left out."""
    pad = list(arguments(node)["pad"])
    index = 2 * (node.meta["val"].dim() - 1 - place)
    if index < len(pad):
        pad[index : index + 2] = [0, 0]
    if not any(pad):
        return value
    args, kwargs = normal_call(node.target, arguments(node) | {"self": value, "pad": pad})
    return program.edit.call(node.target, *args, **kwargs)


def _convolved(
    program: Program, node: fx.Node, value: fx.Node, place: int, constant: set[fx.Node]
) -> fx.Node:
    """Repeat a convolution or pooling without its padding along time."""
    found = arguments(node)
    form = read_operator(node, constant)
    assert form is not None
    ends = [(0, 0) if index == place - 2 else (a.low, a.high) for index, a in enumerate(form.axes)]
    if any(low != high for low, high in ends):
        # an even kernel with padding of the same size has one more at the far end
        pad = [size for pair in reversed(ends) for size in pair]
        value = program.edit.call(aten.pad.default, value, pad)
        ends = [(0, 0)] * len(ends)
    source = "self" if is_operator(node, *POOLINGS) else "input"
    target = CONVOLUTION[len(form.axes)] if isinstance(found["padding"], str) else node.target
    args, kwargs = normal_call(target, found | {source: value, "padding": [low for low, _ in ends]})
    return program.edit.call(target, *args, **kwargs)
