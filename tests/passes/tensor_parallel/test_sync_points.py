"""Dropped sync points: the block form of SPD, its error identity, sensitivity, grouping of heads, distillation."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from amounts import examples
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.ir.errors import PassRefusedError, PipelineError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.ranks.rank_programs import synchronisations
from graphopt.ir.running.execute import interpret
from graphopt.ir.weights import InMemory
from graphopt.measure.context import Context
from graphopt.passes.tensor_parallel.grouping import match, scatter
from graphopt.passes.tensor_parallel.sensitivity import classify
from graphopt.passes.tensor_parallel.sync_points import drop, find_sync_points
from graphopt.training import Settings
from graphopt.training.distillation import block_pair, distil_sync_points


def shape(**options: object) -> Shape:
    return Shape(**{"heads": 4, "kv_heads": 4, "width": 12, "layers": 3, "bias": True, **options})  # type: ignore[arg-type]


@lru_cache(maxsize=16)
def whole(form: Shape) -> Program:
    return graphopt.capture(Transformer(form), tokens(2, 6))


def sharded(form: Shape, ranks: int) -> Program:
    return graphopt.optimize(whole(form), f"shard-tensor-parallel{{size={ranks}}}")


def logits(program: Program, **options: int) -> torch.Tensor:
    return program(**tokens(2, 8, **{"seed": 3, **options}))["logits"]


def data(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=seed) for seed in range(count)]


def with_weights(program: Program, ending: str, change) -> Program:
    made = program.copy()
    count = 0
    for name, weight in list(made.weights.items()):
        if weight.name.endswith(ending):
            made.weights[name] = weight.with_source(InMemory(change(weight.source.load().clone())))
            count += 1
    assert count, f"no weight is called {ending}"
    made.changed()
    return made


forms = st.builds(
    shape,
    gated=st.booleans(),
    bias=st.booleans(),
    norm=st.sampled_from(["rms", "layer"]),
    kv_heads=st.sampled_from([1, 2, 4]),
)


@given(forms)
@settings(max_examples=examples(12), deadline=None)
def test_one_rank_loses_nothing(form: Shape) -> None:
    program = sharded(form, 1)
    done = graphopt.optimize(program, "drop-sync-points{fraction=1}")
    assert float((logits(done) - logits(program)).abs().max()) < 1e-12


@given(forms, st.sampled_from([2, 4]))
@settings(max_examples=examples(12), deadline=None)
def test_without_a_feed_forward_nothing_is_lost(form: Shape, ranks: int) -> None:
    """What attention adds to the stream stays exact; only what the feed-forward sees is a part."""
    zero = with_weights(sharded(form, ranks), "think.fall.weight", torch.zeros_like)
    done = graphopt.optimize(zero, "drop-sync-points{fraction=1}")
    assert float((logits(done) - logits(zero)).abs().max()) < 1e-12


@given(forms, st.sampled_from([2, 4]), st.sets(st.integers(0, 2)))
@settings(max_examples=examples(15), deadline=None)
def test_each_dropped_point_is_one_sum_less(form: Shape, ranks: int, chosen: set[int]) -> None:
    program = sharded(form, ranks)
    numbers = " ".join(map(str, sorted(chosen)))
    done = graphopt.optimize(program, f"drop-sync-points{{blocks=[{numbers}] allow_no_match=true}}")
    assert len(synchronisations(done)) == 2 * form.layers - len(chosen)
    assert done.operators["graphopt.unreduced"] == len(chosen), (
        "a partial value is used as whole and not marked"
    )


@given(forms, st.sampled_from([2, 4]), st.integers(0, 5))
@settings(max_examples=examples(15), deadline=None)
def test_error_is_what_the_feed_forwards_of_the_ranks_miss(form: Shape, ranks: int, seed: int) -> None:
    """y' - y = sum over ranks of Z_i(u_i) - Z_i(u), to rounding."""
    program = sharded(form, ranks)
    point = find_sync_points(program)[0]["attention.1"]
    dropped = program.copy()
    written = drop(dropped, ["attention.1"])["attention.1"]
    inputs = program.bind((), tokens(2, 8, seed=seed))
    before = interpret(program, inputs, record=[point.ffn.writes, point.second.partial], stop=True)
    partial = next(n for n in dropped.graph.nodes if n.name == point.second.partial.name)
    after = interpret(dropped, inputs, record=[written, partial], stop=True)
    missed = sum(a - b for a, b in zip(after[partial.name], before[point.second.partial.name], strict=True))
    change = after[written.name] - before[point.ffn.writes.name]
    assert float((change - missed).abs().max()) < 1e-10
    assert float(change.abs().max()) > 1e-6, "nothing was dropped at all"


def test_bias_is_added_once() -> None:
    """With an empty feed-forward, twice the bias moves the output as it does with the sync point."""
    form = shape(layers=1)
    zero = with_weights(sharded(form, 4), "think.fall.weight", torch.zeros_like)
    double = with_weights(zero, "mix.out.bias", lambda b: 2 * b)
    dropped = [graphopt.optimize(p, "drop-sync-points{fraction=1}") for p in (zero, double)]
    moved = logits(dropped[1]) - logits(dropped[0])
    expected = logits(double) - logits(zero)
    assert float((moved - expected).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("placement", "reason"),
    [("parallel", "side by side"), ("sandwich", "norm of a sum"), ("post", "norm of a sum")],
)
def test_blocks_that_cannot_drop_are_refused(placement: str, reason: str) -> None:
    with pytest.raises(PassRefusedError, match=reason):
        graphopt.optimize(sharded(shape(placement=placement), 2), "drop-sync-points{fraction=1}")


def test_a_mixture_that_follows_is_refused(captured) -> None:
    program = graphopt.optimize(captured("mixtral"), "shard-tensor-parallel{size=2}")
    with pytest.raises(PassRefusedError, match="choose different experts"):
        graphopt.optimize(program, "drop-sync-points{fraction=1}")


def test_wrong_requests() -> None:
    with pytest.raises(PipelineError, match="requires a program that is sharded"):
        graphopt.optimize(whole(shape()), "drop-sync-points{fraction=1}")
    program = sharded(shape(), 2)
    with pytest.raises(PipelineError, match="say how many"):
        graphopt.optimize(program, "drop-sync-points")
    with pytest.raises(PipelineError, match="there is no attention 7"):
        graphopt.optimize(program, "drop-sync-points{blocks=[7]}")
    with pytest.raises(PipelineError, match="there is no data to measure the loss on"):
        graphopt.optimize(program, "drop-sync-points{budget=0.1}")
    with pytest.raises(PipelineError, match="sensitive is below"):
        graphopt.optimize(program, "drop-sync-points{fraction=0.5 insensitive=0.5 sensitive=0.1}")


# -- choosing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [0, 1 << 26])
def test_sensitivity_is_the_difference_of_suffixes(recorded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whole evaluations: the shared prefix and the sums over batches must change nothing."""
    from graphopt.passes.tensor_parallel.sensitivity import backward_sweep

    monkeypatch.setattr("graphopt.passes.tensor_parallel.sensitivity.RECORDED", recorded)
    program = sharded(shape(), 2)
    context = Context(data(4))
    scores = backward_sweep(program, context, "perplexity", lambda note: None)
    names = ["attention.0", "attention.1", "attention.2"]
    values = []
    for index in range(4):
        variant = program.copy()
        drop(variant, names[index:])
        values.append(context.evaluate(variant, program, metric="perplexity", judge=False)[1])
    assert scores["base"] == pytest.approx(values[3], rel=1e-12)
    for index, name in enumerate(names):
        assert scores[name] == pytest.approx(values[index] - values[index + 1], abs=1e-9)


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.passes.tensor_parallel.sensitivity import backward_sweep

    monkeypatch.setattr("graphopt.passes.tensor_parallel.sensitivity.RECORDED", 0)  # groups of one batch
    program = sharded(shape(), 2)

    class Stopping:
        def __init__(self, stop: bool):
            self.stop, self.notes = stop, []

        def start(self, what: str, total: int) -> None: ...

        def step(self, note: str = "") -> None:
            self.notes.append(note)
            if self.stop and len(self.notes) == 5:  # in the second batch of four runs
                raise KeyboardInterrupt

        def done(self) -> None: ...

    first, again = Stopping(True), Stopping(False)
    with pytest.raises(KeyboardInterrupt):
        backward_sweep(program, Context(data(4), work_dir=tmp_path, progress=first), "perplexity", print)
    resumed = backward_sweep(
        program, Context(data(4), work_dir=tmp_path, progress=again), "perplexity", print
    )
    assert again.notes.count("kept from before") == 4, "what was measured was measured again"
    assert resumed == backward_sweep(program, Context(data(4)), "perplexity", print)


@given(st.dictionaries(st.integers(0, 9).map(lambda i: f"attention.{i}"), st.floats(-1, 5), min_size=1),
       st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 0.1))  # fmt: skip
def test_classes_partition_and_grow_with_their_thresholds(scores, first, second, more) -> None:
    low, high = sorted((first, second))
    scores = {**scores, "base": 10.0}
    classes = classify(scores, low, high)
    assert set(classes) == set(scores) - {"base"}
    wider = classify(scores, low + more, high + more)
    order = ["insensitive", "sensitive", "extremely sensitive"]
    assert all(order.index(wider[n]) <= order.index(classes[n]) for n in classes)


def test_fraction_takes_the_least_sensitive_and_budget_holds() -> None:
    program = sharded(shape(), 2)
    done = graphopt.optimize(program, "drop-sync-points{fraction=0.34}", data=data(4))
    entry = done.report.passes[-1]
    (taken,) = entry.sites
    scores = {r.block: float(r.reason.split()[-1]) for r in entry.refused}
    plan = done.history[-1]["plan"]
    assert all(plan["scores"][taken] <= score + 1e-9 for score in scores.values())
    held = graphopt.optimize(program, "drop-sync-points{budget=0.5}", data=data(4))
    assert held.report.passes[-1].metric["relative loss"] <= 0.5


# -- grouping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["linear", "conv1d"])
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_grouping_alone_changes_nothing(kv_heads: int, spelling: str) -> None:
    form = Shape(heads=8, kv_heads=kv_heads, bias=True, spelling=spelling, layers=2)
    program = graphopt.capture(Transformer(form), tokens(2, 6))
    grouped = graphopt.optimize(program, "group-heads{size=2}", data=data())
    assert float((logits(grouped) - logits(program)).abs().max()) < 1e-11
    both = graphopt.optimize(grouped, "shard-tensor-parallel{size=2}")
    assert float((logits(both) - logits(program)).abs().max()) < 1e-10


def test_scatter_parts_what_is_alike() -> None:
    distances = torch.ones(6, 6) - torch.eye(6)
    for a, b in ((0, 1), (2, 3), (4, 5)):  # pairs of twins
        distances[a, b] = distances[b, a] = 0.0
    groups, gain = scatter(distances, 3)
    assert sorted(u for group in groups for u in group) == list(range(6))
    assert gain > 1
    assert all(set(group) not in ({0, 1}, {2, 3}, {4, 5}) for group in groups), "twins share a rank"
    assert match(torch.tensor([[1.0, 9.0], [5.0, 6.0]])) == [1, 0]


def test_one_key_value_head_a_rank_leaves_no_choice(checkpoint) -> None:
    ids = [{"input_ids": torch.randint(3, 100, (2, 8))}]
    with pytest.raises(PassRefusedError, match="nothing to choose"):
        graphopt.optimize(checkpoint("llama"), "group-heads{size=2}", data=ids)


def test_grouped_folder_loads_elsewhere(tmp_path: Path, checkpoint) -> None:
    """Any engine that splits heads in order must find the groups in the folder."""
    from transformers import AutoModelForCausalLM

    folder = checkpoint("phi")
    generator = torch.Generator().manual_seed(0)
    ids = [{"input_ids": torch.randint(3, 100, (2, 8), generator=generator)} for _ in range(2)]
    grouped = graphopt.optimize(folder, "group-heads{size=2}", data=ids)
    orders = [site["order"] for site in grouped.history[-1]["plan"]["sites"]]
    assert orders, "nothing was grouped"
    grouped.save_pretrained(tmp_path / "hf")
    first, second = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, tmp_path / "hf"))
    with torch.no_grad():
        assert torch.allclose(first(**ids[0]).logits, second(**ids[0]).logits, atol=1e-5)
    for number, order in enumerate(orders):
        before, after = (m.model.layers[number].self_attn.q_proj.weight.detach() for m in (first, second))
        size = before.shape[0] // len(order)
        moved = torch.cat([before[u * size : (u + 1) * size] for u in order])
        assert torch.equal(after, moved), "the folder does not hold the planned order"


# -- distillation -----------------------------------------------------------------------------------------


def test_block_pair_is_the_block_with_and_without() -> None:
    program = sharded(shape(), 2)
    teacher, student = block_pair(program, "attention.1")
    inputs = program.bind((), tokens(2, 8))
    point = find_sync_points(program)[0]["attention.1"]
    found = interpret(program, inputs, record=[point.attention.reads, point.ffn.writes], stop=True)
    given_ = {"stream": found[point.attention.reads.name], "attention_mask": inputs["attention_mask"]}
    written = teacher(**given_)["written"]
    assert torch.allclose(written, found[point.ffn.writes.name], atol=1e-12)
    assert not torch.allclose(student(**given_)["written"], written, atol=1e-6)
    assert student.operators["graphopt.unreduced"] == 1


def test_a_block_without_its_sync_point_is_one_module_too() -> None:
    """Ranks use the same weights in the same layers, each in its own way: one class for both would be wrong."""
    from graphopt.training.distillation import block_pair

    program = sharded(shape(), 2)
    for part in block_pair(program, "attention.1"):
        stream = torch.randn(2, 8, 12, dtype=torch.float64)
        inputs = {"stream": stream, "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
        expected = part(**inputs)["written"]
        torch.testing.assert_close(part.module()(**inputs)["written"], expected, rtol=1e-12, atol=1e-12)


def test_distillation_brings_a_block_closer_and_changes_no_other(tmp_path: Path) -> None:
    program = sharded(shape(), 2)
    before = {n: w.source.load().clone() for n, w in program.weights.items()}
    plain = program.copy()
    drop(plain, ["attention.1"])
    done, records = distil_sync_points(
        program, ["attention.1"], data(6), Settings(steps=60, learning_rate=3e-3), work_dir=tmp_path
    )
    losses = list(records["attention.1"].losses)
    assert losses[-1] < losses[0], "the student learned nothing"
    truth = logits(program)
    assert float((logits(done) - truth).norm()) < float((logits(plain) - truth).norm())
    assert all(torch.equal(before[n], w.source.load()) for n, w in program.weights.items()), (
        "the model was changed"
    )
    again, _ = distil_sync_points(
        program, ["attention.1"], data(6), Settings(steps=60, learning_rate=3e-3), work_dir=tmp_path
    )
    assert torch.equal(logits(done), logits(again)), "a finished run was not taken up"
    with pytest.raises(UsageError, match="there is no such attention"):
        distil_sync_points(program, ["attention.9"], data(2), Settings(steps=1))
