"""Residual blocks within residual blocks: nested or disjoint, one entry and one exit, each value in one of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import nested_networks
import pytest
import torch
from amounts import examples
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from nested_networks import captured
from torch import nn

import graphopt
from graphopt.ir.anatomy import Block
from graphopt.ir.anatomy.dominance import dominates, immediate_dominators

WIDTH = nested_networks.WIDTH


def kinds(blocks: list[Block]) -> list[str]:
    return [block.kind for block in blocks]


def check_nesting(program: graphopt.Program, *, joint: bool = False) -> None:
    """Blocks are nested or disjoint, have one entry and one exit, and no value belongs to two."""
    anatomy = program.anatomy
    regions = [(block, block.region) for block in anatomy.blocks]
    for i, (first, one) in enumerate(regions):
        for second, other in regions[i + 1 :]:
            if first.add is second.add:
                continue  # terms of one sum may share a norm, or what one of them begins with
            assert not one & other or one <= other or other <= one, (first, second)
    owned = Counter(node for block in anatomy.blocks if not block.parallel for node in block.nodes)
    assert not [node for node, count in owned.items() if count > 1]
    contained = [id(inner) for block in anatomy.blocks for inner in block.inner]
    assert len(contained) == len(set(contained))
    for block, region in regions:
        if block.parallel or joint:
            continue
        inside = [n for n in program.graph.nodes if n is block.reads or n in region]
        forwards = immediate_dominators(inside, lambda n: n.all_input_nodes)
        backwards = immediate_dominators(inside[::-1], lambda n: list(n.users))
        assert all(dominates(forwards, block.reads, n) for n in inside)
        assert all(dominates(backwards, block.add, n) or n is block.writes for n in inside), block
    assert all(node in block.region for node, block in anatomy.owners().items())
    layered = Counter(id(block) for layer in anatomy.layers for block in layer.blocks)
    assert not layered or max(layered.values()) == 1


NESTED: dict[str, tuple[dict[str, int], list[list[str]]]] = {
    # what a network's blocks are, and the layers of it
    "unet": (
        {"mixer": 2, "attention": 8, "ffn": 4, "composite": 3},
        [
            ["mixer", "attention", "attention", "ffn", "composite"],
            ["mixer"],
            *[["attention", "attention", "ffn"]] * 2,
            ["attention", "attention", "ffn", "composite"],
        ],
    ),
    "dit": ({"attention": 3, "ffn": 3}, [["attention", "ffn"]] * 3),
    "flux": ({"attention": 6, "ffn": 4}, [["attention", "ffn"]] * 4 + [["attention"]] * 2),
    "hyper_connections": ({"attention": 2, "ffn": 2}, [["attention", "ffn"]] * 2),
    "laurel": ({"adapter": 3, "attention": 3, "ffn": 3}, [["adapter", "attention", "ffn"]] * 3),
    "layer_embeddings": ({"attention": 3, "ffn": 3, "adapter": 3}, [["attention", "ffn", "adapter"]] * 3),
    "alternating_updates": (
        {"connection": 3, "attention": 3, "ffn": 3, "composite": 3},
        [["connection", "attention", "ffn", "composite"]] * 3,
    ),
    "short_convolutions": ({"mixer": 3, "attention": 3, "ffn": 3}, [["mixer", "attention", "ffn"]] * 3),
    "stages": ({"attention": 4, "ffn": 4, "composite": 2}, [["attention", "ffn"]] * 4),
    "cross_stage": ({"mixer": 3}, [["mixer"]] * 3),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_streams(name: str) -> None:
    program = captured(name)
    blocks, layers = NESTED[name]
    assert program.anatomy.summary() == blocks
    assert [kinds(layer.blocks) for layer in program.anatomy.layers] == layers
    check_nesting(program, joint=name == "flux")


@pytest.mark.parametrize(
    "name", ["unet_additive", "hierarchical", "crossing", "transformer", "graph_convolutions"]
)
def test_blocks_never_overlap(name: str) -> None:
    program = captured(name)
    assert program.anatomy.blocks
    check_nesting(program)


def test_modules_that_take_turns_have_the_blocks_of_their_layers() -> None:
    summary = captured("hierarchical").anatomy.summary()
    assert (summary["attention"], summary["ffn"]) == (12, 12)


def test_a_composite_block_contains_its_stream() -> None:
    anatomy = captured("unet").anatomy
    outer = anatomy.block("composite.1")
    assert kinds(outer.inner) == ["attention", "attention", "ffn"] * 2
    assert all(anatomy.outer(inner) is outer for inner in outer.inner)
    own = {n.target for n in outer.nodes}
    assert torch.ops.aten.conv2d.default in own
    assert torch.ops.graphopt.attention.default not in own


def test_values_shared_by_two_blocks_are_the_first_ones() -> None:
    """Image and text of one attention: both are attention, and the attention belongs to one of them."""
    anatomy = captured("flux").anatomy
    first, second = anatomy.attention[:2]
    assert first.core is second.core
    assert first.core in first.nodes
    assert first.core not in second.nodes
    assert anatomy.owners()[first.core] is first


def without_layer(model: nn.Module, attribute: str, index: int, inputs: Any) -> torch.Tensor:
    layers = getattr(model, attribute)
    setattr(model, attribute, nn.ModuleList(b for i, b in enumerate(layers) if i != index))
    try:
        with torch.no_grad():
            found: torch.Tensor = model(*inputs)
    finally:
        setattr(model, attribute, layers)
    return found


@pytest.mark.parametrize(
    ("name", "layer", "index"),
    [("laurel", 1, 1), ("alternating_updates", 1, 1), ("short_convolutions", 2, 2), ("stages", None, 1)],
)
def test_a_layer_with_blocks_in_it_can_be_removed(name: str, layer: int | None, index: int) -> None:
    model, inputs = nested_networks.network(name)
    program = graphopt.capture(model, inputs)
    if layer is None:  # a composite block around several layers
        program.remove(program.anatomy.block(f"composite.{index}"))
    else:
        program.remove(program.anatomy.layers[layer])
    attribute = "stages" if name == "stages" else "blocks"
    expected = without_layer(model, attribute, index, inputs)
    assert torch.allclose(program(*inputs), expected, atol=1e-5)


def test_a_block_at_a_sum_with_other_terms_goes_without_them() -> None:
    class Injected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.ffn = nn.Linear(8, WIDTH), nested_networks.FeedForward()

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return torch.relu(h + other + self.ffn(h))

    torch.manual_seed(0)
    model, inputs = Injected().eval(), (torch.randn(3, 7, 8), torch.randn(3, 7, WIDTH))
    program = graphopt.capture(model, inputs)
    (block,) = program.anatomy.ffn
    program.remove(block)
    with torch.no_grad():
        expected = torch.relu(model.first(inputs[0]) + inputs[1])
    assert torch.allclose(program(*inputs), expected, atol=1e-6)


# -- drawn networks ------------------------------------------------------------------------------------

Tree = Any  # "ffn", "attention", or a list of trees: a residual block around a stream
TREES = st.recursive(
    st.sampled_from(["ffn", "attention"]), lambda inner: st.lists(inner, min_size=2, max_size=3), max_leaves=7
)


class Drawn(nn.Module):
    """x + f(x), where f is a feed-forward, attention, or a linear, a stream of blocks, and a linear."""

    def __init__(self, tree: Tree):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        if isinstance(tree, list):
            self.branch: nn.Module = nn.Sequential(
                nn.Linear(WIDTH, WIDTH), *map(Drawn, tree), nn.Linear(WIDTH, WIDTH)
            )
        else:
            self.branch = nested_networks.FeedForward() if tree == "ffn" else nested_networks.Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(self.norm(x))


def shape(block: Block) -> Tree:
    """Return the tree of a block."""
    return [shape(inner) for inner in block.inner] if block.kind == "composite" else block.kind


@settings(max_examples=examples(18))
@given(st.lists(TREES, min_size=1, max_size=3))
def test_the_nesting_of_drawn_networks_is_found(trees: list[Tree]) -> None:
    model = nn.Sequential(nn.Linear(8, WIDTH), *map(Drawn, trees), nn.Linear(WIDTH, 8)).eval()
    program = graphopt.capture(model, (torch.randn(3, 5, 8),), dynamic=None, compare=False)
    anatomy = program.anatomy
    contained = {id(inner) for block in anatomy.blocks for inner in block.inner}
    assert [shape(b) for b in anatomy.blocks if id(b) not in contained] == trees
    check_nesting(program)
    leaves = sum(1 for b in anatomy.blocks if b.kind != "composite")
    assert sum(1 for layer in anatomy.layers for b in layer.blocks if b.kind != "composite") == leaves


class Tangled(nn.Module):
    """Sums of any earlier values, and linears of them."""

    def __init__(self, steps: list[tuple[str, int, int]]):
        super().__init__()
        self.steps = steps
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for (kind, first, second), linear in zip(self.steps, self.linears, strict=True):
            one, other = values[first % len(values)], values[second % len(values)]
            values.append(one + other if kind == "add" else linear(torch.tanh(one)))
        return torch.cat(values, -1)


# failures are drawn small enough, and making an example smaller takes a capture each time
@settings(max_examples=examples(24), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "linear", "linear"]), st.integers(0, 11), st.integers(0, 11)),
        min_size=4,
        max_size=9,
    )
)
def test_blocks_of_any_network_are_nested_or_disjoint(steps: list[tuple[str, int, int]]) -> None:
    program = graphopt.capture(Tangled(steps).eval(), (torch.randn(3, WIDTH),), dynamic=None, compare=False)
    check_nesting(program, joint=True)
