"""Components of composite models: encoders and decoders, vision, audio and text, and projectors between them.

Everything is read from dataflow: which inputs the streams begin with, which streams attend to others, and where values
computed from one of them alone meet the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..operators.traits import Trait, has, named
from ..schema import argument, is_operator
from .blocks import Anatomy, Block, Component, Stream
from .dominance import immediate_dominators

if TYPE_CHECKING:
    from ..program import Program

_INDEXING = named(Trait.VIEW | Trait.CAST | Trait.IDENTITY | Trait.PART) | {
    "aten.clamp",
    "aten.where",
    "aten.masked_fill",
}


@dataclass(eq=False)
class _Tower:
    """Streams that follow one another, as bits of masks, and what is known of them."""

    streams: list[Stream]
    bits: int
    start: int
    kind: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        return [block for stream in self.streams for block in stream.blocks]


def find_components(program: Program, anatomy: Anatomy, streams: list[Stream]) -> dict[str, Component]:
    """Return the components of a program by name; none if it is a single stream, or streams that need one another.

    Args:
        program: a canonical graph.
        anatomy: of it, with blocks and layers.
        streams: those that lie within no block.
    """
    if len(streams) < 2:
        return {}
    return _Components(program, anatomy, streams).find()


class _Components:
    def __init__(self, program: Program, anatomy: Anatomy, streams: list[Stream]):
        self.program, self.anatomy, self.streams = program, anatomy, streams
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.inputs = list(_content_inputs(program))
        self.content = self._reached((node, 1 << i) for i, node in enumerate(self.inputs))
        ends = ((b.add, 1 << i) for i, s in enumerate(streams) for b in s.blocks)
        self.reach = self._reached(ends)
        # a stream that begins with weights is told from the others by its beginning alone
        self.begun = self._reached((stream.start, 1 << i) for i, stream in enumerate(streams))

    def _reached(self, marks: Iterable[tuple[fx.Node, int]]) -> dict[fx.Node, int]:
        """Return for each value the marks of the values that it is computed from, itself among them."""
        reached: dict[fx.Node, int] = {}
        for node, mark in marks:
            reached[node] = reached.get(node, 0) | mark
        for node in self.nodes:
            mark = reached.get(node, 0)
            for source in node.all_input_nodes:
                mark |= reached[source]
            reached[node] = mark
        return reached

    # -- towers -------------------------------------------------------------------------------------------

    def find(self) -> dict[str, Component]:
        towers = self._towers()
        if len(towers) < 2:
            return {}
        self._name(towers)
        components: dict[str, Component] = {}
        finals = [t for t in towers if not any(self._feeds(t, other) for other in towers if other is not t)]
        given: dict[_Tower, dict[str, fx.Node]] = {}
        for tower in towers:
            reads = {
                name: node
                for other in given
                if self._feeds(other, tower)
                for name, node in given[other].items()
            }
            if tower in finals and len(finals) == 1:
                outputs = {n: v for n, v in self.program.outputs.items() if self.reach[v] & tower.bits}
                components[tower.names[0]] = self._component(tower, reads, outputs)
            else:
                for component in self._cut(tower, reads, last=tower in finals):
                    components[component.name] = component
                    given[tower] = component.writes if component.name == "projector" else {
                        **given.get(tower, {}), **component.writes
                    }  # fmt: skip
        return components

    def _towers(self) -> list[_Tower]:
        towers: list[_Tower] = []
        for i, stream in enumerate(self.streams):
            start = self.content[stream.start]
            before = [t for t in towers if t.bits & self.reach[stream.start]]
            same = [t for t in before if not start & ~self.content[_end(t)]]
            alike = [t for t in towers if start and t.start == start and not self._attends(stream, t)]
            found = (same or ([] if before else alike))[-1:]
            if found:
                found[0].streams.append(stream)
                found[0].bits |= 1 << i
            else:
                towers.append(_Tower([stream], 1 << i, start))
        return self._without_cycles(towers)

    def _without_cycles(self, towers: list[_Tower]) -> list[_Tower]:
        """Return the towers with those that need one another joined, in an order in which each follows what feeds it."""
        joined = True
        while joined:
            joined = False
            for i, first in enumerate(towers):
                for second in towers[i + 1 :]:
                    if self._feeds(first, second) and self._feeds(second, first):
                        first.streams += second.streams
                        first.bits |= second.bits
                        towers.remove(second)
                        joined = True
                        break
        return sorted(
            towers, key=lambda t: (sum(self._feeds(o, t) for o in towers if o is not t), self.order[_end(t)])
        )

    def _feeds(self, first: _Tower, second: _Tower) -> bool:
        return any(self.reach[block.add] & first.bits for block in second.blocks)

    def _attends(self, stream: Stream, tower: _Tower) -> bool:
        return any(self.reach[k] & tower.bits for b in stream.blocks if (k := _keys(b)) is not None)

    # -- names --------------------------------------------------------------------------------------------

    def _name(self, towers: list[_Tower]) -> None:
        for tower in towers:
            tower.kind = self._kind(tower)
        last = towers[-1]
        for tower in towers[:-1]:
            if tower.kind == "queries":
                tower.names.append("projector")
            if self._attends_throughout(last, tower) and tower.kind != "queries":
                tower.names.append("encoder")
                if "decoder" not in last.names:
                    last.names.append("decoder")
        for tower in towers:
            if tower.kind != "queries":
                tower.names.append(tower.kind)
        if not last.names:
            last.names.append("decoder")
        taken: set[str] = set()
        for tower in towers:
            number, name = 2, tower.names[0]
            while tower.names[0] in taken:
                tower.names[0] = f"{name}_{number}"
                number += 1
            taken.add(tower.names[0])

    def _attends_throughout(self, tower: _Tower, other: _Tower) -> bool:
        """Tell whether every layer with attention has attention to another tower."""
        blocks = {id(block) for block in tower.blocks}
        layers = [[b for b in layer.blocks if b.kind == "attention"] for layer in self.anatomy.layers
                  if any(id(b) in blocks for b in layer.blocks)]  # fmt: skip
        layers = [layer for layer in layers if layer]
        return bool(layers) and all(
            any(b.sizes.get("cross") and self._keys_from(b, other) for b in layer) for layer in layers
        )

    def _keys_from(self, block: Block, tower: _Tower) -> bool:
        keys = _keys(block)
        return keys is not None and bool(self.reach[keys] & tower.bits)

    def _kind(self, tower: _Tower) -> str:
        read = [node for i, node in enumerate(self.inputs) if tower.start >> i & 1]
        if not read:
            return "queries"
        kinds = {_input_kind(node) for node in read}
        return next(kind for kind in ("text", "vision", "audio", "features") if kind in kinds)

    # -- boundaries ---------------------------------------------------------------------------------------

    def _component(
        self, tower: _Tower, reads: dict[str, fx.Node], writes: dict[str, fx.Node], name: str = ""
    ) -> Component:
        names = [name] if name else tower.names
        blocks = [] if name else tower.blocks
        return Component(names[0], tuple(names[1:]), reads, writes, blocks)

    def _cut(self, tower: _Tower, reads: dict[str, fx.Node], *, last: bool) -> list[Component]:
        """Return a tower up to where it meets others, and the projector before that, if there is one."""
        end, name = _end(tower), tower.names[0]
        feeding = tower.bits
        for other, mark in ((s, 1 << i) for i, s in enumerate(self.streams)):
            if any(self.reach[block.add] & mark for block in tower.blocks) or other in tower.streams:
                feeding |= mark
        follows_end = self._reached([(end, 1)])
        alone: set[fx.Node] = set()
        for node in self.nodes:
            if not self.reach[node] & tower.bits or node.op != "call_function":
                continue
            marks = self.reach[node] | self.begun[node]
            if not marks & ~feeding and not self.content[node] & ~self.content[end]:
                alone.add(node)
        frontier = [n for n in self.nodes if n in alone and any(u not in alone for u in n.users)]
        after = [n for n in self.nodes if n in alone and follows_end[n] and n.users]
        sink = self.program.output_node
        leaving = set(frontier)
        follows = set(after)
        dominators = immediate_dominators(
            [sink, *reversed(after)],
            lambda n: [*(u for u in n.users if u in follows), *([sink] if n in leaving else [])],
        )
        chain = [end]
        while (following := dominators[chain[-1]]) is not None and following is not sink:
            chain.append(following)
        meets = chain[-1]
        descends = self._reached([(meets, 1)])
        others = [
            n
            for n in frontier
            if n is not meets and not descends[n] and isinstance(n.meta["val"], torch.Tensor)
        ]
        extra = {f"{name}_{i}": n for i, n in enumerate(others, 2)}
        projecting = next((i for i, n in enumerate(chain) if i and has(n, Trait.MIXING)), None)
        if projecting is None or last or "projector" in tower.names:
            return [self._component(tower, reads, {name: meets, **extra})]
        return [
            self._component(tower, reads, {name: chain[projecting - 1], **extra}),
            self._component(tower, {name: chain[projecting - 1]}, {"projector": meets}, "projector"),
        ]


def _end(tower: _Tower) -> fx.Node:
    return tower.streams[-1].blocks[-1].writes


def _keys(block: Block) -> fx.Node | None:
    core = block.parts.get("core")
    if block.kind != "attention" or core is None:
        return None
    keys = argument(core, "k")
    return keys if isinstance(keys, fx.Node) else None


def _content_inputs(program: Program) -> list[fx.Node]:
    """Return the inputs that are looked up in tables, or are numbers of more than one dimension."""
    return [
        node
        for node in program.input_nodes.values()
        if isinstance(node.meta["val"], torch.Tensor)
        and (node.meta["val"].dim() >= 2 if node.meta["val"].is_floating_point() else _is_looked_up(node))
    ]


def _is_looked_up(node: fx.Node) -> bool:
    work, seen = [node], set()
    while work:
        current = work.pop()
        for user in current.users:
            if is_operator(user, "aten.embedding") and user.args[1] is current:
                return True
            if user not in seen and is_operator(user, *_INDEXING):
                seen.add(user)
                work.append(user)
    return False


def _input_kind(node: fx.Node) -> str:
    """Return text for tokens, vision for images and patches of them, audio for waves and spectra, features otherwise."""
    value = node.meta["val"]
    if not value.is_floating_point():
        return "text"
    first = _first_mixing(node)
    if first is None:
        return "vision" if value.dim() >= 4 else "features"
    weight: Any = first.args[1]
    shape: list[Any] = list(weight.meta["val"].shape) if isinstance(weight, fx.Node) else []
    if not shape or not (has(first, Trait.CONVOLUTION) or is_operator(first, "aten.linear")):
        return "features"
    if is_operator(first, "aten.linear"):
        # a patch has three channels and as many rows as columns, of one frame or of two
        squares = [int(shape[1]) // (3 * frames) for frames in (1, 2) if int(shape[1]) % (3 * frames) == 0]
        return "vision" if any(isqrt(s) ** 2 == s for s in squares) else "features"
    if is_operator(first, "aten.conv1d"):
        return "audio"
    return "audio" if len(shape) == 4 and shape[1] == 1 else "vision"


def _first_mixing(node: fx.Node) -> fx.Node | None:
    work, seen = [node], {node}
    while work:
        current = work.pop(0)
        for user in current.users:
            if has(user, Trait.MIXING):
                return user
            if user not in seen and user.op == "call_function":
                seen.add(user)
                work.append(user)
    return None
