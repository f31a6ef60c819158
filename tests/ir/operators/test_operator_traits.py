"""Traits of operators are checked by what the operators compute, and passes look through what has them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from norm_networks import draw, fold, randomise
from torch import Tensor, nn

import graphopt
from graphopt.ir import operators
from graphopt.ir.anatomy.parts import source_projection
from graphopt.ir.operators.spec import SPECS
from graphopt.ir.operators.traits import _ATEN, Trait, has, named, traits_of
from graphopt.ir.ranks.dimensions import sources_of
from graphopt.ir.rewriting.respelling import SPELLINGS
from graphopt.ir.rewriting.spelling import CASTS, NOTHING, TRANSPOSES, VIEWS
from graphopt.ir.running.fold import depends_on_weights_alone
from graphopt.ir.running.retype import in_type
from graphopt.passes.quantization.values import moved

aten, composites = torch.ops.aten, torch.ops.graphopt
INDEX = torch.tensor([2, 0])

# one call of each operator, of a value of shape (2, 3, 4)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "flatten": lambda x: aten.flatten.using_ints(x, 1),
    "reshape": lambda x: aten.reshape.default(x, [6, 4]),
    "squeeze": lambda x: aten.squeeze.dim(x[:1], 0),
    "unflatten": lambda x: aten.unflatten.int(x, 2, [2, 2]),
    "unsqueeze": lambda x: aten.unsqueeze.default(x, 1),
    "permute": lambda x: aten.permute.default(x, [2, 0, 1]),
    "broadcast_to": lambda x: aten.broadcast_to.default(x, [5, 2, 3, 4]),
    "expand": lambda x: aten.expand.default(x, [5, 2, 3, 4]),
    "expand_as": lambda x: aten.expand_as.default(x, torch.empty(5, 2, 3, 4)),
    "as_strided": lambda x: aten.as_strided.default(x, [2, 3], [12, 4]),
    "chunk": lambda x: aten.chunk.default(x, 2, 2),
    "diagonal": lambda x: aten.diagonal.default(x, 0, 1, 2),
    "narrow": lambda x: aten.narrow.default(x, 1, 1, 2),
    "select": lambda x: aten.select.int(x, 1, 1),
    "slice": lambda x: aten.slice.Tensor(x, 1, 1, 3),
    "split": lambda x: aten.split.Tensor(x, 2, 1),
    "split_with_sizes": lambda x: aten.split_with_sizes.default(x, [1, 2], 1),
    "tensor_split": lambda x: aten.tensor_split.sections(x, 2, 1),
    "unbind": lambda x: aten.unbind.int(x, 1),
    "unfold": lambda x: aten.unfold.default(x, 2, 3, 1),
    "clone": lambda x: aten.clone.default(x),
    "contiguous": lambda x: aten.contiguous.default(x),
    "detach": lambda x: aten.detach.default(x),
    "cat": lambda x: aten.cat.default([x, x], 1),
    "constant_pad_nd": lambda x: aten.constant_pad_nd.default(x, [1, 2]),
    "flip": lambda x: aten.flip.default(x, [1]),
    "gather": lambda x: aten.gather.default(x, 1, torch.tensor([[[2, 0, 1, 1]]])),
    "index": lambda x: aten.index.Tensor(x, [None, INDEX]),
    "index_select": lambda x: aten.index_select.default(x, 1, INDEX),
    "pixel_shuffle": lambda x: aten.pixel_shuffle.default(x.reshape(4, 2, 3), 2),
    "pixel_unshuffle": lambda x: aten.pixel_unshuffle.default(x, 1),
    "repeat": lambda x: aten.repeat.default(x, [1, 2, 1]),
    "repeat_interleave": lambda x: aten.repeat_interleave.self_int(x, 2, 1),
    "roll": lambda x: aten.roll.default(x, [1], [1]),
    "stack": lambda x: aten.stack.default([x, x], 1),
    "to": lambda x: aten.to.dtype(x, torch.float64),
    "abs": lambda x: aten.abs.default(x),
    "leaky_relu": lambda x: aten.leaky_relu.default(x, 0.1),
    "relu": lambda x: aten.relu.default(x),
    "neg": lambda x: aten.neg.default(x),
    "cumsum": lambda x: aten.cumsum.default(x, 1),
    "cumprod": lambda x: aten.cumprod.default(x, 1),
    "logcumsumexp": lambda x: aten.logcumsumexp.default(x, 1),
    "softmax": lambda x: aten.softmax.int(x, 1),
    "log_softmax": lambda x: aten.log_softmax.int(x, 1),
    "_softmax": lambda x: aten._softmax.default(x, 1, False),
    "_log_softmax": lambda x: aten._log_softmax.default(x, 1, False),
    "dropout": lambda x: aten.dropout.default(x, 0.5, False),
    "floor_divide": lambda x: aten.floor_divide.default(x, 2.0),
    "hardswish": lambda x: aten.hardswish.default(x),
    "masked_fill": lambda x: aten.masked_fill.Scalar(x, x > 0, 1.0),
    "rsub": lambda x: aten.rsub.Scalar(x, 1.0),
    "where": lambda x: aten.where.self(x > 0, x, -x),
    "linalg_vector_norm": lambda x: aten.linalg_vector_norm.default(x, 2, [1]),
    "norm": lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]),
    "all": lambda x: aten.all.dim(x > 0, 1),
    "any": lambda x: aten.any.dim(x > 0, 1),
    "max": lambda x: aten.max.dim(x, 1)[0],
    "min": lambda x: aten.min.dim(x, 1)[0],
    **{
        name: lambda x, name=name: getattr(aten, name).default(x, [1])  # type: ignore[misc]
        for name in ("amax", "amin", "logsumexp")
    },
    **{
        name: lambda x, name=name: getattr(aten, name).default(x, 1)  # type: ignore[misc]
        for name in ("argmax", "argmin")
    },
    **{
        name: lambda x, name=name: getattr(aten, name).dim(x, [1])  # type: ignore[misc]
        for name in ("std", "var", "mean")
    },
    "prod": lambda x: aten.prod.dim_int(x, 1),
    "sum": lambda x: aten.sum.dim_IntList(x, [1]),
    **{
        f"{kind}_pool{axes}d": lambda x, kind=kind, axes=axes: getattr(aten, f"{kind}_pool{axes}d").default(  # type: ignore[misc]
            x.reshape(2, 3, 4, *[1] * (axes - 1)), [2, 1, 1][:axes]
        )
        for kind in ("avg", "max")
        for axes in (1, 2, 3)
    },
    **{
        name: lambda x, name=name: getattr(aten, name).default(x)  # type: ignore[misc]
        for name in (
            "celu",
            "elu",
            "erf",
            "gelu",
            "log_sigmoid",
            "mish",
            "selu",
            "sigmoid",
            "silu",
            "softplus",
            "tanh",
        )
    },
}


def parts(name: str, x: Tensor) -> list[Tensor]:
    result = CALLS[name.removeprefix("aten.")](x)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def those(trait: Trait) -> Any:
    """Parametrize over ATen's operators with a trait."""
    return pytest.mark.parametrize("name", sorted(n for n in named(trait) if n.startswith("aten.")))


def drawn(seed: int = 0) -> Tensor:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(x.abs() < 0.1, x + 0.5, x)


@those(Trait.RESHAPE | Trait.IDENTITY)
def test_a_reshape_keeps_values_in_their_order(name: str) -> None:
    (result,) = parts(name, x := drawn())
    assert torch.equal(result.reshape(-1), x.reshape(-1)[: result.numel()])
    same = result.shape == x.shape
    assert same == bool(traits_of(name) & Trait.IDENTITY)


@those(Trait.REORDER)
def test_a_reordering_has_every_value_once(name: str) -> None:
    (result,) = parts(name, x := drawn())
    assert result.shape != x.shape
    assert torch.equal(result.reshape(-1).sort().values, x.reshape(-1).sort().values)


@those(Trait.VIEW & ~Trait.REPEAT)
def test_a_view_needs_no_memory(name: str) -> None:
    x = drawn()
    assert all(p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in parts(name, x))


@those(Trait.REPEAT)
def test_a_repetition_needs_no_memory(name: str) -> None:
    (result,) = parts(name, x := drawn())
    assert result.numel() > x.numel()
    assert result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@those(Trait.MOVEMENT)
def test_movement_makes_no_number(name: str) -> None:
    known = {*drawn().reshape(-1).tolist(), 0.0}
    assert all(set(p.reshape(-1).tolist()) <= known for p in parts(name, drawn()))


@those(Trait.MOVEMENT | Trait.LINEAR | Trait.CAST)
def test_what_is_linear_adds_up(name: str) -> None:
    one, two = drawn(1), drawn(2)
    both = parts(name, 2 * one - 3 * two)
    for result, a, b in zip(both, parts(name, one), parts(name, two), strict=True):
        assert torch.allclose(result, 2 * a - 3 * b)


@those(Trait.HOMOGENEOUS)
def test_a_positive_scale_of_channels_goes_through(name: str) -> None:
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    (before,), (after,) = parts(name, drawn()), parts(name, drawn() * scale[:, None])
    assert torch.allclose(after, before * scale.reshape(-1, *[1] * (before.dim() - 2)))


@those(Trait.POINTWISE | Trait.ACTIVATION | Trait.CAST | Trait.IDENTITY)
def test_what_is_pointwise_can_be_cut_anywhere(name: str) -> None:
    (whole,) = parts(name, x := drawn())
    assert whole.shape == x.shape
    for dim in range(3):
        (part,) = parts(name, x.narrow(dim, 1, 1).contiguous())
        assert torch.allclose(part, whole.narrow(dim, 1, 1))


@those(Trait.ALONG)
def test_what_works_along_a_dimension_can_be_cut_across_it(name: str) -> None:
    (whole,) = parts(name, x := drawn())
    for dim in (0, -1):
        (part,) = parts(name, x.narrow(dim, 1, 1).contiguous())
        assert torch.allclose(part, whole.narrow(dim, 1, 1))


@those(Trait.SCAN)
def test_a_scan_reads_nothing_ahead(name: str) -> None:
    (whole,), (first,) = parts(name, drawn()), parts(name, drawn()[:, :2].contiguous())
    assert torch.allclose(first, whole[:, :2])
    assert not torch.allclose(whole[:, 2], parts(name, drawn()[:, 2:].contiguous())[0][:, 0])


@those(Trait.REDUCTION)
def test_a_reduction_gives_one_value_for_all(name: str) -> None:
    (result,) = parts(name, drawn())
    assert result.shape == (2, 4)


@those(Trait.FILL)
def test_what_fills_makes_equal_values(name: str) -> None:
    packet = getattr(aten, name.removeprefix("aten."))
    size: list[Any] = (
        [drawn()] if name.endswith("_like") else [] if name == "aten.scalar_tensor" else [[2, 3]]
    )
    if traits_of(name) & Trait.NEW:
        size.insert(0, drawn())
    result = packet(*size, *[7.0] * ("full" in name or name == "aten.scalar_tensor"))
    assert len(set(result.reshape(-1).tolist())) == 1
    assert (result.dtype is torch.float64) == (name.endswith("_like") or bool(traits_of(name) & Trait.NEW))


def test_the_traits_of_names_are_those_of_operators() -> None:
    assert all(hasattr(aten, n.removeprefix("aten.")) for n in named(~Trait.NONE) if n.startswith("aten."))
    names = [name for _, row in _ATEN for name in row.split()]
    assert len(names) == len(set(names)), "an operator stands in two rows, of which the last counts"
    assert named(Trait.ROUNDING) == {"graphopt.fake_quantize", "graphopt.fake_quantize_channels"}
    assert traits_of(aten.add.Tensor) & Trait.POINTWISE
    assert not traits_of(aten.max.dim) & Trait.POINTWISE
    assert traits_of(aten.randperm.default) & Trait.RANDOM


SHAPED: dict[str, Callable[[Any], Any]] = {
    "attention": lambda f: f(draw(2, 4, 5, 6), draw(2, 2, 7, 6), draw(2, 2, 7, 3), scale=0.5),
    "cache_codes": lambda f: f(draw(2, 3, 5, 8), torch.ones(2, 3, 5, 2).double(), torch.zeros(2, 3, 5, 2).double()),
    "cache_load": lambda f: f(torch.ones(2, 3, 5, 4, dtype=torch.uint8), draw(2, 3, 5, 2), draw(2, 3, 5, 2)),
    "cache_low": lambda f: f(draw(2, 3, 5, 8).to(torch.bfloat16), group=4),
    "cache_scale": lambda f: f(draw(2, 3, 5, 8).to(torch.bfloat16), group=4),
    "cache_store": lambda f: f(draw(2, 3, 8, 4).to(torch.bfloat16), draw(2, 3, 2, 4), torch.tensor([[0, 1], [3, 2]])),
    "cache_visible": lambda f: f(torch.tensor([[3, 4]]), torch.tensor([[3, 4]]), draw(1, 2, 8, 4), window=3),
    "causal_conv1d": lambda f: f(draw(2, 3, 5).float(), draw(3, 1, 4).float(), draw(3).float(), draw(2, 3, 3)),
    "causal_conv1d_state": lambda f: f(draw(2, 3, 5).float(), draw(2, 3, 3), torch.ones(2, 5, dtype=torch.bool)),
    "linear_attention": lambda f: f(draw(2, 2, 5, 3), draw(2, 2, 5, 3), draw(2, 4, 5, 6).float(), -draw(2, 4, 5).abs()),
    "linear_attention_state": lambda f: f(
        draw(2, 2, 5, 3), draw(2, 4, 5, 6).to(torch.bfloat16), -draw(2, 4, 5).abs(), None, draw(2, 4, 3, 6).float(),
        torch.ones(2, 5, dtype=torch.bool),
    ),
    "fake_quantize": lambda f: f(draw(2, 3).to(torch.bfloat16), 0.1, 0, dtype="int8"),
    "fake_quantize_channels": lambda f: f(draw(2, 3).to(torch.bfloat16), torch.ones(2), axis=0, dtype="int8"),
    "rotary": lambda f: f(draw(2, 3, 4).to(torch.bfloat16), draw(3, 4), draw(3, 4)),
    "routed_ffn": lambda f: f(
        draw(5, 4).to(torch.bfloat16), torch.zeros(5, 2, dtype=torch.int64), draw(5, 2).to(torch.bfloat16),
        draw(3, 12, 4).to(torch.bfloat16), draw(3, 4, 6).to(torch.bfloat16),
    ),
    "nested_ffn": lambda f: f(
        draw(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64), [2, 6], draw(6, 4), draw(4, 6), draw(6, 4)
    ),
    "soft_nested_ffn": lambda f: f(
        draw(2, 5, 4), draw(2, 5, 2).softmax(-1), [2, 6], draw(6, 4), draw(4, 6), draw(6, 4)
    ),
}  # fmt: skip


def test_every_shape_rule_is_compared() -> None:
    assert {name.removeprefix("graphopt.") for name, spec in SPECS.items() if spec.shape} == set(SHAPED)


@pytest.mark.parametrize("name", sorted(SHAPED))
def test_shape_rules_say_what_the_reference_returns(name: str) -> None:
    rule = SPECS[f"graphopt.{name}"].shape
    assert rule is not None
    found, expected = SHAPED[name](rule), SHAPED[name](getattr(operators, name))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


# what is looked through since operators are known by their traits


class Model(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def captured(function: Callable[..., Tensor], *shape: int, **modules: nn.Module) -> graphopt.Program:
    return graphopt.capture(Model(function, **modules).double().eval(), inputs=draw(*shape))


def one(program: graphopt.Program, name: str) -> Any:
    (node,) = (
        n for n in program.nodes if n.op == "call_function" and str(n.target).startswith(f"aten.{name}.")
    )
    return node


def test_random_orders_stay_apart() -> None:
    program = captured(lambda m, x: x[torch.randperm(5)].sum(0) - x[torch.randperm(5)].amax(0), 5, 3)
    assert program.operators["aten.randperm"] == 2


@pytest.mark.parametrize("made", [lambda x: torch.linspace(0, 1, 3), lambda x: torch.eye(3)])
def test_factories_without_a_type_are_widened(made: Callable[[Tensor], Tensor]) -> None:
    program = captured(lambda m, x: x * made(x), 3, 3)
    wide = in_type(program.graph)
    (node,) = (n for n in wide.nodes if has(n, Trait.FACTORY))
    assert node.kwargs["dtype"] is torch.float64


def test_the_transpose_of_a_vector_is_the_vector() -> None:
    program = captured(lambda m, x: x[0].t() * 2, 3, 4)
    assert "aten.t" not in program.operators


@pytest.mark.parametrize("step", [
    lambda y: y.narrow(-1, 2, 4), lambda y: y.flip(1), lambda y: torch.stack([y, y]), lambda y: y.unfold(1, 2, 1),
])  # fmt: skip
def test_projections_are_found_behind_every_movement(step: Callable[[Tensor], Tensor]) -> None:
    program = captured(lambda m, x: step(m.linear(x)) + 0.0 * 1, 2, 3, 6, linear=nn.Linear(6, 6))
    (output,) = program.outputs.values()
    assert source_projection(output) is one(program, "linear")


@pytest.mark.parametrize("mix", [
    nn.AvgPool1d(3, 1, 1, count_include_pad=False), nn.ConvTranspose1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1),
])  # fmt: skip
def test_what_mixes_positions_is_a_block(mix: nn.Module) -> None:
    program = captured(lambda m, x: x + m.mix(m.first(x)), 2, 4, 5, mix=mix, first=nn.Hardswish())
    (block,) = program.anatomy.blocks
    assert block.add is one(program, "add")


def test_scores_are_read_through_a_dimension_for_the_heads() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q(x), m.k(x), m.v(x)
        scores = (q @ k.transpose(1, 2) * 0.5).unsqueeze(1).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
        return scores.softmax(-1).squeeze(1) @ v

    program = captured(attention, 2, 5, 4, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4))
    assert program.operators["graphopt.attention"] == 1


def test_a_weight_times_a_number_made_as_a_tensor_is_a_weight() -> None:
    program = captured(
        lambda m, x: nn.functional.linear(x, m.linear.weight * torch.scalar_tensor(2.0)),
        2,
        4,
        linear=nn.Linear(4, 4),
    )
    assert one(program, "mul") in depends_on_weights_alone(program)


@pytest.mark.parametrize("step", [lambda x: nn.functional.pixel_shuffle(x, 2), lambda x: x.narrow(1, 1, 2)])
def test_what_was_only_moved_keeps_its_range(step: Callable[[Tensor], Tensor]) -> None:
    program = captured(lambda m, x: step(x) + 1, 2, 4, 3, 3)
    assert moved(one(program, "add").args[0]) in program.input_nodes.values()


def test_a_norm_is_folded_through_a_chosen_row() -> None:
    model = Model(
        lambda m, x: m.norm(m.conv(x).select(2, 1)), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm1d(4)
    )
    _, folded = fold(randomise(model, 1, 0.1), draw(2, 3, 6, 6))
    assert folded.operators.get("aten.batch_norm", 0) == 0


def test_parts_of_activations_and_lookups_are_made_of_parts() -> None:
    program = captured(lambda m, x: nn.functional.hardswish(x).index_select(1, INDEX).amax(-1), 2, 3, 4)
    (x,) = program.input_nodes.values()
    activation, looked_up, largest = (
        one(program, "hardswish"),
        one(program, "index_select"),
        one(program, "amax"),
    )
    along = sources_of(activation, 2)
    assert along is not None and along[x] is not None and along[x].dim == 2
    # the index is read whole, whichever part of the value is wanted
    found = sources_of(looked_up, 2)
    assert found is not None and [a if a is None else a.dim for a in found.values()] == [2, None]
    rows = sources_of(largest, 0)
    assert rows is not None and rows[looked_up] is not None
    assert sources_of(looked_up, 1) is None


def test_activations_cost_what_they_compute() -> None:
    program = captured(lambda m, x: nn.functional.hardswish(x), 2, 3, 4)
    assert graphopt.cost(program).flops == 24


# what is written where no canonical graph is
ELSEWHERE = {
    "training/forms.py": {"detach"}, "ir/cost/survey.py": {"detach"}, "backends/torch/exported.py": {"clone"},
    # its own graph of what a step does, which calls what torch records
    "decoding/prepared.py": {"clone", "contiguous", "_to_copy", "transpose"},
}  # fmt: skip
RESPELLED = {
    name.removeprefix("aten.")
    for name in {*TRANSPOSES, *VIEWS, *NOTHING, *CASTS, *SPELLINGS} - {"aten.reshape", "aten.to"}
}


def test_spellings_that_no_program_has_are_named_where_they_are_respelled() -> None:
    source = Path(graphopt.__file__).parent
    for path in sorted(source.rglob("*.py")):
        place = str(path.relative_to(source))
        if place.startswith(("ir/rewriting/", "frontends/")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ""
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.startswith("aten.")
            ):
                name = node.value.split(".")[1]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("aten", "torch.ops.aten"):
                name = node.attr
            assert name not in RESPELLED - ELSEWHERE.get(place, set()), f"{place}:{node.lineno} names {name}"
