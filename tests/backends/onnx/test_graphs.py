"""Several graphs of one program: buckets that share weights, parts that follow one another, folders for onnxruntime-genai."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
import zoo
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.backends.onnx import genai, genai_folder
from graphopt.backends.onnx import model as onnx_model
from graphopt.backends.onnx.files import share_weights
from graphopt.backends.onnx.graph import build_graph
from graphopt.backends.onnx.parts import cut_points, in_parts
from graphopt.backends.onnx.sizes import fixed_sizes, with_sizes
from graphopt.cli.running import run as command
from graphopt.ir.errors import LoweringError
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.running.execute import run

NPU = "qnn-htp-v75"
SHAPES = [{"batch": 1, "sequence": 6}, {"batch": 1, "sequence": 1}]


@pytest.fixture(scope="module")
def cached(captured: Callable[[str], Program]) -> Program:
    return graphopt.optimize(captured("llama"), "insert-cache{max_length=12}")


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def external(path: Path) -> dict[str, tuple[str, str]]:
    held = onnx.load(str(path), load_external_data=False).graph.initializer
    found = ({e.key: e.value for e in t.external_data} for t in held if t.external_data)
    return {f"{f['location']} {f['offset']}": (f["location"], f["offset"]) for f in found}


def test_a_prompts_graph_and_a_steps_read_one_file_of_weights(cached: Program, tmp_path: Path) -> None:
    """Together they generate what the program does; the weights are stored once."""
    report = cached.lower("onnx", tmp_path / "out", sizes=SHAPES)
    first, second = (tmp_path / "out" / f"model_batch1_sequence{n}.onnx" for n in (6, 1))
    assert [report.path, *(r.path for r in report.others)] == [first, second]
    assert external(first) == external(second) != {}
    assert {location for location, _ in external(first).values()} == {"weights.data"}
    size = (tmp_path / "out" / "weights.data").stat().st_size
    assert size < 1.3 * report.initialiser_bytes, "weights are stored twice"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["others"]
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in report.files} | {"report.json"}
    prompt, step = session(first), session(second)
    ids = torch.randint(3, 100, (1, 9))
    names = [n for n in cached.signature.inputs if "_cache_" in n]
    feed = {n: numpy.zeros([1, *cached.signature.inputs[n].shape[1:]], "float32") for n in names}
    said = []
    for begin, end, held in ((0, 6, prompt), (6, 7, step), (7, 8, step), (8, 9, step)):
        feed |= {"input_ids": ids[:, begin:end].numpy(), "position_ids": numpy.arange(begin, end)[None]}
        outputs = dict(zip([o.name for o in held.get_outputs()], held.run(None, feed), strict=True))
        feed |= {n: outputs[f"next_{n}"] for n in names}
        said.append(torch.from_numpy(outputs["logits"]))
    whole = {"input_ids": ids, "position_ids": torch.arange(9)[None]}
    whole |= {n: torch.zeros([1, *cached.signature.inputs[n].shape[1:]]) for n in names}  # type: ignore[list-item]
    assert torch.allclose(torch.cat(said, 1), run(cached, whole)["logits"], atol=1e-4)


def test_other_values_in_a_shared_file_are_noticed(
    cached: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.backends.onnx import files as onnx_files

    honest = onnx_files._refer
    monkeypatch.setattr(onnx_files, "_refer", lambda tensor, offset, length: honest(tensor, 0, length))
    with pytest.raises(LoweringError, match="reads other values of"):
        cached.lower("onnx", tmp_path / "out", sizes=SHAPES)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    assert share_weights(tmp_path / "empty") == 0


@settings(max_examples=4, deadline=None)
@given(st.integers(2, 4), st.booleans(), st.floats(0.1, 1.2), st.integers(0, 100))
def test_parts_one_after_another_are_the_program(
    layers: int, quantized: bool, share: float, seed: int
) -> None:
    """Whatever the size of parts: the same values, every output once, no part over its size; quantised ones too."""
    program = graphopt.capture(Transformer(Shape(layers=layers)), tokens(2, 6))
    if quantized:
        data = [tokens(2, 6, seed=s) for s in range(2)]
        program = graphopt.optimize(
            program, "fit-target{allow_no_match=true}, quantize{weights=4}", data=data
        )
    fixed = with_sizes(program, fixed_sizes(program, {}, everything=True))
    whole = onnx_model.in_parts(fixed, 1 << 40)
    assert len(whole) == 1
    total = sum(w.bytes for w in fixed.weights.values())
    most = int(share * total)
    try:
        parts = in_parts(fixed, most)
    except LoweringError as told:
        assert "between two places" in told.message
        return
    assert share > 0.99 or quantized or len(parts) > 1
    inputs = example_inputs(fixed, seed=seed)
    expected, values, given_out = run(fixed, inputs), dict(inputs), []
    for part in parts:
        made = run(part, {n: values[n] for n in part.signature.inputs})
        given_out += [n for n in made if not n.startswith("part_")]
        values |= made
    assert sorted(given_out) == sorted(expected), "an output is lost, or there twice"
    assert all(torch.allclose(values[n], expected[n], atol=1e-10) for n in expected)
    if not quantized:
        assert all(sum(w.bytes for w in p.weights.values()) <= most for p in parts)


@pytest.mark.parametrize("rounding", ["nearest", "fitted"])
def test_parts_are_as_large_as_they_are_written(rounding: str, captured: Callable[[str], Program]) -> None:
    """Wrong if a matrix were counted beside the integers that are written in its place: twice the parts, or none."""
    data = [{"input_ids": torch.randint(3, 100, (2, 8))} for _ in range(4)]
    passes = f"fit-target, quantize{{weights=4 rounding={rounding}}}"
    done = graphopt.optimize(captured("llama"), passes, data=data)
    fixed = with_sizes(done, fixed_sizes(done, {}, everything=True))

    def written(part: Program) -> int:
        return sum(v.const_value.nbytes for v in build_graph(part, 23).graph.initializers.values())

    (whole,) = in_parts(fixed, 1 << 40)
    total = written(whole)
    parts = in_parts(fixed, int(0.7 * total))
    assert len(parts) == 2
    # beside weights there are zero points and sizes
    assert all(written(part) <= 0.8 * total for part in parts)


def test_cuts_lie_where_the_stream_alone_crosses(captured: Callable[[str], Program]) -> None:
    program = captured("llama")
    fixed = with_sizes(program, fixed_sizes(program, {}, everything=True))
    found = cut_points(fixed)
    width = fixed.outputs["logits"].all_input_nodes[0].meta["val"].shape[-1]
    assert len([n for _, n in found if n.meta["val"].shape[-1] == width]) >= 2 * 2
    # between blocks as well, where masks and rotations pass by: each part computes its own
    blocks = sum(b.kind in ("attention", "ffn") for b in fixed.anatomy.blocks)
    assert len([n for _, n in found if n.meta["val"].shape[-1] == width]) >= blocks
    order = [n for n in fixed.graph.nodes if n.op == "call_function"]
    first, last = (order.index(found[i][1]) for i in (0, -1))
    gaps = [order.index(b[1]) - order.index(a[1]) for a, b in itertools.pairwise(found)]
    assert max(gaps) < (last - first) / 2, "no cut in the middle of the program"


def test_parts_are_written_compared_and_refused(
    captured: Callable[[str], Program], tmp_path: Path, capsys: Any
) -> None:
    program = captured("llama")
    shape = {"batch": 2, "sequence": 6}
    total = sum(w.bytes for w in program.weights.values())
    report = program.lower("onnx", tmp_path / "out", sizes=shape, part_bytes=int(0.6 * total))
    assert report.path.name == "model_part1.onnx"
    assert "part_1" in report.outputs and "part_1" in report.others[0].inputs
    assert max(e for r in (report, *report.others) for e in r.errors.values()) < 1e-4
    saved = str(program.save(tmp_path / "saved"))
    line = [
        "lower",
        saved,
        "--to",
        "onnx",
        "--shape",
        "batch=2,sequence=6",
        "--part-bytes",
        str(int(0.6 * total)),
    ]
    assert command([*line, "-o", str(tmp_path / "by_line")]) == 0
    assert "model_part2.onnx" in capsys.readouterr().out
    with pytest.raises(LoweringError, match="between two places where the program could be cut"):
        program.lower("onnx", tmp_path / "no", sizes=shape, part_bytes=1000)
    with pytest.raises(LoweringError, match="has fixed sizes"):
        program.lower("onnx", tmp_path / "no", part_bytes=total)
    with pytest.raises(LoweringError, match="written into a folder"):
        program.lower("onnx", tmp_path / "no.onnx", sizes=[shape, {"batch": 1, "sequence": 2}])
    with pytest.raises(LoweringError, match="the same sizes"):
        program.lower("onnx", tmp_path / "no", sizes=[shape, shape])
    assert {p.name for p in tmp_path.iterdir()} == {"out", "saved", "by_line"}


def test_more_than_two_gibibytes_in_one_file_are_refused(
    captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protobuf holds no more; by default they are written beside it, and one who forbids that is told."""
    monkeypatch.setattr(onnx_model, "EXTERNAL_FROM", 1000)
    with pytest.raises(LoweringError, match="a file of its own holds 2 GiB at most") as told:
        captured("llama").lower("onnx", tmp_path / "out.onnx", external_data=False)
    assert "external_data=True" in told.value.hint
    assert not list(tmp_path.iterdir())
    report = captured("llama").lower("onnx", tmp_path / "out.onnx")
    assert {f.name for f in report.files} == {"out.onnx", "out.onnx.data"}


installed = pytest.mark.skipif(
    find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed"
)


@installed
@pytest.mark.parametrize(
    ("name", "passes"),
    [("llama", "insert-cache"), ("llama", "insert-cache{max_length=32}"), ("gpt2", "insert-cache"),
     ("mistral", "skip-layers{remove=1}, insert-cache")],
)  # fmt: skip
def test_onnxruntime_genai_generates_what_the_program_does(
    name: str, passes: str, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    program = captured(name)
    data = [example_inputs(program, {"batch": 2, "sequence": 8}, seed=s) for s in range(2)]
    done = graphopt.optimize(program, passes, data=data)
    report = done.lower("genai", tmp_path / "out", check=True)
    assert report.compared is not None and report.compared > 3
    assert {f.name for f in report.files} >= {"model.onnx", "genai_config.json"}


@installed
@pytest.mark.parametrize("share", [None, 0.7])
def test_a_prompts_graph_and_a_steps_are_stages_of_genai(
    share: float | None, cached: Program, tmp_path: Path
) -> None:
    """For a device too, where a host computes masks, and in parts; tried here on the CPU, with prompts in pieces."""
    import onnxruntime_genai

    fitted = graphopt.optimize(cached, "fit-target")
    total = sum(w.bytes for w in fitted.weights.values())
    part = None if share is None else int(share * total)
    report = fitted.lower("onnx", tmp_path / "out", sizes=SHAPES, target=NPU, part_bytes=part)
    said = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert said["type"] == "decoder-pipeline"
    stages = {next(iter(s)): next(iter(s.values())) for s in said["decoder"]["pipeline"]}
    assert len(stages) == len([report, *report.others]) + 2
    assert all(("session_options" in s) != n.endswith("_host") for n, s in stages.items()), (
        "a host's graph is on the device"
    )
    for stage in said["decoder"]["pipeline"]:
        next(iter(stage.values())).pop("session_options", None)
    whole = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    (tmp_path / "out" / "genai_config.json").write_text(json.dumps(whole | {"model": said}))
    model = onnxruntime_genai.Model(str(tmp_path / "out"))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=12, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    prompt = [5, 9, 31, 7, 55, 20, 11]
    generator.append_tokens(prompt[:6])
    generator.append_tokens(prompt[6:])
    while not generator.is_done():
        generator.generate_next_token()
    found = torch.tensor([[int(t) for t in generator.get_sequence(0)]])
    names = {n: torch.zeros([1, *s.shape[1:]]) for n, s in cached.signature.inputs.items() if "_cache_" in n}  # type: ignore[list-item]
    count = found.shape[1]
    logits = run(cached, {"input_ids": found, "position_ids": torch.arange(count)[None], **names})["logits"]
    assert logits[0, 6 : count - 1].argmax(-1).tolist() == found[0, 7:].tolist()


@installed
@pytest.mark.parametrize("length", [6, 8, 12])
def test_a_cache_as_long_as_a_prompt_is_tried_all_the_same(
    length: int, captured: Callable[[str], Program], tmp_path: Path
) -> None:
    """A try that generates nothing is none, and one that asks for more than fits refuses what is right."""
    cached = graphopt.optimize(captured("llama"), f"insert-cache{{max_length={length}}}")
    assert cached.lower("genai", tmp_path / "out", check=True).compared > 0
    shapes = [{"batch": 1, "sequence": length}, {"batch": 1, "sequence": 1}]
    cached.lower("onnx", tmp_path / "buckets", sizes=shapes)
    assert (tmp_path / "buckets" / "genai_config.json").is_file()


def test_a_text_without_an_end_is_refused(tmp_path: Path) -> None:
    """genai takes token 0 for an end that nobody names; graphs of a prompt and a step are written without its settings."""
    model = zoo.make("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    program = graphopt.capture(model, {"input_ids": torch.randint(3, 100, (2, 6))})
    cached = graphopt.optimize(program, "insert-cache{max_length=12}")
    with pytest.raises(LoweringError, match="with which token a text ends"):
        cached.lower("genai", tmp_path / "out")
    cached.lower("onnx", tmp_path / "buckets", sizes=SHAPES)
    assert not (tmp_path / "buckets" / "genai_config.json").exists()


@installed
def test_other_tokens_are_refused(cached: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = genai_folder.run
    monkeypatch.setattr(genai_folder, "run", lambda *a: {k: -v for k, v in honest(*a).items()})
    with pytest.raises(LoweringError, match="onnxruntime-genai generates token"):
        cached.lower("genai", tmp_path / "out")
    monkeypatch.setattr(
        genai, "genai_config", lambda program: {"model": {"vocab_size": 100}, "search": {"max_length": 20}}
    )
    with pytest.raises(LoweringError, match="does not take the folder"):
        cached.lower("genai", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_genai_cannot_generate_from_is_refused(
    captured: Callable[[str], Program], cached: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    with pytest.raises(LoweringError, match="this program has none of the plain kind"):
        captured("llama").lower("genai", place)
    tree = graphopt.optimize(captured("llama"), "insert-cache{tree=true}")
    with pytest.raises(LoweringError, match="none of the plain kind"):
        tree.lower("genai", place)
    dialled = graphopt.optimize(captured("llama"), "split-ffn{score=peak}, insert-cache")
    with pytest.raises(LoweringError, match="has no value for"):
        dialled.lower("genai", place)
    monkeypatch.setattr(genai_folder, "find_spec", lambda name: None)
    with pytest.raises(LoweringError, match="generates with onnxruntime-genai"):
        cached.lower("genai", place, check=True)
    assert cached.lower("genai", place).compared is None
    with pytest.raises(LoweringError, match="exists already"):
        cached.lower("genai", place)
