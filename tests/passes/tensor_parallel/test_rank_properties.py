"""Heads in another order compute what they did; sums in few bits are as far off as their steps allow, and no further."""

from __future__ import annotations

import torch
from amounts import examples
from builders import Shape, tokens
from drawn_decoders import SIZES, Decoder, alike, decoders
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.ir.program import Program
from graphopt.ir.running.execute import interpret
from graphopt.ir.schema import arguments, is_operator

SEEDS = st.integers(0, 1 << 20)
EIGHT = (
    Shape(heads=8, kv_heads=8, width=8, bias=True, norm="layer"),
    Shape(heads=8, kv_heads=4, width=8, spelling="conv1d", tied=True, placement="sandwich"),
    Shape(heads=8, kv_heads=8, width=8, qkv="plain", placement="parallel", gated=False, causal=False),
)


def data(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=seed + n) for n in range(count)]


@settings(max_examples=examples(18), deadline=None)
@given(decoders(EIGHT), st.booleans(), st.sampled_from([[0], [1], [0, 1]]), st.booleans(), SEEDS)
def test_heads_in_another_order(drawn: Decoder, few: bool, blocks: list[int], match: bool, seed: int) -> None:
    """Wrong if a key-value head left its queries, or columns of the output projection stayed where they were."""
    ranks = 2 if few or drawn.shape.kv_heads == 4 else 4
    text = f"group-heads{{size={ranks} blocks=[{' '.join(map(str, blocks))}] match={str(match).lower()}}}"
    program = graphopt.optimize(drawn.program, "split-projections{allow_no_match=true}", verify="off")
    done = graphopt.optimize(program, text, data=data(seed, 2), verify="off")
    orders = [site["order"] for site in done.history[-1]["plan"]["sites"]]
    assert len(orders) == len(blocks)
    for size in SIZES:
        given_ = tokens(*size, seed=seed)
        assert alike(done(**given_)["logits"], program(**given_)["logits"])
        before, after = (_heads(p, given_) for p in (program, done))
        for block in range(drawn.shape.layers):
            expected = before[block]
            if block in blocks:
                order = orders[blocks.index(block)]
                assert sorted(order) == list(range(drawn.shape.kv_heads))
                expected = expected.unflatten(1, (len(order), -1))[:, order].flatten(1, 2)
            assert alike(after[block], expected), "heads are not in the order of the plan"


def _heads(program: Program, given_: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what each attention makes of each head, (batch, heads, sequence, size)."""
    cores = [block.parts["core"] for block in program.anatomy.attention]
    found = interpret(program, program.bind((), given_), record=cores, stop=True)
    return [found[core.name] for core in cores]


SHARDED = (
    Shape(layers=1, size=24, kv_heads=4, width=8, bias=True),
    Shape(layers=1, size=24, kv_heads=4, width=8, norm="layer", placement="post", gated=False),
)


@settings(max_examples=examples(24), deadline=None)
@given(
    decoders(SHARDED), st.sampled_from([2, 4]), st.integers(2, 8), st.sampled_from(["calibrated", "random", "none"]),
    st.sampled_from([0, 5, 16]), st.sampled_from(["gather", "two-step"]), st.sampled_from([0.01, 0.5]), SEEDS,
)  # fmt: skip
def test_sums_in_few_bits(
    drawn: Decoder, ranks: int, bits: int, outliers: str, group: int, algorithm: str, rate: float, seed: int
) -> None:
    """Half a step a rank, what lies beyond the ends that calibration found, and bfloat16 for outliers: no more."""
    program = graphopt.optimize(drawn.program, f"shard-tensor-parallel{{size={ranks}}}", verify="off")
    share = " share=0.13" if outliers != "none" else ""
    rated = f" rate={rate}" if not group or outliers == "calibrated" else ""
    text = f"bits={bits} outliers={outliers} group={group} algorithm={algorithm}{share}{rated}"
    batches = data(seed, 4)
    done = graphopt.optimize(program, f"quantize-communication{{{text}}}", data=batches, verify="off")
    sums = [n for n in program.nodes if is_operator(n, "graphopt.all_reduce")]
    few = [n for n in done.nodes if is_operator(n, "graphopt.quantized_all_reduce")]
    assert len(few) == len(sums) == 2 * drawn.shape.layers
    assert not any(is_operator(n, "graphopt.all_reduce") for n in done.nodes)
    given_ = tokens(3, 11, seed=seed + 9)
    values = interpret(done, done.bind((), given_), record=[*few, *(n.args[0] for n in few)])
    for before, node in zip(sums, few, strict=True):
        parts = torch.stack(values[node.args[0].name])
        found = values[node.name]
        found = found[0] if isinstance(found, list) else found
        largest, reduced = _ranges(program, before, batches[:2], rate)
        kept = torch.zeros(parts.shape[-1], dtype=torch.bool)
        many = int(0.13 * len(kept)) if outliers != "none" else 0
        if outliers == "calibrated":
            kept[largest.sum(0).topk(many).indices] = True
        elif outliers == "random":
            order = done.weights[arguments(node)["order"].name].source.load()
            kept[order[:many]] = True
        allowed = _allowed(parts, kept, bits, group, algorithm, largest, reduced)
        error = (found.double() - parts.sum(0)).abs()
        assert bool((error <= allowed * 1.001 + 1e-6 * parts.abs().sum(0) + 1e-6).all()), (
            "further off than steps allow"
        )
        if bits < 7:
            assert float(error.max()) > 0, "nothing is in few bits"


def _ranges(
    program: Program, node: torch.fx.Node, batches: list[dict[str, torch.Tensor]], rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest values of each rank's features, (ranks, features), and of their sums, by moving averages."""
    averages: list[torch.Tensor] = []
    for batch in batches:
        parts = torch.stack(
            interpret(program, program.bind((), batch), record=[node.args[0]], stop=True)[node.args[0].name]
        )
        both = torch.cat([parts, parts.sum(0, keepdim=True)])
        for row, mask in enumerate(batch["attention_mask"].bool()):
            seen = both[:, row, mask]
            extremes = torch.stack([seen.amin(1), seen.amax(1)])
            averages = [extremes if not averages else (1 - rate) * averages[0] + rate * extremes]
    largest = averages[0].abs().amax(0)
    return largest[:-1], largest[-1]


def _allowed(
    parts: torch.Tensor, kept: torch.Tensor, bits: int, group: int, algorithm: str, largest: torch.Tensor,
    reduced: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return how far a sum of (ranks, ..., features) may be off, by the formula of its steps."""
    top = (1 << (bits - 1)) - 1
    whole, rest = parts.sum(0), ~kept
    rounding = parts.abs().sum(0) * 2**-8  # of bfloat16
    if group:
        # a step is a float16; at the ends of the range its rounding counts as often as there are steps
        shares = [int(rest.sum())] if algorithm == "gather" else _shares(int(rest.sum()), len(parts))
        step = torch.cat([_steps(share, group, top) for share in parts[..., rest].split(shares, -1)], -1)
        each = (step * (0.5 + top * 2**-10)).sum(0)
    else:
        step = (largest[:, rest] / top)[:, None, None]
        each = (step / 2 + (parts[..., rest].abs() - top * step).clamp(min=0)).sum(0)
    allowed = rounding.clone()
    allowed[..., rest] = each
    if algorithm == "two-step":
        # what the first step gave is rounded once more
        given_ = whole.abs() + allowed
        allowed = allowed + given_ * 2**-8
        if group:
            step = given_[..., rest].amax(-1, keepdim=True) / top
            again = step * (0.5 + top * 2**-10)
        else:
            step = reduced[rest] / top
            again = step / 2 + (given_[..., rest] - top * step).clamp(min=0)
        allowed[..., rest] = each + again
    return allowed


def _shares(count: int, ranks: int) -> list[int]:
    """Return how many features each rank adds up."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def _steps(x: torch.Tensor, group: int, top: int) -> torch.Tensor:
    """Return the step of each feature: its group's largest value over the largest integer."""
    return torch.cat([p.abs().amax(-1, keepdim=True).expand_as(p) / top for p in x.split(group, -1)], -1)
