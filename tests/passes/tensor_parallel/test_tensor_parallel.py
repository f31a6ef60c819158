"""Sharding over ranks: exact for every spelling, typed, editable, refused with the reason where it cannot be."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from amounts import examples
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.api import plan_passes
from graphopt.ir.checking.verify import verify
from graphopt.ir.errors import PassRefusedError, PipelineError, UsageError, VerificationError
from graphopt.ir.program import Program
from graphopt.ir.ranks.placement import PARTIAL, WHOLE, Shard, placements
from graphopt.ir.ranks.rank_programs import rank_program, synchronisations, unrolled
from graphopt.ir.weights import load_part
from graphopt.measure.context import Context

pytestmark = pytest.mark.usefixtures("captured_once")

aten, composites = torch.ops.aten, torch.ops.graphopt


@lru_cache(maxsize=32)
def captured(shape: Shape) -> Program:
    return graphopt.capture(Transformer(shape), tokens(2, 6))


def error(first: Program, second: Program, inputs: dict[str, torch.Tensor]) -> float:
    return float((first(**inputs)["logits"] - second(**inputs)["logits"]).abs().max())


shapes = st.builds(
    Shape,
    heads=st.just(8),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    width=st.sampled_from([8, 16]),
    gated=st.booleans(),
    bias=st.booleans(),
    norm=st.sampled_from(["rms", "layer", "written_rms"]),
    placement=st.sampled_from(["pre", "post", "sandwich", "parallel"]),
    qkv=st.sampled_from(["separate", "plain"]),
    gate_up=st.sampled_from(["separate", "plain", "interleaved"]),
    spelling=st.sampled_from(["linear", "conv1d", "transposed"]),
    tied=st.booleans(),
    causal=st.booleans(),
    vocab=st.just(24),
)


@given(shapes, st.sampled_from([2, 4, 8]), st.sampled_from(["replicate", "shard"]))
@settings(max_examples=examples(25), deadline=None)
def test_ranks_together_compute_what_the_model_does(shape: Shape, ranks: int, embedding: str) -> None:
    program = captured(shape)
    sharded = graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks} embedding={embedding}}}")
    for inputs in (tokens(2, 6), tokens(1, 9, seed=1)):
        assert error(program, sharded, inputs) < 1e-10, "sharding changed the function"
    sums = sum("all_reduce" in str(n.target) for n in synchronisations(sharded))
    expected = shape.layers * (1 if shape.placement == "parallel" else 2) + (embedding == "shard")
    assert sums == expected, "sums that could be one are several, or one is missing"


@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 7))
@settings(max_examples=examples(15), deadline=None)
def test_heads_that_do_not_divide_are_refused(ranks: int, groups: int, factor: int) -> None:
    heads = groups * factor
    program = captured(Shape(heads=heads, kv_heads=groups, width=60, layers=1))
    possible = heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)
    if possible:
        sharded = graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks}}}")
        assert error(program, sharded, tokens(2, 6)) < 1e-10
    else:
        with pytest.raises(PassRefusedError, match="heads"):
            graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks}}}")
        kept = graphopt.optimize(program, f"shard-tensor-parallel{{size={ranks} attention=replicate}}")
        assert error(program, kept, tokens(2, 6)) < 1e-10
        assert len(synchronisations(kept)) == 1, "the feed-forward can be cut all the same"


def test_one_rank_is_the_model() -> None:
    program = captured(Shape())
    sharded = graphopt.optimize(program, "shard-tensor-parallel{size=1}")
    assert error(program, sharded, tokens(2, 6)) == 0.0


def test_each_rank_reads_only_its_own_part(tmp_path: Path, checkpoint) -> None:
    """A rank that loaded whole matrices would need the memory of the whole model."""
    from graphopt.ir.running.fold import fold
    from graphopt.ir.weights import SafetensorsEntry

    sharded = graphopt.optimize(checkpoint("llama"), "shard-tensor-parallel{size=2}")
    again = graphopt.load(sharded.save(tmp_path / "saved"))
    read: list[int] = []
    whole, part = SafetensorsEntry.load, SafetensorsEntry.load_part

    def load(self: SafetensorsEntry) -> torch.Tensor:
        made = whole(self)
        read.append(made.numel())
        return made

    def load_some(self: SafetensorsEntry, dim: int, start: int, end: int) -> torch.Tensor:
        made = part(self, dim, start, end)
        read.append(made.numel())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsEntry, "load", load)
        patch.setattr(SafetensorsEntry, "load_part", load_some)
        own = fold(rank_program(again, 1))
        for weight in own.weights.values():
            weight.source.load()
    counted = graphopt.cost(sharded).parameters
    buffers = sum(w.source.load().numel() for w in again.weights.values() if w.kind != "parameter")
    assert sum(read) <= counted + buffers, "a rank read more than it keeps"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=examples(40), deadline=None)
def test_a_part_of_a_tensor_is_read_from_its_place(
    tmp_path_factory, shape: list[int], data: st.DataObject
) -> None:
    from safetensors.torch import save_file

    from graphopt.ir.storage.safetensors_file import read_header

    path = tmp_path_factory.mktemp("part") / "t.safetensors"
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    save_file({"other": torch.zeros(3), "t": tensor}, path)
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim]))
    end = data.draw(st.integers(start, shape[dim]))
    entry = read_header(path)["t"]
    assert torch.equal(load_part(entry, dim, start, end), tensor.narrow(dim, start, end - start))


def test_plan_is_printed_edited_and_obeyed(tmp_path: Path) -> None:
    program = captured(Shape(layers=2))
    ((_, plan),) = plan_passes(program, "shard-tensor-parallel{size=2}", Context())
    assert [s.block for s in plan.sites] == ["attention.0", "ffn.0", "attention.1", "ffn.1"]
    plan.sites = [s for s in plan.sites if s.block != "attention.1"]
    edited = graphopt.optimize(program, "shard-tensor-parallel{size=2}", plan=[plan])
    assert len(synchronisations(edited)) == 3, "what was taken out of the plan was sharded all the same"
    assert error(program, edited, tokens(2, 6)) < 1e-10


def test_huggingface_plan_says_what_is_cut(tmp_path: Path, checkpoint) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"base_model_tp_plan": {"layers.*.mlp.gate_proj": "colwise",
                                                       "layers.*.mlp.down_proj": "rowwise"}}))  # fmt: skip
    sharded = graphopt.optimize(
        checkpoint("llama"), f'shard-tensor-parallel{{size=2 huggingface_plan="{path}"}}'
    )
    entry = sharded.report.passes[-1]
    assert entry.sites == ["ffn.0", "ffn.1"]
    assert all("plan does not name" in r.reason for r in entry.refused)
    path.write_text(yaml.safe_dump(["rowwise"]))
    with pytest.raises(PipelineError, match="no tensor-parallel plan"):
        graphopt.optimize(checkpoint("llama"), f'shard-tensor-parallel{{size=2 huggingface_plan="{path}"}}')


@pytest.mark.parametrize("how", ["width", "expert"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_mixtures_are_cut_by_width_or_by_expert(captured, name: str, how: str) -> None:
    program = captured(name)
    sharded = graphopt.optimize(program, f"shard-tensor-parallel{{size=2 experts={how}}}")
    from graphopt.ir.checking.verify import compare_programs
    from graphopt.ir.running.examples import example_inputs

    ((_, plan),) = plan_passes(program, f"shard-tensor-parallel{{size=2 experts={how}}}", Context())
    assert {s["by"] for s in plan.sites if s.block.startswith("experts")} == {how}
    errors = compare_programs(program, sharded, program.bind((), example_inputs(program)))
    assert max(errors.values()) < 1e-10


def test_sharded_program_trains_in_one_process() -> None:
    """Gradients of all ranks must reach the one weight that they are cut from."""
    program = captured(Shape())
    sharded = graphopt.optimize(program, "shard-tensor-parallel{size=2}")
    inputs = tokens(2, 6)
    grads = []
    for each in (program, sharded):
        module = each.module()
        module(**inputs)["logits"].square().mean().backward()
        grads.append({n: p.grad for n, p in module.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-12), f"the gradient of {name} differs"


def test_sharding_twice_is_refused() -> None:
    with pytest.raises(PipelineError, match="cannot run on a program that is sharded"):
        graphopt.optimize(captured(Shape()), "shard-tensor-parallel{size=2}, shard-tensor-parallel{size=2}")
    with pytest.raises(PipelineError, match="say how many ranks"):
        graphopt.optimize(captured(Shape()), "shard-tensor-parallel")


def test_exact_passes_run_on_what_is_sharded() -> None:
    program = captured(Shape())
    fused = graphopt.optimize(program, "shard-tensor-parallel{size=2}, fuse-projections, fold-norms")
    assert error(program, fused, tokens(2, 6)) < 1e-10


# -- types ------------------------------------------------------------------------------------------------


def sharded() -> Program:
    return graphopt.optimize(captured(Shape(bias=True, layers=1)), "shard-tensor-parallel{size=2}").copy()


def test_values_have_the_placements_that_they_should() -> None:
    program = sharded()
    placed = placements(program)
    block = program.anatomy.attention[0]
    assert placed[block.parts["o"]] == PARTIAL
    core = placed[block.parts["core"]]
    assert isinstance(core, Shard)
    assert (core.dim, core.length, core.total) == (1, 2, 4)
    assert placed[block.writes] == WHOLE
    for node, placement in placed.items():
        if isinstance(placement, Shard) and isinstance(node.meta.get("val"), torch.Tensor):
            local = node.meta["val"].shape[placement.dim]
            assert local == placement.length, "a rank's part has another size than its type says"


def test_misplaced_bias_is_a_type_error() -> None:
    program = sharded()
    out = program.anatomy.attention[0].parts["o"]
    bias = next(u for u in out.users.copy().popitem()[0].users).args[1]
    with program.edit.before(out):
        wrong = program.edit.call(aten.linear.default, out.args[0], out.args[1], bias)
    program.edit.replace(out, wrong)
    with pytest.raises(VerificationError, match="bias would be added once per rank") as caught:
        verify(program, [])
    assert "builders.py" in str(caught.value), "the error must name the line of the model"


def test_residual_inside_the_sum_is_a_type_error() -> None:
    program = sharded()
    block = program.anatomy.attention[0]
    out = block.parts["o"]
    (reduce,) = out.users
    with program.edit.before(reduce):
        wrong = program.edit.call(aten.add.Tensor, out, block.reads)
        again = program.edit.call(composites.all_reduce.default, wrong, "tensor_parallel")
    program.edit.replace(reduce, again)
    with pytest.raises(VerificationError, match="would count once per rank"):
        verify(program, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, n: p.edit.call(aten.relu.default, n), "not linear in it"),
        (lambda p, n: p.edit.call(aten.mul.Tensor, n, n), "not linear in it"),
        (lambda p, n: p.edit.call(aten.add.Tensor, n, 1.0), "would count once per rank"),
        (lambda p, n: p.edit.call(aten.softmax.int, n, -1), "not linear in it"),
        (lambda p, n: p.edit.call(aten.constant_pad_nd.default, n, [1, -1], 1.0), "not linear in it"),
        (lambda p, n: p.edit.emit(lambda y: y.long().to(y.dtype), n), "not linear in it"),
    ],
)
def test_partial_values_pass_through_nothing_but_linear_operators(change, message: str) -> None:
    program = sharded()
    out = program.anatomy.attention[0].parts["o"]
    (reduce,) = out.users
    with program.edit.before(reduce):
        program.edit.replace(
            reduce, program.edit.call(composites.all_reduce.default, change(program, out), "tensor_parallel")
        )
    with pytest.raises(VerificationError, match=message):
        verify(program, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda p, n: p.edit.call(aten.flip.default, n, [1]),
        lambda p, n: p.edit.call(aten.roll.default, n, [1], [1]),
        lambda p, n: p.edit.call(aten.mean.dim, n, [1], True),
        lambda p, n: p.edit.call(aten.constant_pad_nd.default, n, [0, 0, 1, 0]),
    ],
)
def test_partial_values_pass_through_linear_operators(change) -> None:
    program = sharded()
    out = program.anatomy.attention[0].parts["o"]
    (reduce,) = out.users
    with program.edit.after(reduce):
        changed = change(program, out)
        program.add_output(
            "sum", program.edit.call(composites.all_reduce.default, changed, "tensor_parallel")
        )
    assert placements(program)[changed] == PARTIAL
    verify(program, [])


def test_output_that_differs_by_rank_is_refused() -> None:
    program = sharded()
    program.add_output("partial", program.anatomy.attention[0].parts["o"])
    with pytest.raises(VerificationError, match="a partial sum"):
        verify(program, [])
    with pytest.raises(VerificationError, match="differs from rank to rank"):
        unrolled(program)


def test_number_of_ranks_is_checked(tmp_path: Path) -> None:
    program = sharded()
    with pytest.raises(UsageError, match="there is no rank 2"):
        rank_program(program, 2)
