"""Classification of contributions to the stream: attention, feed-forward, experts, other mixers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..operators.traits import Trait, has, named
from ..schema import is_operator, operator_name
from .blocks import Block
from .nesting import Nesting
from .parts import attention_parts, experts_parts, ffn_parts, is_conditioned, is_linear, nested_parts
from .residual import Addition, between, mixes_copies

if TYPE_CHECKING:
    from ..program import Program

_PRODUCTS = named(Trait.PRODUCT)
_CONVOLUTIONS = named(Trait.CONVOLUTION | Trait.TRANSPOSED)
# between the softmax of scores and their product with values
_MASKING = ("aten.mul", "aten.where", "aten.masked_fill", "aten.dropout")
# sums and products along positions
_SCANS = named(Trait.SCAN) | {"higher_order.scan", "graphopt.causal_conv1d", "graphopt.linear_attention"}


# kinds of blocks that are parts of the block around them rather than blocks that it contains
_LIGHT = ("mixer", "adapter", "connection", "unrecognised")


def classify(program: Program, addition: Addition, nesting: Nesting, inner: list[Block]) -> list[Block]:
    """Return a block per term of an addition on the stream.

    Args:
        program: a canonical graph.
        addition: of the nesting.
        nesting: of all additions.
        inner: the blocks of the additions directly within it.
    """
    blocks: list[Block] = []
    writes, norms_after = _writes(addition)
    # a term that another is computed from, as in a + f(a), is not a separate block
    outer = [
        t for t in addition.terms if not any(t in addition.inside[o] for o in addition.terms if o is not t)
    ]
    for term in outer:
        nodes = addition.inside[term]
        block = Block("unrecognised", addition.base, writes, term, addition.node, nodes)
        region = set(nodes)
        block.inner = [b for b in inner if (b.term if b.add is addition.node else b.add) in region]
        inner = [b for b in inner if b not in block.inner]
        block.parallel, block.carry = len(outer) > 1, addition.carry
        block.shared_terms = [t for t in addition.terms if t not in outer and t in nodes]
        block.norms = _norms(block, norms_after)
        containing = [b for b in block.inner if b.kind not in _LIGHT]
        apart = {n for b in containing for n in b.region}
        block.nodes = [n for n in nodes if n not in apart]
        _name(program, block, containing)
        blocks.append(block)
    blocks = _with_shared_experts(_one_choice(blocks))
    for block in blocks:
        within = {n for b in block.inner for n in b.region}
        block.nodes = [n for n in block.nodes if n not in within and nesting.owner.get(n) is addition]
    return blocks


def mixtures_beside(program: Program, blocks: list[Block]) -> list[Block]:
    """Return a block for each MoE layer that no block contains: the nodes from its tokens to its result."""
    named = {block.parts.get("core") for block in blocks}
    cores = [n for n in program.nodes if is_operator(n, "graphopt.routed_ffn") and n not in named]
    order = {node: i for i, node in enumerate(program.graph.nodes)} if cores else {}
    blocks_beside = []
    for core in cores:
        reads = core.args[0]
        while is_operator(reads, "aten.reshape"):
            reads = reads.args[0]  # type: ignore[union-attr]
        assert isinstance(reads, fx.Node)
        block = Block("experts", reads, core, core, core, between(reads, core, order))
        block.evidence.append("not on a recognised residual stream")
        experts_parts(program, block)
        blocks_beside.append(block)
    return blocks_beside


def _one_choice(blocks: list[Block]) -> list[Block]:
    """Return the blocks with feed-forwards that share a router merged into one block."""
    first: dict[fx.Node, Block] = {}
    remaining: list[Block] = []
    for block in blocks:
        choice = block.parts.get("choice")
        if choice is None or choice not in first:
            if choice is not None:
                first[choice] = block
            remaining.append(block)
            continue
        joined = first[choice]
        inside = set(joined.nodes)
        joined.nodes.extend(n for n in block.nodes if n not in inside)
        joined.inner.extend(block.inner)
        joined.shared_terms.append(block.term)
        joined.parts["other_core"] = block.parts["core"]
        if int(block.sizes["width"]) > int(joined.sizes["width"]):
            joined.parts["core"], joined.parts["other_core"] = block.parts["core"], joined.parts["core"]
            joined.sizes["width"] = block.sizes["width"]
        joined.evidence.append(f"the same router chooses a feed-forward of width {block.sizes['width']}")
    for block in remaining:
        block.parallel = len(remaining) > 1
    return remaining


def _with_shared_experts(blocks: list[Block]) -> list[Block]:
    """Return the blocks with a feed-forward in the same sum as an MoE layer merged into it as its shared expert."""
    moe_layers = [b for b in blocks if b.kind == "experts"]
    shared = [b for b in blocks if b.kind == "ffn"]
    if len(moe_layers) != 1 or not shared:
        return blocks
    moe_layer = moe_layers[0]
    for block in shared:
        inside = set(moe_layer.nodes)
        moe_layer.nodes.extend(n for n in block.nodes if n not in inside)
        moe_layer.inner.extend(block.inner)
        moe_layer.shared_terms.append(block.term)
        moe_layer.parts.update(
            {f"shared_{name}": node for name, node in block.parts.items() if name != "norm"}
        )
    moe_layer.sizes["shared_expert"] = True
    moe_layer.evidence.append("the same sum has a feed-forward that every token uses: a shared expert")
    remaining = [b for b in blocks if b not in shared]
    moe_layer.parallel = len(remaining) > 1
    return remaining


def _name(program: Program, block: Block, containing: list[Block]) -> None:
    operators = {operator_name(n.target) for n in block.nodes}
    if "graphopt.attention" in operators:
        block.kind = "attention"
        attention_parts(program, block)
    elif "aten.softmax" in operators and _softmax_attention(block):
        block.kind = "attention"
        block.evidence.append("a softmax between two products of values that both change with the input")
    elif "graphopt.routed_ffn" in operators:
        block.kind = "experts"
        experts_parts(program, block)
    elif "aten.topk" in operators and operators & {"aten.bmm", "aten.matmul", "aten.index", "aten.index_add"}:
        block.kind = "experts"
        block.evidence.append("the top-k of a router's scores select weights of a product")
    elif "graphopt.nested_ffn" in operators:
        block.kind = "ffn"
        nested_parts(block)
    elif containing:
        block.kind = "composite"
        block.evidence.append("a residual block around " + ", ".join(sorted({b.kind for b in containing})))
    elif _mixes_positions(block, operators):
        block.kind = "mixer"
        block.evidence.append("positions are mixed by a convolution or a scan, without attention")
    elif ffn_parts(program, block):
        block.kind = "adapter" if is_linear(block) or is_conditioned(block) else "ffn"
    elif mixes_copies(block.reads, block.term, set(block.nodes)):
        block.kind = "connection"
        block.evidence.append("copies of the stream are mixed by a matrix computed from them")
    elif operators & {"aten.linear"} | (operators & _PRODUCTS):
        block.kind = "mixer" if operators & _PRODUCTS else "unrecognised"
        block.evidence.append(
            f"products without attention or a feed-forward shape: {', '.join(sorted(operators))}"
        )
    else:
        block.evidence.append(f"operators: {', '.join(sorted(operators))}")


def _softmax_attention(block: Block) -> bool:
    inside = set(block.nodes)
    for node in block.nodes:
        if is_operator(node, "aten.softmax"):
            work, seen = list(node.users), set()
            while work:
                user = work.pop()
                if user in seen or user not in inside:
                    continue
                seen.add(user)
                if has(user, Trait.PRODUCT):
                    return True
                if has(user, Trait.MOVEMENT | Trait.CAST) or is_operator(user, *_MASKING):
                    work.extend(user.users)
    return False


def _mixes_positions(block: Block, operators: set[str]) -> bool:
    return bool(operators & (_SCANS | _CONVOLUTIONS))


def _writes(addition: Addition) -> tuple[fx.Node, bool]:
    """Return the stream's value after the addition, and whether that is the result of a post-norm."""
    node = addition.node
    users = list(node.users)
    if len(users) == 1 and is_operator(users[0], "aten.to") and len(users[0].users) == 1:
        users = list(users[0].users)
    if len(users) != 1 or not has(users[0], Trait.NORM):
        return node, False
    # before a final norm the branches begin with their own norms; on a post-norm stream they do not
    for term in addition.terms:
        first = [n for n in addition.inside[term] if addition.base in n.all_input_nodes]
        if any(has(n, Trait.NORM) for n in first) or _ends_in_norm(term):
            return node, False
    return users[0], True


def _ends_in_norm(term: fx.Node) -> bool:
    node = term
    for _ in range(3):
        if has(node, Trait.NORM):
            return True
        if not has(node, Trait.RESHAPE | Trait.CAST) and not is_operator(node, "aten.mul"):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return False


def _norms(block: Block, after: bool) -> str:
    first = [n for n in block.nodes if block.reads in n.all_input_nodes and has(n, Trait.NORM)]
    if first:
        block.parts["norm"] = first[0]
    closing = _ends_in_norm(block.term)
    if closing:
        node = block.term
        while not has(node, Trait.NORM):
            node = node.args[0]  # type: ignore[assignment]
        if node in first:
            closing = False
        else:
            block.parts["post_norm"] = node
    if after:
        block.parts["post_norm"] = block.writes
        return "post"
    if first and closing:
        return "sandwich"
    if first:
        return "pre"
    return "branch" if closing else "none"
