"""Components of a program as programs of their own, and put back after they were rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import UsageError, VerificationError
from ..infer import infer
from ..program import Program, program_method
from ..running.evaluate import needed_for
from ..running.examples import example_inputs
from ..running.execute import interpret
from ..running.extract import extract
from ..running.fold import drop_unread_weights
from ..weights import Weight
from .comparison import relative_error

if TYPE_CHECKING:
    from ..anatomy import Component

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_NARROW = 5e-2


@program_method("part")
def part_of(program: Program, name: str) -> Program:
    """Return a component as a program of its own; see :meth:`~graphopt.ir.program.Program.part`."""
    component = _component(program, name)
    part = extract(program, component.reads, component.writes)
    nodes = {node.name: node for node in part.graph.nodes}
    # a tensor of the checkpoint belongs to the part where the part reads it
    part.checkpoint = {
        tensor: nodes[node.name]
        for tensor, node in program.checkpoint.items()
        if all(n.name in nodes for n in needed_for([node], {}))
    }
    return part


@program_method("with_part")
def with_part(program: Program, name: str, part: Program, *, compare: bool = True) -> Program:
    """Return a copy in which a part computes a component; see :meth:`~graphopt.ir.program.Program.with_part`."""
    component = _component(program, name)
    _check_interface(program, component, part)
    whole = program.copy()
    nodes = {node.name: node for node in whole.graph.nodes}
    reads = {n: nodes[node.name] for n, node in component.reads.items()}
    writes = {n: nodes[node.name] for n, node in component.writes.items()}
    mapping, renamed = _weights(program, whole, part)
    for input_name, node in part.input_nodes.items():
        mapping[node] = reads[input_name] if input_name in reads else whole.input_nodes[input_name]
    _insert(whole, part, mapping, set(writes.values()))
    results = {n: mapping[node] for n, node in part.outputs.items()}
    for n, old in writes.items():
        old.replace_all_uses_with(results[n])
    whole.checkpoint |= {tensor: mapping[node] for tensor, node in part.checkpoint.items()}
    whole.changed()
    unread = [n for n in writes.values() if not n.users]
    whole.edit.erase_dead(unread)
    drop_unread_weights(whole)
    _take_names(whole, renamed)
    for fact in part.facts:
        if type(fact) not in whole.facts and not fact.of_every_operator:
            whole.facts.add(fact)
    for fact in list(whole.facts):
        if fact.of_every_operator and type(fact) not in part.facts:
            whole.facts.discard(type(fact))
    whole.history = [*whole.history, *part.history]
    whole.changed()
    if compare:
        _compare(whole, part, reads, results)
    return whole


def _component(program: Program, name: str) -> Component:
    components = program.anatomy.components
    try:
        return program.anatomy.component(name)
    except KeyError:
        several = [c.name for c in components.values() if name in c.other_names]
        if several:
            raise UsageError(
                f"several parts are {name!r}: {', '.join(several)}", hint="give one of these names"
            ) from None
        there_are = f"it has {', '.join(components)}" if components else "it is not made of several"
        raise UsageError(f"the program has no part {name!r}", hint=there_are) from None


def _check_interface(program: Program, component: Component, part: Program) -> None:
    """Check that a part takes and gives what the component does, in the same shapes and types."""
    if part.dials:
        raise UsageError(f"the part has settings that the whole has not: {', '.join(part.dials)}")
    original = part_of(program, component.name)
    for what, expected, found in (
        ("takes", original.input_nodes, part.input_nodes),
        ("gives", original.outputs, part.outputs),
    ):
        if set(found) - set(expected) or (what == "gives" and list(expected) != list(found)):
            names = f"{', '.join(found) or 'nothing'} instead of {', '.join(expected) or 'nothing'}"
            raise VerificationError(f"the part for {component.name} {what} {names}")
        for name, node in found.items():
            before, after = (_shape(p, n) for p, n in ((original, expected[name]), (part, node)))
            if before != after:
                raise VerificationError(
                    f"the part for {component.name} {what} {name} as {_said(after)} instead of {_said(before)}"
                )


def _shape(program: Program, node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return (str(value),)
    return (value.dtype, *(program.size_text(size) for size in value.shape))


def _said(shape: tuple[Any, ...]) -> str:
    return f"{str(shape[0]).removeprefix('torch.')}[{', '.join(map(str, shape[1:]))}]"


def _weights(
    program: Program, whole: Program, part: Program
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, Weight]]:
    """Return the placeholder of each weight of a part in the whole, and what those that replace others are called.

    Raises:
        VerificationError: a weight has other values in the part, and the rest of the program reads it as well.
    """
    present = {name: node for node in whole.weight_nodes for name in whole.weights[node.name].all_names}
    mapping: dict[fx.Node, fx.Node] = {}
    renamed: dict[fx.Node, Weight] = {}
    for node in part.weight_nodes:
        weight = part.weights[node.name]
        old = present.get(weight.name)
        if old is not None and whole.weights[old.name].source is weight.source:
            mapping[node] = old
            continue
        name = weight.name
        while name in present:
            name = f"{name}.rewritten"
        new = whole.edit.add_weight(name, weight.source, kind=weight.kind, persistent=weight.persistent)
        whole.weights[new.name] = Weight(
            name, weight.source, weight.kind, persistent=weight.persistent, trainable=weight.trainable
        )
        mapping[node] = new
        renamed[new] = weight
    return mapping, renamed


def _take_names(whole: Program, renamed: dict[fx.Node, Weight]) -> None:
    """Give weights the names that they have in the part, which those that they replace have left."""
    for node, weight in renamed.items():
        taken = {name for n, w in whole.weights.items() if n != node.name for name in w.all_names}
        both = taken & set(weight.all_names)
        if both:
            raise VerificationError(
                f"{sorted(both)[0]} has other values in the part, and the rest of the program reads it as well",
                hint="leave weights that are shared with the rest as they are",
            )
        whole.weights[node.name] = weight


def _insert(whole: Program, part: Program, mapping: dict[fx.Node, fx.Node], writes: set[fx.Node]) -> None:
    """Insert the operators of a part before the first reader of what it computes."""
    order = {node: i for i, node in enumerate(whole.graph.nodes)}
    before = min((user for node in writes for user in node.users), key=lambda n: order[n])
    late = [n for n in mapping.values() if n in order and order[n] >= order[before] and n.op != "placeholder"]
    if late:
        raise UsageError(f"{late[0].name} is computed only after the part is needed")
    with whole.graph.inserting_before(before):
        for node in part.graph.nodes:
            if node.op == "call_function":
                new = whole.graph.node_copy(node, mapping.__getitem__)
                if part.mode is not whole.mode:
                    # a part that was saved and read again, whose sizes are other symbols
                    new.meta["val"] = infer(whole.mode, new.target, new.args, new.kwargs)
                mapping[node] = new


def _compare(whole: Program, part: Program, reads: dict[str, fx.Node], results: dict[str, fx.Node]) -> None:
    """Compare what the part computes within the whole with what it computes by itself."""
    inputs = example_inputs(whole)
    within = interpret(whole, inputs, record=[*reads.values(), *results.values()])
    given = {n: inputs[n] if n in inputs else within[reads[n].name] for n in part.input_nodes}
    alone = interpret(part, given)
    for name, node in results.items():
        value = within[node.name]
        error = relative_error(value, alone[name])
        if error > _TOLERANCE.get(getattr(value, "dtype", torch.float32), _NARROW):
            raise VerificationError(
                f"{name} differs by {error:.1e} within the program from the part by itself"
            )
