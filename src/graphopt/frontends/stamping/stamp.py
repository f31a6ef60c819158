"""Writing the layers that were left out into the graph, as copies of an exported layer with their own weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import fx

from ...ir.program import Program
from ...ir.rewriting.cleanup import order_readers
from ...ir.weights import Weight
from .kinds import Choice
from .match import OUTSIDE, Match, Segments, match, same_shape
from .record import CannotStamp
from .tensors import Tensors


def write_layers(program: Program, choice: Choice, tensors: Tensors) -> None:
    """Add the layers that were left out.

    Args:
        program: canonical, exported with those layers left out; changed in place.
        choice: which layers were exported.
        tensors: of the whole model.

    Raises:
        CannotStamp: two layers of a kind differ in the exported graph, or another layer's tensors do not fit. The
            program cannot be used then.
    """
    layer_of = tensors.of_layer(choice)
    segments = Segments(program, choice, layer_of)
    matches = {
        first: match(segments, first, second, tensors.renamed(choice, first, second))
        for first, second in choice.instances.items()
        if first in choice.templates.values()
    }
    _Stamping(program, choice, tensors, segments, matches, layer_of).run()


class _Stamping:
    def __init__(
        self,
        program: Program,
        choice: Choice,
        tensors: Tensors,
        segments: Segments,
        matches: Mapping[int, Match],
        layer_of: Mapping[str, int],
    ):
        self.program, self.graph = program, program.graph
        self.choice, self.tensors, self.segments, self.matches = choice, tensors, segments, matches
        self.layer_of = layer_of
        self.placeholders: dict[int, list[fx.Node]] = {}
        for node in program.weight_nodes:
            level = segments.level[node]
            self.placeholders.setdefault(level, []).append(node)
        self.ends = {first: found.leaves for first, found in matches.items()}
        for first, found in matches.items():
            self.ends[choice.instances[first]] = found.partners[found.leaves]
        # templates as they are now: redirecting a stream rewrites what the next template reads
        self.copied = {
            first: [
                (node, node.args, node.kwargs)
                for node in segments.calls(first)
                if segments.level[found.partners[node]] == choice.instances[first]
            ]
            for first, found in matches.items()
        }
        # where each node was called from: equal stacks are one object, which is renamed once for a layer
        self.stacks: dict[fx.Node, Any] = {}
        distinct: dict[Any, Any] = {}
        for node in (*program.weight_nodes, *(node for nodes in self.copied.values() for node, *_ in nodes)):
            stack = node.meta.get("nn_module_stack")
            if stack:
                self.stacks[node] = distinct.setdefault(tuple(stack.items()), stack)
        self.new: dict[int, list[fx.Node]] = {}
        self.copies: set[fx.Node] = set()
        self.moved: dict[fx.Node, fx.Node] = {}
        self.new_weights: dict[int, list[fx.Node]] = {}

    def run(self) -> None:
        last_exported: int | None = None
        stream: fx.Node | None = None
        for layer in self.choice.layers:
            number = layer.number
            if number in self.choice.templates:
                first = self.choice.templates[number]
                stream = self.copy(number, first, self.stream_before(number, stream))
            else:
                if stream is not None and last_exported is not None:
                    self.redirect(number, self.end(last_exported), stream)
                    stream = None
                last_exported = number
            if stream is not None and self.ends_list(number) and last_exported is not None:
                self.redirect_tail(last_exported, self.end(last_exported), stream)
                stream = None
        self.arrange()
        self.map_checkpoint()
        order_readers(self.program)
        self.program.changed()

    def ends_list(self, number: int) -> bool:
        following = self.choice.layers[number + 1 : number + 2]
        return not following or following[0].list_name != self.choice.layers[number].list_name

    def end(self, number: int) -> fx.Node:
        if number in self.ends:
            return self.ends[number]
        leaving = self.segments.leaving(number)
        if len(leaving) != 1:
            raise CannotStamp(f"{len(leaving)} values leave {self.choice.layers[number].name}")
        return leaving[0]

    def stream_before(self, number: int, stream: fx.Node | None) -> fx.Node:
        if stream is not None:
            return stream
        # the layer before was exported
        return self.end(number - 1)

    def copy(self, number: int, first: int, stream: fx.Node) -> fx.Node:
        """Copy the template's nodes for one layer and return its end."""
        found, renamed = self.matches[first], self.tensors.renamed(self.choice, first, number)
        assert found.stream is not None
        if not same_shape(found.stream[0], stream):
            name = self.choice.layers[number].name
            raise CannotStamp(f"{name} reads other sizes than {self.choice.layers[first].name}")
        values: dict[fx.Node, fx.Node] = {found.stream[0]: stream}
        names = self.choice.layers[first].name, self.choice.layers[number].name
        for node in self.placeholders.get(first, []):
            weight = self.program.weights[node.name]
            if weight.kind == "constant" and weight.name not in renamed:
                continue
            values[node] = self.copy_weight(node, weight, renamed, names, number)
        for node, partner in found.partners.items():
            if self.segments.level[partner] != self.choice.instances[first]:
                values[node] = partner
        new: list[fx.Node] = []
        stacks: dict[int, Any] = {}

        def mapped(operand: fx.Node) -> fx.Node:
            return values.get(operand) or self.moved.get(operand, operand)

        with self.graph.inserting_before(self.program.output_node):
            for node, args, kwargs in self.copied[first]:
                made = self.graph.call_function(
                    node.target,  # type: ignore[arg-type]
                    fx.map_arg(args, mapped),
                    fx.map_arg(kwargs, mapped) if kwargs else None,
                )
                made.meta = self.meta(node, names, renamed, stacks)
                values[node] = made
                new.append(made)
        self.new[number] = new
        self.copies.update(new)
        return values[found.leaves]

    def meta(
        self, node: fx.Node, names: tuple[str, str], renamed: Mapping[str, str], stacks: dict[int, Any]
    ) -> dict[str, Any]:
        """Return metadata of a copy: values are shared, names of the layer and its weights become those of the other.

        ``stacks`` are those that were renamed before for this layer: most nodes are called where another one was.
        """
        new = dict(node.meta)
        stack = self.stacks.get(node)
        if stack:
            if id(stack) not in stacks:
                one, two = names
                stacks[id(stack)] = {
                    _moved(key, one, two): (_moved(entry[0], one, two), *entry[1:])
                    for key, entry in stack.items()
                }
            new["nn_module_stack"] = stacks[id(stack)]
        custom = new.get("custom")
        if custom:
            new["custom"] = copy.deepcopy(custom)
            weight = new["custom"].get("graphopt", {}).get("weight")
            if weight is not None:
                new["custom"]["graphopt"]["weight"] = renamed.get(weight, weight)
        return new

    def copy_weight(
        self, node: fx.Node, weight: Weight, renamed: Mapping[str, str], names: tuple[str, str], number: int
    ) -> fx.Node:
        new_names = tuple(renamed.get(n, n) for n in weight.all_names)
        source = self.tensors.source(new_names[0])
        if tuple(source.shape) != tuple(weight.source.shape) or source.dtype != weight.source.dtype:
            raise CannotStamp(
                f"{new_names[0]} is {source.dtype} {list(source.shape)}, {weight.name} is "
                f"{weight.source.dtype} {list(weight.source.shape)}"
            )
        if type(source) is not type(weight.source):
            # a file that lacks one of them, for example; a full export says so, or does with it what has to be done
            raise CannotStamp(f"{new_names[0]} does not come from where {weight.name} does")
        one, two = (name.replace(".", "_") + "_" for name in names)
        mangled = node.name.replace(one, two, 1) if one in node.name else f"{node.name}_{number}"
        with self.graph.inserting_after(node):
            made = self.graph.placeholder(mangled)
        made.target = made.name
        made.meta = self.meta(node, names, renamed, {})
        self.program.weights[made.name] = replace(
            weight, name=new_names[0], names=new_names if weight.names else (), source=source
        )
        self.new_weights.setdefault(number, []).append(made)
        return made

    def redirect(self, number: int, old: fx.Node, new: fx.Node) -> None:
        """Let an exported layer that follows a copied one read the copy."""
        for node in self.segments.members.get(number, []):
            if old in node.all_input_nodes:
                node.replace_input_with(old, new)

    def redirect_tail(self, number: int, old: fx.Node, new: fx.Node) -> None:
        """Let everything behind a list's last layer read the copy instead of the last exported layer."""
        inside = self.inside(number)
        for user in list(old.users):
            if user not in inside and user not in self.copies:
                user.replace_input_with(old, new)
        self.moved[old] = new

    def inside(self, number: int) -> set[fx.Node]:
        """Return the calls that belong to an exported layer itself, not to what follows it."""
        for first, found in self.matches.items():
            if number == first:
                return set(found.partners)
            if number == self.choice.instances[first]:
                return set(found.partners.values())
        return set(self.segments.calls(number))

    # -- order --------------------------------------------------------------------------------------------

    def arrange(self) -> None:
        """Put the nodes in the order of layers, and weights in the order in which the model lists them."""
        weights = self.program.weights

        def listed(node: fx.Node) -> tuple[int, int]:
            if node.name not in weights:
                return (2, 0)
            places = [self.tensors.order[n] for n in weights[node.name].all_names if n in self.tensors.order]
            return min(places, default=(1, -1))

        placeholders = sorted(self.graph.find_nodes(op="placeholder"), key=listed)
        self.program.weights = {n.name: weights[n.name] for n in placeholders if n.name in weights}
        ordered = [*placeholders, *self.calls_by_layer()]
        first = next(iter(self.graph.nodes))
        if first is not ordered[0]:
            first.prepend(ordered[0])
        for before, node in pairwise(ordered):
            if before.next is not node:
                before.append(node)

    def calls_by_layer(self) -> list[fx.Node]:
        """Return all calls in an order in which they can run."""
        place: dict[fx.Node, float] = {}
        for number, nodes in self.new.items():
            place.update(dict.fromkeys(nodes, float(number)))
        calls = [n for n in self.graph.nodes if n.op == "call_function"]
        for node in calls:
            if node in self.copies:
                continue
            # what reads a copy, and is none, follows it
            operands = (
                place.get(n, OUTSIDE) + (0.5 if n in self.copies else 0) for n in node.all_input_nodes
            )
            place[node] = max(float(self.segments.level.get(node, OUTSIDE)), *operands, OUTSIDE)
        return sorted(calls, key=place.__getitem__)

    def map_checkpoint(self) -> None:
        """Enter the new weights in the mapping of the checkpoint, in the order of the weights."""
        if not self.program.checkpoint:
            return
        mapping = dict(self.program.checkpoint)
        plain, stored = self.tensors.mapped.plain, self.tensors.stored
        for nodes in self.new_weights.values():
            for node in nodes:
                for name in self.program.weights[node.name].all_names:
                    if name in plain:
                        mapping.setdefault(plain[name], node)
                    elif name in stored and name not in self.tensors.sources:
                        mapping.setdefault(name, node)
        place = {node: number for number, node in enumerate(self.graph.nodes)}
        self.program.checkpoint = {
            key: mapping[key] for key in sorted(mapping, key=lambda k: place[mapping[k]])
        }


def _moved(path: Any, one: str, two: str) -> Any:
    text = str(path)
    if text == one or text.startswith(f"{one}."):
        return two + text[len(one) :]
    return path
