"""Named parts of blocks: the projections of attention, feed-forwards and MoE layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from ..operators.traits import Trait, has, named
from ..running.fold import depends_on_weights_alone
from ..schema import argument, arguments, is_operator
from .blocks import Block, Stream
from .residual import between

if TYPE_CHECKING:
    from ..program import Program

_MOVEMENT = Trait.MOVEMENT | Trait.CAST
_PASSING = named(_MOVEMENT | Trait.NORM) | {
    "graphopt.rotary", "aten.mul", "aten.div", "aten.add", "aten.clamp", "aten.sigmoid"
}  # fmt: skip
_PROJECTIONS = named(Trait.CONVOLUTION) | {"aten.linear"}


_KEYS_FROM_ELSEWHERE = "keys from another stream"


def source_projection(node: Any, limit: int = 40) -> fx.Node | None:
    """Return the linear that a value comes from through reshapes, norms and rotations; None if there is none."""
    for _ in range(limit):
        if is_operator(node, *_PROJECTIONS):
            assert isinstance(node, fx.Node)
            return node
        if not is_operator(node, *_PASSING):
            return None
        first = node.args[0]
        if isinstance(first, (list, tuple)):
            first = first[-1]
        node = first
    return None


def target_projection(node: fx.Node, inside: set[fx.Node], limit: int = 40) -> fx.Node | None:
    """Return the linear that reads a value through reshapes and gates; None if there is none."""
    seen: set[fx.Node] = set()
    work = [node]
    while work and len(seen) < limit:
        current = work.pop(0)
        for user in current.users:
            if user not in inside or user in seen:
                continue
            seen.add(user)
            if is_operator(user, *_PROJECTIONS):
                return user
            if is_operator(user, *_PASSING):
                work.append(user)
    return None


def attention_parts(program: Program, block: Block) -> None:
    """Name q, k, v, o and the core of an attention block, with heads and sizes."""
    core = next(n for n in block.nodes if is_operator(n, "graphopt.attention"))
    args = arguments(core)
    block.parts["core"] = core
    for name in ("q", "k", "v"):
        projection = source_projection(args[name])
        if projection is not None:
            block.parts[name] = projection
    out = target_projection(core, set(block.nodes))
    if out is not None:
        block.parts["o"] = out
    q, k, v = (args[name].meta["val"] for name in ("q", "k", "v"))
    block.sizes.update(heads=q.shape[1], kv_heads=k.shape[1], head_size=q.shape[-1], value_size=v.shape[-1])
    cross = "k" in block.parts and block.parts["k"] not in block.nodes
    fused = len({block.parts.get(n) for n in ("q", "k", "v")}) == 1
    block.evidence.append(
        f"graphopt.attention with {q.shape[1]} heads over {k.shape[1]} key-value heads of size {q.shape[-1]}"
        + (f", {_KEYS_FROM_ELSEWHERE}" if cross else "")
        + (", one projection for queries, keys and values" if fused and "q" in block.parts else "")
    )
    if cross:
        block.sizes["cross"] = True
    if argument(core, "window") is not None:
        block.sizes["window"] = argument(core, "window")


def tell_shared_keys(program: Program, stream: Stream) -> None:
    """Tell attention to an earlier block's keys from attention to another stream, for the blocks of a stream."""
    order: dict[fx.Node, int] | None = None
    for block in stream.blocks:
        if block.sizes.get("cross"):
            order = order or {node: i for i, node in enumerate(program.graph.nodes)}
            if between(stream.start, block.parts["k"], order):
                del block.sizes["cross"]
                block.sizes["shared_keys"] = True
                block.evidence = [
                    e.replace(_KEYS_FROM_ELSEWHERE, "keys of an earlier block") for e in block.evidence
                ]


def ffn_parts(program: Program, block: Block) -> bool:
    """Name up, gate and down of a feed-forward block; tell whether it is one."""
    inside = set(block.nodes)
    linears = [n for n in block.nodes if is_operator(n, "aten.linear")]
    if len(linears) < 2:
        return False
    down = _last_linear(block)
    if down is None:
        return False
    feeding = [n for n in linears if n is not down and _feeds(n, down, inside)]
    if not feeding:
        return False
    if _has_product_before(down, inside):
        return False
    hidden = down.args[0]
    gate, up = _gate_and_up(hidden, feeding)
    if up is None:
        return False
    block.parts["down"] = down
    block.parts["up"] = up
    if gate is not None:
        block.parts["gate"] = gate
    width = down.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
    block.sizes["width"] = width
    gated = gate is not None
    block.evidence.append(
        f"{'gated ' if gated else ''}feed-forward of width {width}: linear, activation, linear"
        + (" (gate and up in one)" if gated and gate is up else "")
    )
    return True


def is_linear(block: Block) -> bool:
    """Tell whether nothing but moves, casts and norms lies between the projections of a feed-forward."""
    if "gate" in block.parts:
        return False
    node: Any = block.parts["down"].args[0]
    while node is not block.parts["up"]:
        if not has(node, _MOVEMENT | Trait.NORM | Trait.IDENTITY):
            return False
        node = node.args[0]
    return True


def is_conditioned(block: Block) -> bool:
    """Tell whether what lies between the projections of a feed-forward is multiplied by values from elsewhere.

    Such as embeddings of the tokens for each layer: its width is theirs, and a part of it cannot be taken alone.
    """
    inside, width = set(block.nodes), block.sizes["width"]
    node: Any = block.parts["down"].args[0]
    while has(node, Trait.CAST | Trait.RESHAPE | Trait.NORM):
        node = node.args[0]
    if not is_operator(node, "aten.mul"):
        return False
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    given = [a for a in operands if a not in inside and a.op == "call_function"]
    return len(operands) == 2 and len(given) == 1 and given[0].meta["val"].shape[-1:] == (width,)


def _last_linear(block: Block) -> fx.Node | None:
    inside = set(block.nodes)
    work: list[tuple[Any, int]] = [(block.term, 0)]
    while work:
        node, steps = work.pop()
        if is_operator(node, "aten.linear"):
            assert isinstance(node, fx.Node)
            return node
        passing = has(node, _MOVEMENT | Trait.NORM | Trait.COLLECTIVE) or is_operator(
            node, "aten.mul", "aten.add", "aten.div"
        )
        if steps == 12 or not passing:
            continue
        operands = [a for a in node.args if isinstance(a, fx.Node) and a in inside]
        if is_operator(node, "aten.mul") and len(operands) > 1:
            operands = operands[-1:]
        work.extend((operand, steps + 1) for operand in reversed(operands))
    return None


def _has_product_before(down: fx.Node, inside: set[fx.Node]) -> bool:
    """Tell whether values of the block are multiplied as matrices between its projections, as in linear attention."""
    work, seen = list(down.all_input_nodes), set()
    while work:
        node = work.pop()
        if node in seen or node not in inside or is_operator(node, "aten.linear"):
            continue
        seen.add(node)
        if has(node, Trait.PRODUCT) and sum(operand in inside for operand in node.all_input_nodes) > 1:
            return True
        work.extend(node.all_input_nodes)
    return False


def _feeds(source: fx.Node, target: fx.Node, inside: set[fx.Node]) -> bool:
    work, seen = [target], set()
    while work:
        node = work.pop()
        if node is source:
            return True
        if node in seen or node not in inside:
            continue
        seen.add(node)
        if node is not target and is_operator(node, "aten.linear"):
            continue
        work.extend(node.all_input_nodes)
    return False


def _gate_and_up(hidden: Any, feeding: list[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the gate projection, which an activation reads, and the up projection; None for those not found."""
    node = hidden
    while has(node, Trait.CAST | Trait.RESHAPE | Trait.NORM):
        node = node.args[0]
    if is_operator(node, "aten.mul"):
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        sources = [_projection_behind(a) for a in operands]
        if len(operands) == 2 and all(s is not None for s in sources):
            direct = [i for i, a in enumerate(operands) if _direct(a)]
            if sources[0] is not sources[1] and len(direct) == 1:
                return sources[1 - direct[0]], sources[direct[0]]
            if sources[0] is sources[1] and any(is_operator(a, "getitem", "aten.slice") for a in operands):
                return sources[0], sources[0]
            if sources[0] is not sources[1]:
                return sources[0], sources[1]
    return None, feeding[-1]


def _direct(node: fx.Node) -> bool:
    while has(node, _MOVEMENT):
        node = node.args[0]  # type: ignore[assignment]
    return is_operator(node, "aten.linear")


def _projection_behind(node: Any) -> fx.Node | None:
    for _ in range(16):
        if is_operator(node, "aten.linear"):
            assert isinstance(node, fx.Node)
            return node
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        operands = [a for a in node.all_input_nodes if a.op == "call_function"]
        if not operands:
            return None
        node = operands[-1] if is_operator(node, "aten.mul") else operands[0]
    return None


def experts_parts(program: Program, block: Block) -> None:
    """Name the core and the router of an MoE layer, with its sizes, and record a shared expert."""
    core = next(n for n in block.nodes if is_operator(n, "graphopt.routed_ffn"))
    args = arguments(core)
    block.parts["core"] = core
    up, chosen = args["up"].meta["val"], args["experts"].meta["val"]
    block.sizes.update(experts=up.shape[0], active=chosen.shape[1])
    router = _router(args["experts"], set(block.nodes))
    if router is not None:
        block.parts["router"] = router
    constant = depends_on_weights_alone(program)
    others = [
        n for n in block.nodes if is_operator(n, "aten.linear") and n is not router and n.args[1] in constant
    ]
    if len(others) >= 2:
        block.sizes["shared_expert"] = True
    block.evidence.append(f"graphopt.routed_ffn: {chosen.shape[1]} of {up.shape[0]} experts a token")


def nested_parts(block: Block) -> None:
    """Name the core of a nested feed-forward, its router, and the choice of widths.

    Where experts have separate weights, ``core`` is the widest and ``other_core`` the other one.
    """

    def widths(core: fx.Node) -> list[int]:
        return [int(w) for w in arguments(core)["widths"]]

    nested = [n for n in block.nodes if is_operator(n, "graphopt.nested_ffn")]
    cores = sorted(nested, key=lambda core: -max(widths(core)))
    chosen = arguments(cores[0])["choice"]
    cores = [core for core in cores if arguments(core)["choice"] is chosen]
    block.parts.update(zip(("core", "other_core"), cores, strict=False), choice=chosen)
    if is_operator(chosen, "graphopt.choose_width"):
        block.parts["router"] = arguments(chosen)["logits"]
    block.sizes.update(width=max(widths(cores[0])), widths=tuple(widths(cores[0])))
    for core in cores:
        block.evidence.append(
            f"graphopt.nested_ffn: a width for each token, out of {', '.join(map(str, widths(core)))}"
        )


def _router(node: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    work, seen = [node], set()
    while work:
        current = work.pop(0)
        if current in seen or current not in inside:
            continue
        seen.add(current)
        if is_operator(current, "aten.linear", "aten.matmul"):
            return current
        work.extend(current.all_input_nodes)
    return None
