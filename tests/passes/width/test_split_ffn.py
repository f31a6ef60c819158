"""Dense feed-forwards split by width: exact at the whole, one program for every width, back to plain folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from amounts import examples
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from preferring_routers import with_preferences

import graphopt
from graphopt.ir.checking.verify import compare_programs
from graphopt.ir.cost.active import ActiveWork, choices_of
from graphopt.ir.errors import LoweringError, PassRefusedError, PipelineError, UsageError
from graphopt.ir.export_blockers import export_blockers
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.running.execute import interpret
from graphopt.measure.choices import with_choices_as_input

# one of each kind of feed-forward, norm, mixer and storage; all others of the zoo are near one of these
DENSE = (
    "llama qwen2 gemma2 olmo2 phi phi3 gpt2 gpt_neox gptj gpt_bigcode falcon bloom mpt opt starcoder2 cohere nemotron "
    "granite exaone4 deepseek_v3 bert albert deberta_v2 modernbert t5 bart vit dinov2 swin"
).split()
DUO = "widths=[1/4 1] separate=true"


@lru_cache(maxsize=16)
def captured_shape(shape: Shape) -> Program:
    return graphopt.capture(Transformer(shape), tokens(2, 6))


def logits(program: Program, **settings: float) -> torch.Tensor:
    return program(**tokens(2, 9, seed=5), **settings)["logits"]


def first(program: Program, **settings: object) -> torch.Tensor:
    found = program(**example_inputs(program), **settings)
    return next(v for v in found.values() if isinstance(v, torch.Tensor) and v.is_floating_point())


@pytest.mark.parametrize("name", DENSE)
def test_every_dense_architecture_is_exact_at_the_whole(
    name: str, captured: Callable[[str], Program]
) -> None:
    """All sites are held to 1e-11 by the contract; here whole programs, in float64, with the dial at 1."""
    program = captured(name)
    done = graphopt.optimize(program, "split-ffn{score=peak}")
    entry = done.report.passes[-1]
    assert len(entry.sites) == len(program.anatomy.ffn)
    assert not entry.refused
    assert [b.kind for b in done.anatomy.blocks] == [b.kind for b in program.anatomy.blocks]
    inputs = program.bind((), example_inputs(program)) | {"delta": torch.tensor(1.0, dtype=torch.float64)}
    errors = compare_programs(program, with_preferences(done), inputs)
    assert max(errors.values()) < 1e-10
    assert not torch.allclose(first(done, delta=0.0), first(program), atol=1e-6), "the dial turns nothing"


shapes = st.builds(
    Shape,
    width=st.sampled_from([6, 10, 16]),
    gated=st.booleans(),
    bias=st.booleans(),
    placement=st.sampled_from(["pre", "post", "sandwich", "parallel"]),
    gate_up=st.sampled_from(["separate", "plain", "interleaved"]),
    spelling=st.sampled_from(["linear", "conv1d", "transposed"]),
)
options = st.sampled_from(
    ["widths=[1/4 1/2 3/4 1]", "widths=[1/2 1]", "widths=[1/3 1] skip=true", "widths=[1] skip=true", DUO,
     DUO + " skip=true", "widths=[1/2 1] router=linear", "widths=[1/2 1] router_size=3"]
)  # fmt: skip


@given(shapes, options, st.sampled_from(["peak", "activation", "none"]))
@settings(max_examples=examples(10), deadline=None)
def test_whole_is_exact_and_each_width_is_its_extract(shape: Shape, text: str, score: str) -> None:
    program = captured_shape(shape)
    data = [tokens(2, 8, seed=s) for s in range(4)]
    if not text.startswith("widths=[1] "):  # one width leaves an order of importance nothing to do
        text += f" score={score}"
    done = with_preferences(graphopt.optimize(program, f"split-ffn{{{text}}}", data=data))
    assert float((logits(done) - logits(program)).abs().max()) < 1e-10
    block = done.anatomy.ffn[0]
    forced = with_choices_as_input(done)
    shared = "other_core" not in block.parts
    ways = (
        block.sizes["widths"]
        if shared
        else (0, round(shape.width / 4), shape.width)[-block.router.meta["val"].shape[-1] :]
    )
    for way, width in enumerate(ways):
        if width == 0:
            continue
        routing = torch.full((shape.layers, 2, 9), way)
        expected = forced(**tokens(2, 9, seed=5), routing=routing)["logits"]
        plain = graphopt.optimize(done, f"extract-width{{width={width / shape.width}}}")
        assert "graphopt.nested_ffn" not in plain.operators
        assert not plain.dials
        assert not any("router" in w.name for w in plain.weights.values())
        assert float((logits(plain) - expected).abs().max()) < 1e-10
        assert plain.anatomy.ffn[0].sizes["width"] == width


@given(st.integers(0, 100), st.lists(st.floats(0, 1), min_size=2, max_size=4))
@settings(max_examples=examples(15), deadline=None)
def test_cost_rises_with_the_dial(seed: int, values: list[float]) -> None:
    done = with_preferences(graphopt.optimize(captured_shape(Shape(width=16)), "split-ffn{score=peak}"), seed)
    used = []
    for value in sorted(values):
        active = ActiveWork(done)
        bound = done.bind((), {**tokens(2, 9, seed=5), "delta": value})
        active.add(bound, interpret(done, bound, record=choices_of(done)))
        used.append((active.routed_used / active.routed_possible, active.used))
        assert 0.25 <= used[-1][0] <= 1
        assert active.used <= active.possible
    # a wider token in one layer changes what the next layer's router sees: only the first layer must rise
    first_choice = done.anatomy.ffn[0].parts["choice"]
    widths = [
        interpret(
            done, done.bind((), {**tokens(2, 9, seed=5), "delta": v}), record=[first_choice], stop=True
        )[first_choice.name]
        for v in sorted(values)
    ]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(widths))


def test_tied_feed_forwards_keep_one_weight_and_have_routers_of_their_own(
    captured: Callable[[str], Program],
) -> None:
    """ALBERT's layers share their weights; a second set of small experts would be a second model."""
    program = captured("albert")
    for text in ("split-ffn{score=peak}", f"split-ffn{{score=peak {DUO}}}"):
        done = graphopt.optimize(program, text)
        cores = [b.parts["core"] for b in done.anatomy.ffn]
        assert len({c.args[3] for c in cores}) == 1
        assert len({b.parts["router"] for b in done.anatomy.ffn}) == len(cores)
        smalls = {b.parts["other_core"].args[3] for b in done.anatomy.ffn if "other_core" in b.parts}
        assert len(smalls) <= 1


@pytest.mark.parametrize(
    ("name", "text"),
    [(n, "split-ffn{score=peak}") for n in ("gpt2", "opt", "phi3")]
    + [(n, f"split-ffn{{score=peak {DUO}}}") for n in ("llama", "phi3")],
)
def test_a_width_goes_back_to_a_plain_folder(
    name: str, text: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    program = captured(name)
    split = graphopt.optimize(program, text)
    with pytest.raises(LoweringError, match="several widths"):
        split.save_pretrained(tmp_path / "several")
    for width in (0.25, 1.0):
        plain = graphopt.optimize(split, f"extract-width{{width={width}}}")
        if export_blockers(plain):  # a small expert of its own, in a fused or transposed projection
            assert width < 1 and "separate" in text and name in ("gpt2", "phi3")
            continue
        folder = tmp_path / f"out{width}"
        plain.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.randint(3, 100, (2, 9))
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids)["logits"], expected, atol=2e-5)


def test_split_programs_go_wherever_others_go(captured: Callable[[str], Program], tmp_path: Path) -> None:
    import onnxruntime

    program = captured("llama")
    for number, text in enumerate(("split-ffn{score=peak}", f"split-ffn{{score=peak {DUO} skip=true}}")):
        done = with_preferences(graphopt.optimize(program, text))
        expected = first(done, delta=0.4)
        again = graphopt.load(done.save(tmp_path / f"saved{number}"))
        assert torch.equal(first(again, delta=0.4), expected)
        module = done.module(fold_weights=True)
        assert torch.allclose(module(**example_inputs(done), delta=0.4)["logits"], expected, atol=1e-6)
        exported = done.exported_program(core_aten=True)
        bound = done.bind((), {**example_inputs(done), "delta": 0.4})
        assert torch.allclose(exported.module()(**bound)["logits"], expected, atol=1e-5)
        sharded = graphopt.optimize(done, "shard-tensor-parallel{size=2}")
        assert not [r for r in sharded.report.passes[-1].refused if "ffn" in r.block]
        assert torch.allclose(first(sharded, delta=0.4), expected, atol=1e-5)
        fewer = graphopt.optimize(done, "skip-layers{layers=[0]}")
        assert len(fewer.anatomy.ffn) == len(done.anatomy.ffn) - 1
        path = tmp_path / f"out{number}.onnx"
        done.lower("onnx", path)
        session = onnxruntime.InferenceSession(str(path))
        feeds = {i.name: bound[i.name].numpy() for i in session.get_inputs()}
        assert torch.allclose(torch.from_numpy(session.run(None, feeds)[0]), expected, atol=1e-4)


def test_frozen_dial_is_the_setting(captured: Callable[[str], Program]) -> None:
    done = with_preferences(graphopt.optimize(captured("qwen2"), "split-ffn{score=peak}"))
    still = graphopt.optimize(done, "freeze-dial{value=0.6}")
    assert not still.dials
    assert torch.equal(first(still), first(done, delta=0.6))
    with pytest.raises(PipelineError, match="range is 0 to 1"):
        graphopt.optimize(done, "freeze-dial{value=1.5}")
    with pytest.raises(PipelineError, match="run-time settings are delta"):
        graphopt.optimize(done, "freeze-dial{dial=sigma}")
    with pytest.raises(PassRefusedError, match="matched nothing"):
        graphopt.optimize(still, "freeze-dial")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("split-ffn{widths=[1/2 1/4 1]}", "must rise"),
        ("split-ffn{widths=[1/4 1/2]}", "must rise"),
        ("split-ffn{widths=[0 1]}", "must rise"),
        ("split-ffn{widths=[1]}", "nothing to choose"),
        ("split-ffn{widths=[1/4 1/2 1] separate=true}", "takes two widths"),
        ("split-ffn{score=peak widths=[1/128 1]}", "different multiples"),
        ("split-ffn{score=peak multiple=128}", "different multiples of 128"),
        ("split-ffn", "needs .*data|no .*data"),
        ("extract-width", "one width"),
        ("split-ffn{score=peak}, split-ffn{score=peak}", "several widths already"),
        ("split-ffn{score=peak}, extract-width{width=1/3}", "has the widths"),
        ("split-ffn{score=peak}, sort-ffn{score=peak}", "several widths already"),
        ("split-ffn{score=peak}, prune-ffn{fraction=0.5 score=peak}", "several widths already"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    text: str, reason: str, captured: Callable[[str], Program]
) -> None:
    with pytest.raises((PipelineError, PassRefusedError), match=reason):
        graphopt.optimize(captured("llama"), text)


def test_dial_out_of_range_is_refused(captured: Callable[[str], Program]) -> None:
    done = graphopt.optimize(captured("llama"), "split-ffn{score=peak}")
    for value in (-0.1, 1.1):
        with pytest.raises(UsageError, match="range is 0.0 to 1.0"):
            first(done, delta=value)


def test_an_unknown_activation_is_refused(captured: Callable[[str], Program]) -> None:
    """A function that merely looks like one must not be replaced by it."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.softplus(self.up(x)) * 1.01)

    program = graphopt.capture(Odd(), torch.randn(2, 5, 8))
    with pytest.raises(PassRefusedError, match="no activation that"):
        graphopt.optimize(program, "split-ffn{score=peak}")
