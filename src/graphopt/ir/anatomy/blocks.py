"""Blocks on the residual stream, their parts, layers, and the evidence for each classification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(eq=False)
class Block:
    """One contribution to a residual stream.

    Attributes:
        kind: attention, ffn, experts, mixer (of positions, without attention), adapter (two projections and no
            activation, or values from elsewhere as factors between them), connection (of copies of the stream, mixed by
            a matrix), composite (a residual block around others) or unrecognised.
        reads: the stream's value before the block.
        writes: its value after, post-norm included.
        term: what the block adds.
        add: the addition.
        nodes: the operators of the block, in order; what does not descend from the stream (masks, rotary
            tables) is not among them, nor is what belongs to the blocks within it.
        parts: named operators, such as q, k, v, o, core, gate, up, down, router, norm.
        sizes: heads, kv_heads, head_size, width, experts, ... where they apply.
        norms: pre, post, sandwich, branch (on the contribution only) or none.
        evidence: reasons for its kind.
        parallel: another block reads and writes at the same addition.
        shared_terms: the contribution of a shared expert of an MoE layer.
        carry: the stream at the addition where it is scaled on the way, or its copies are mixed, as between
            hyper-connections; None where what the block reads is added as it is.
        inner: the blocks directly within it, on streams that begin and end in it.
    """

    kind: str
    reads: fx.Node
    writes: fx.Node
    term: fx.Node
    add: fx.Node
    nodes: list[fx.Node]
    parts: dict[str, fx.Node] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    norms: str = "none"
    evidence: list[str] = field(default_factory=list)
    parallel: bool = False
    shared_terms: list[fx.Node] = field(default_factory=list)
    carry: fx.Node | None = None
    inner: list[Block] = field(default_factory=list)
    index: int = 0
    layer: int = 0

    @property
    def name(self) -> str:
        """Kind and index in execution order: ``attention.3``."""
        return f"{self.kind}.{self.index}"

    @property
    def terms(self) -> list[fx.Node]:
        """The terms that the block adds to the stream."""
        return [self.term, *self.shared_terms]

    @property
    def region(self) -> set[fx.Node]:
        """Everything that belongs to the block: its operators, its addition and post-norm, and the blocks within it."""
        return {*self.nodes, self.add, self.writes}.union(*(block.region for block in self.inner))

    def __getattr__(self, part: str) -> fx.Node:
        parts = self.__dict__.get("parts", {})
        if part in parts:
            node = parts[part]
            assert isinstance(node, fx.Node)
            return node
        raise AttributeError(
            f"{self.__dict__.get('kind', 'block')} has no part {part!r}; it has {', '.join(parts)}"
        )

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self.nodes)} operators, {self.norms} norm, {', '.join(self.parts)}>"


@dataclass(eq=False)
class Layer:
    """A repeating group of blocks, from the stream's value before the first to that after the last.

    ``blocks`` are in execution order, with those within others before them.
    """

    blocks: list[Block]
    index: int = 0

    @property
    def outermost(self) -> list[Block]:
        """The blocks that lie within no other block of the layer."""
        within = {id(inner) for block in self.blocks for inner in block.inner}
        return [block for block in self.blocks if id(block) not in within]

    @property
    def reads(self) -> fx.Node:
        """The stream's value before the layer."""
        return self.outermost[0].reads

    @property
    def writes(self) -> fx.Node:
        """The stream's value after the layer."""
        return self.outermost[-1].writes

    @property
    def name(self) -> str:
        """``layer.3``."""
        return f"layer.{self.index}"

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(b.name for b in self.blocks)}>"


@dataclass(eq=False)
class Stream:
    """A residual stream: its first value and the blocks that add to it, without those within them."""

    start: fx.Node
    blocks: list[Block]

    @property
    def size(self) -> Any:
        """Number of channels."""
        return self.start.meta["val"].shape[-1]


@dataclass(eq=False)
class Branches:
    """Parallel chains of linear operators from one value to a sum: training-time branches."""

    reads: fx.Node
    writes: fx.Node
    paths: list[list[fx.Node]]
    evidence: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Component:
    """A part of a composite model that can be a program of its own.

    Attributes:
        name: encoder, decoder, vision, audio, text, features (numbers of another kind), or projector: what lies between
            vision or audio and text.
        other_names: further names, such as text for a decoder.
        reads: values of other components by the names of those, for each that it takes besides the program's inputs.
        writes: the values that others, or the program's outputs, are computed from; the first has the component's name.
        blocks: its blocks, without those within them.
    """

    name: str
    other_names: tuple[str, ...]
    reads: dict[str, fx.Node]
    writes: dict[str, fx.Node]
    blocks: list[Block]


@dataclass
class Anatomy:
    """The structure of a model, in execution order.

    ``blocks`` are all blocks, those within others before them; ``streams`` those outside of all blocks first.
    ``beside`` are MoE layers that are not on a recognised residual stream: passes that work inside an MoE layer
    handle them, passes that move blocks do not. ``components`` are the parts of a composite model by name, each
    after those that it reads; a model of a single part has none.
    """

    blocks: list[Block] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    branches: list[Branches] = field(default_factory=list)
    embedding: list[fx.Node] = field(default_factory=list)
    head: list[fx.Node] = field(default_factory=list)
    beside: list[Block] = field(default_factory=list)
    components: dict[str, Component] = field(default_factory=dict)

    def of(self, kind: str) -> list[Block]:
        """Return the blocks of one kind."""
        return [block for block in self.blocks if block.kind == kind]

    @property
    def residual(self) -> list[Stream]:
        """The residual streams."""
        return self.streams

    @property
    def attention(self) -> list[Block]:
        """Attention blocks."""
        return self.of("attention")

    @property
    def ffn(self) -> list[Block]:
        """Feed-forward blocks."""
        return self.of("ffn")

    @property
    def experts(self) -> list[Block]:
        """MoE layers."""
        return [*self.of("experts"), *self.beside]

    def block(self, name: str) -> Block:
        """Return the block of this name.

        Raises:
            KeyError: there is none.
        """
        for block in (*self.blocks, *self.beside):
            if block.name == name:
                return block
        raise KeyError(name)

    def component(self, name: str) -> Component:
        """Return the component of this name, or of this further name if only one has it.

        Raises:
            KeyError: there is none, or there are several.
        """
        if name in self.components:
            return self.components[name]
        found = [component for component in self.components.values() if name in component.other_names]
        if len(found) != 1:
            raise KeyError(name)
        return found[0]

    def outer(self, block: Block) -> Block | None:
        """Return the block that a block lies directly within."""
        return next((other for other in self.blocks if any(b is block for b in other.inner)), None)

    def owners(self) -> dict[fx.Node, Block]:
        """Return the innermost block of each value that belongs to one.

        What blocks at one addition share, such as a norm, is the first one's.
        """
        owners: dict[fx.Node, Block] = {}
        for block in self.blocks:
            for node in (*block.nodes, block.add, block.writes):
                owners.setdefault(node, block)
        return owners

    def summary(self) -> dict[str, int]:
        """Return the number of blocks of each kind."""
        counts: dict[str, int] = {}
        for block in (*self.blocks, *self.beside):
            counts[block.kind] = counts.get(block.kind, 0) + 1
        return counts
