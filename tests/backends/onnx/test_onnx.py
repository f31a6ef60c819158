"""ONNX files: what they compute, what they are called, what is refused, and what a failure leaves."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import graphopt
from graphopt.backends.onnx import check as onnx_check
from graphopt.backends.onnx import cleanup as onnx_cleanup
from graphopt.backends.onnx import graph as onnx_graph
from graphopt.backends.onnx import lower as lowering
from graphopt.backends.onnx import model as onnx_model
from graphopt.backends.onnx.lower import OPSETS, lower_onnx
from graphopt.backends.onnx.sizes import static_sizes, with_sizes
from graphopt.frontends.torch_module import capture_module
from graphopt.ir.checking.verify import compare_programs
from graphopt.ir.errors import LoweringError
from graphopt.ir.program import Dial, Program
from graphopt.ir.running.examples import example_inputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
numpy = pytest.importorskip("numpy")

STATIC = {"batch": 1, "sequence": 8}
TEXT = ("llama", "bert", "gpt2", "olmoe")
_programs: dict[Any, Program] = {}


def text_program(name: str, dtype: torch.dtype = torch.float32) -> Program:
    """A model of the zoo, captured once."""
    if (name, dtype) not in _programs:
        model = zoo.make(name, dtype=dtype)
        if "experts" in zoo.CASES[name].blocks:
            model.set_experts_implementation("batched_mm")
        ids = torch.randint(5, 100, (3, 13))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _programs[name, dtype] = capture_module(model, inputs, compare=False)
    return _programs[name, dtype]


class Net(nn.Module):
    """Convolutions, each with a batch norm, and one batch norm on its own branch (as in RepVGG)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.norms[0](self.first(pixels)))
        hidden = torch.relu(self.norms[1](self.second(hidden)) + self.norms[2](hidden))
        return {"classes": self.head(hidden.mean((2, 3)))}


@pytest.fixture(scope="module")
def net() -> Program:
    torch.manual_seed(0)
    model = Net().eval()
    for norm in model.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return capture_module(model, {"pixels": torch.randn(2, 3, 8, 8)}, dynamic={"pixels": {0: "batch"}})


def run_file(path: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ONNX Runtime computes, apart from the comparison that lower_onnx makes itself."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {value.name: torch.from_numpy(r) for value, r in zip(session.get_outputs(), results, strict=True)}


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    return float(((result - expected).abs().max() / expected.abs().max()).detach())


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node}


# -- what files compute and are called --------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("opset", [20, 23])
def test_dynamic_text_model(name: str, opset: int, tmp_path: Path) -> None:
    """A failure: the file computes something else at some size, or is named after torch's nodes."""
    program = text_program(name)
    path = tmp_path / "model.onnx"
    report = lower_onnx(program, path, opset=opset)
    assert set(report.errors) == set(program.signature.output_names)
    assert all(0 <= error < 2e-6 for error in report.errors.values())
    assert report.inputs == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
    }
    first = program.signature.output_names[0]
    assert report.outputs[first][:2] == ("batch", "sequence")
    assert report.files == (path,)
    assert report.path.stat().st_size > report.initialiser_bytes > 0
    for batch, sequence in ((1, 1), (2, 17)):
        ids = torch.randint(0, 100, (batch, sequence))
        mask = torch.ones_like(ids)
        mask[0, : sequence // 3] = 0
        found = run_file(path, {"input_ids": ids, "attention_mask": mask})
        assert list(found) == program.signature.output_names
        expected = program(input_ids=ids, attention_mask=mask)[first]
        assert relative(found[first][mask.bool()], expected[mask.bool()]) < 2e-6


@pytest.mark.parametrize(("name", "opset"), [("llama", 23), *((name, 21) for name in TEXT)])
def test_static_text_model_has_no_shape_arithmetic(name: str, opset: int, tmp_path: Path) -> None:
    """A failure: the file has other sizes, or mask and shape arithmetic stays for devices to refuse."""
    program = text_program(name)
    path = tmp_path / "model.onnx"
    report = lower_onnx(program, path, opset=opset, sizes=STATIC)
    assert report.inputs == {"input_ids": (1, 8), "attention_mask": (1, 8)}
    assert all(isinstance(size, int) for shape in report.outputs.values() for size in shape)
    assert max(report.errors.values()) < 2e-6
    assert not operators(path) & {"Shape", "Range", "IsNaN", "Where", "Reciprocal", "Trilu", "NonZero", "And"}
    known = {value.name for value in onnx.load(str(path)).graph.value_info}
    graph = onnx.load(str(path)).graph
    made = {name for node in graph.node for name in node.output} - {value.name for value in graph.output}
    assert made <= known


@pytest.mark.parametrize("opset", [20, 23])
def test_what_saves_the_exporter_s_time_leaves_the_file_as_it_is(
    opset: int, captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure: a table or value that is kept is not what the exporter would have worked out again."""
    program = captured("gemma2")
    for name in ("first", "again"):
        lower_onnx(program, tmp_path / f"{name}.onnx", opset=opset)
    monkeypatch.setattr(onnx_graph, "quick_onnx_export", lambda *_: contextlib.nullcontext())
    lower_onnx(program, tmp_path / "slow.onnx", opset=opset)
    slow = (tmp_path / "slow.onnx").read_bytes()
    assert [(tmp_path / f"{name}.onnx").read_bytes() == slow for name in ("first", "again")] == [True] * 2


@pytest.mark.parametrize(
    "passes",
    ["insert-cache, fit-target", "fuse-kernels", "split-ffn{score=peak}", "attach-mask-tokens{masks=1 rank=2}",
     "attach-multi-token-heads{heads=2}, take-top-k{k=3}"],
)  # fmt: skip
def test_operators_without_translation_are_written_out(
    passes: str, captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure: one is left, for which the exporter decomposes the whole graph, or its meaning changed."""
    program = graphopt.optimize(captured("llama"), passes)
    before = dict(program.operators)
    made = onnx_graph.written_out(program, 23)
    assert program.operators == before, "the program itself was changed"
    known = {str(target) for target in onnx_graph.translation_table(23)}
    left = {str(n.target) for n in made.graph.nodes if str(n.target).startswith("graphopt.")}
    assert left and left <= known
    assert max(compare_programs(program, made, example_inputs(program)).values()) < 1e-6

    def decomposed(*_: Any, **__: Any) -> None:
        raise AssertionError("the exporter decomposed the graph")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", decomposed)
    assert max(program.lower("onnx", tmp_path / "m.onnx").errors.values()) < 2e-6


def test_opset_23_keeps_operators_whole(tmp_path: Path) -> None:
    """A failure: attention, norms or rotary embeddings are taken apart where ONNX has them."""
    report = lower_onnx(text_program("llama"), tmp_path / "a.onnx", opset=23, sizes=STATIC)
    assert report.nodes["Attention"] == 2
    assert report.nodes["RMSNormalization"] == 5
    assert report.nodes["RotaryEmbedding"] == 4
    older = lower_onnx(text_program("llama"), tmp_path / "b.onnx", opset=21, sizes=STATIC)
    assert not {"Attention", "RMSNormalization", "RotaryEmbedding"} & set(older.nodes)


def test_opset_23_takes_apart_what_onnx_defines_otherwise(tmp_path: Path) -> None:
    """A failure: sinks or softcap are lost in ONNX's Attention, which has no sinks and moved its softcap."""
    for name in ("gpt_oss", "gemma2"):
        report = lower_onnx(text_program(name), tmp_path / "a.onnx", opset=23, sizes=STATIC)
        assert "Attention" not in report.nodes
        assert max(report.errors.values()) < 2e-6


def test_attention_masks_are_numbers(tmp_path: Path) -> None:
    """A failure: a boolean mask reaches Attention, which compilers for accelerators leave on the CPU."""
    path = tmp_path / "a.onnx"
    lower_onnx(text_program("llama"), path, opset=23, sizes=STATIC)
    graph = onnx.load(str(path)).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    masks = [node.input[3] for node in graph.node if node.op_type == "Attention" and len(node.input) > 3]
    assert len(masks) == 2
    assert {kinds[name] for name in masks} == {onnx.TensorProto.FLOAT}
    assert len(set(masks)) == 1, "the layers share one mask"


@pytest.mark.parametrize("opset", OPSETS)
def test_convolutions_with_batch_norm(net: Program, opset: int, tmp_path: Path) -> None:
    """A failure: a batch norm is folded wrongly, or left beside the convolution that could hold it."""
    report = lower_onnx(net, tmp_path / "net.onnx", opset=opset)
    assert report.inputs == {"pixels": ("batch", 3, 8, 8)}
    assert report.outputs == {"classes": ("batch", 5)}
    assert report.errors["classes"] < 2e-6
    assert report.nodes["Conv"] == 2
    assert report.nodes["BatchNormalization"] == 1, "the one that follows no convolution"
    fixed = lower_onnx(net, tmp_path / "fixed.onnx", opset=opset, dynamic=False)
    assert fixed.inputs == {"pixels": (2, 3, 8, 8)}


def test_some_sizes_fixed(tmp_path: Path) -> None:
    """A failure: a size that was given stays dynamic, or one that was not is frozen."""
    report = lower_onnx(
        text_program("llama"), tmp_path / "a.onnx", sizes={"batch": 2}, dynamic=True, compare=False
    )
    assert report.inputs == {"input_ids": (2, "sequence"), "attention_mask": (2, "sequence")}


def test_dials_are_inputs(tmp_path: Path) -> None:
    """A failure: a setting chosen at run time is frozen in the file."""
    program = text_program("llama").copy()
    dial = program.add_dial("strength", Dial(0.5, 0.0, 1.0))
    logits = program.output_node.args[0][0]  # type: ignore[index]
    with program.edit.before(program.output_node):
        single = program.edit.call(torch.ops.aten.to.dtype, dial, torch.float32)
        scaled = program.edit.call(torch.ops.aten.mul.Tensor, logits, single)
    program.edit.set_outputs([scaled])
    path = tmp_path / "a.onnx"
    assert lower_onnx(program, path, sizes={"batch": 1, "sequence": 9}).inputs["strength"] == ()
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    found = run_file(path, inputs | {"strength": torch.tensor(0.25, dtype=torch.float64)})
    assert relative(found["logits"], program(**inputs, strength=0.25)["logits"]) < 2e-6


def test_bfloat16_is_written_as_float32(tmp_path: Path) -> None:
    """A failure: types that ONNX Runtime's CPU has no kernels for are in the file, or weights changed."""
    program = text_program("llama", torch.bfloat16)
    path = tmp_path / "a.onnx"
    report = lower_onnx(program, path, opset=23, sizes=STATIC)
    assert report.errors["logits"] < 2e-6
    graph = onnx.load(str(path)).graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    assert onnx.TensorProto.BFLOAT16 not in kinds
    written = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}["model.embed_tokens.weight"]
    kept = program.weights[program.weight_node("model.embed_tokens.weight").name].source.load()
    assert kept.dtype == torch.bfloat16
    assert torch.equal(torch.from_numpy(written.copy()), kept.float())
    with pytest.raises(LoweringError, match="ONNX Runtime does not load"):
        lower_onnx(program, tmp_path / "b.onnx", float32=False, sizes=STATIC)


def test_float16_stays(tmp_path: Path) -> None:
    """A failure: tables of another type than the hidden states are shared or cast wrongly."""
    report = lower_onnx(text_program("llama", torch.float16), tmp_path / "a.onnx", opset=23, sizes=STATIC)
    assert report.nodes["RotaryEmbedding"] == 4
    assert report.errors["logits"] < 5e-3


def test_the_program_is_not_changed(tmp_path: Path) -> None:
    """A failure: what the exporter guards on sizes leaks into the program, and its sizes merge."""
    program = text_program("llama")

    def sizes() -> list[list[int | str]]:
        values = [node.meta["val"] for node in program.nodes if "val" in node.meta]
        return [[program.size_text(s) for s in v.shape] for v in values if isinstance(v, torch.Tensor)]

    before = sizes()
    lower_onnx(program, tmp_path / "a.onnx", compare=False)
    assert sizes() == before


def test_sizes_become_numbers() -> None:
    """A failure: the copy with fixed sizes computes another function, or still computes sizes."""
    program = text_program("gpt2")
    fixed = with_sizes(program, static_sizes(program, {"batch": 2, "sequence": 6}))
    assert fixed.signature.inputs["input_ids"].shape == (2, 6)
    assert "aten.sym_size" not in fixed.operators
    ids = torch.randint(0, 100, (2, 6))
    mask = torch.ones_like(ids)
    expected = program(input_ids=ids, attention_mask=mask)["logits"]
    assert torch.equal(fixed(input_ids=ids, attention_mask=mask)["logits"], expected)


# -- graphopt's operators one by one ----------------------------------------------------------------


class Attend(nn.Module):
    """One attention with the options given, over more keys than queries if ``longer``."""

    def __init__(self, inputs: set[str], heads: int = 4, longer: bool = False, **options: Any):
        super().__init__()
        self.inputs, self.longer, self.options = inputs, longer, {"scale": 0.3, **options}
        self.sinks = nn.Parameter(torch.randn(heads))
        self.slopes = nn.Parameter(torch.randn(heads, 1, 1))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor,
        segments: torch.Tensor,
    ) -> torch.Tensor:
        bias = self.slopes * torch.arange(k.shape[2], dtype=torch.float32)
        return torch.ops.graphopt.attention(  # type: ignore[no-any-return]
            q,
            k,
            v,
            key_mask if "key_mask" in self.inputs else None,
            bias if "bias" in self.inputs else None,
            self.sinks if "sinks" in self.inputs else None,
            segments if "segments" in self.inputs else None,
            **self.options,
        )


ATTENTIONS = {
    "plain": Attend(set()),
    "causal": Attend(set(), causal=True),
    "causal_longer": Attend(set(), causal=True, longer=True),
    "window": Attend({"key_mask"}, causal=True, window=3, longer=True),
    "window_both_ways": Attend(set(), window=3),
    "bias": Attend({"bias", "key_mask"}, causal=True),
    "bias_alone": Attend({"bias"}),
    "segments": Attend({"segments"}, causal=True),
    "segments_longer": Attend({"segments", "key_mask"}, longer=True),
    "everything_masked": Attend({"segments", "key_mask"}, causal=True, window=4),
    "sinks": Attend({"sinks", "key_mask"}, causal=True),
    "softcap": Attend({"key_mask", "bias"}, softcap=2.0),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_options(name: str, tmp_path: Path) -> None:
    """A failure: an option of attention is lost or means something else in ONNX, static or dynamic."""
    model = ATTENTIONS[name]
    more = 3 if model.longer else 0
    keys = "keys" if model.longer else "sequence"

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, length + more, dtype=torch.bool)
        mask[-1, 1] = False
        return {
            "q": torch.randn(batch, 4, length, 6),
            "k": torch.randn(batch, 2, length + more, 6),
            "v": torch.randn(batch, 2, length + more, 5),
            "key_mask": mask,
            "segments": (torch.arange(length + more) // 4).expand(batch, -1).contiguous(),
        }

    axes = {"q": {0: "batch", 2: "sequence"}, "k": {0: "batch", 2: keys}, "v": {0: "batch", 2: keys}}
    masks = {name: {0: "batch", 1: keys} for name in ("key_mask", "segments")}
    example, other = inputs(3, 7), inputs(2, 11)
    program = capture_module(model, example, dynamic=axes | masks, compare=False)
    assert program.operators["graphopt.attention"] == 1
    path = tmp_path / "a.onnx"
    # what is shared by the opsets is tried dynamic at one and static at the other
    for opset, dynamic in ((23, True), (20, False)):
        report = lower_onnx(program, path, opset=opset, dynamic=dynamic, compare=False)
        fused = opset == 23 and name not in ("sinks", "softcap")
        assert report.nodes.get("Attention", 0) == fused
        for values in (example, other) if dynamic else (example,):
            feed = {n: v for n, v in values.items() if n in report.inputs}
            found = next(iter(run_file(path, feed).values()))
            assert relative(found, model(**values)) < 1e-5


@pytest.mark.parametrize("name", ["modernbert", "bloom", "nemotron"])
def test_other_families(name: str, tmp_path: Path) -> None:
    """A failure: windows, ALiBi, or an operator that only the exporter's decomposition knows, is wrong."""
    report = lower_onnx(text_program(name), tmp_path / "a.onnx", opset=23)
    assert max(report.errors.values()) < 2e-6


# -- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "olmoe"])
def test_external_data_of_weights_read_late(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure: weights beside the file are lost, transposed twice, or a tied one is stored twice."""
    monkeypatch.setattr(onnx_cleanup, "EAGER_BYTES", 0)
    path = tmp_path / "model.onnx"
    report = lower_onnx(text_program(name), path, external_data=True, sizes=STATIC)
    beside = tmp_path / "model.onnx.data"
    assert report.files == (path, beside)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < beside.stat().st_size <= report.initialiser_bytes
    assert max(report.errors.values()) < 2e-6
    names = [tensor.name for tensor in onnx.load(str(path)).graph.initializer]
    assert "model.layers.1.self_attn.o_proj.weight" in names
    assert names.count("model.embed_tokens.weight") == 1
    assert ("lm_head.weight" in names) == (name != "llama_tied")


def test_no_provenance_in_the_file(tmp_path: Path) -> None:
    """A failure: paths and source lines of the machine that wrote the file are in it."""
    path = tmp_path / "a.onnx"
    lower_onnx(text_program("bert"), path, sizes=STATIC, compare=False)
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert b"stack_trace" not in content
    assert b"pkg.torch" not in content


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 18, 22, 26])
def test_other_opsets_are_refused(opset: int, tmp_path: Path) -> None:
    """A failure: an opset that the exporter silently writes as another, or as an invalid file."""
    with pytest.raises(LoweringError, match=f"opset {opset} is not supported"):
        lower_onnx(text_program("llama"), tmp_path / "a.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    """A failure: a misspelt size or target is ignored, or a size that the program refuses is written."""
    program = text_program("llama")
    path = tmp_path / "a.onnx"
    with pytest.raises(LoweringError, match="no size 'length'"):
        lower_onnx(program, path, sizes={"length": 8})
    with pytest.raises(LoweringError, match="batch cannot be 0"):
        lower_onnx(program, path, sizes={"batch": 0})
    with pytest.raises(LoweringError, match="there is no target"):
        lower_onnx(program, path, target="toaster")
    with pytest.raises(LoweringError, match="does not exist"):
        lower_onnx(program, tmp_path / "nowhere" / "a.onnx")
    with pytest.raises(LoweringError, match="is a folder"):
        lower_onnx(program, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    """A failure: the user gets the exporter's pages of advice instead of the operator's name."""

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = capture_module(Odd(), {"x": torch.randn(2, 3)}, dynamic=None)
    with pytest.raises(LoweringError, match="bessel_j0"):
        lower_onnx(program, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure: a bare ImportError, or ONNX Runtime asked for where nothing is compared."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LoweringError, match=r"graphopt\[onnx\]"):
        lower_onnx(text_program("llama"), tmp_path / "a.onnx")
    if package == "onnxruntime":
        report = lower_onnx(text_program("llama"), tmp_path / "a.onnx", sizes=STATIC, compare=False)
        assert report.errors == {}


def test_importing_asks_for_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure: graphopt cannot be imported where onnx is not installed."""
    for package in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in [n for n in sys.modules if n.startswith("graphopt.backends.onnx.lower")]:
        # the package has the module as an attribute too, which comes back as the old one
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], child, sys.modules[name])
        monkeypatch.delitem(sys.modules, name)
        importlib.import_module(name)


# -- nothing half written ---------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("failure", "older"),
    [("compare", False), ("check", True), ("interrupt", True), ("move", False), ("move", True)],
)
def test_a_failure_leaves_what_was_there(
    failure: str, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure: a file that was not checked, a lost older one, or a temporary folder is left behind."""
    path = tmp_path / "model.onnx"
    if older:
        path.write_bytes(b"older model")
        (tmp_path / "model.onnx.data").write_bytes(b"older weights")
    before = _files(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt if failure == "interrupt" else LoweringError("planted")

    expected: type[BaseException] = KeyboardInterrupt if failure == "interrupt" else LoweringError
    if failure == "check":
        monkeypatch.setattr(onnx_model, "check_file", fail)
    elif failure == "move":
        real = lowering.os.replace

        def replace(source: Any, target: Any) -> None:
            # the data are in place by now, the model is not
            if Path(target) == path and Path(source).parent.name != "older":
                raise LoweringError("planted")
            real(source, target)

        monkeypatch.setattr(lowering.os, "replace", replace)
    else:
        monkeypatch.setattr(onnx_model, "compare_with_runtime", fail)
    with pytest.raises(expected):
        lower_onnx(text_program("llama"), path, external_data=True, sizes=STATIC)
    assert _files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_an_older_file_is_replaced_on_success(tmp_path: Path) -> None:
    """A failure: lowering twice to one name keeps the first file, or mixes the two."""
    path = tmp_path / "model.onnx"
    lower_onnx(text_program("llama"), path, external_data=True, sizes=STATIC, compare=False)
    report = lower_onnx(text_program("bert"), path, external_data=True, sizes=STATIC)
    assert set(report.errors) == {"last_hidden_state", "pooler_output"}
    assert {value.name for value in onnx.load(str(path)).graph.output} == set(report.errors)


def test_a_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure: a file with other weights than the program's passes for compared."""
    real = onnx_model.build_graph

    def changed(program: Program, opset: int, *rest: Any) -> Any:
        graph = real(program, opset, *rest)
        held = graph.graph.initializers["model.norm.weight"]
        array = held.const_value.numpy().copy()
        array[3] *= 1.01
        import onnx_ir

        held.const_value = onnx_ir.tensor(array, name=held.name)
        return graph

    monkeypatch.setattr(onnx_model, "build_graph", changed)
    with pytest.raises(LoweringError, match=r"logits: \d\.\d+e-0\d on inputs of batch 1, sequence 8"):
        lower_onnx(text_program("llama"), tmp_path / "a.onnx", sizes=STATIC)
    assert list(tmp_path.iterdir()) == []
    lower_onnx(text_program("llama"), tmp_path / "a.onnx", sizes=STATIC, tolerance=0.1)


# -- the check itself -------------------------------------------------------------------------------


def test_planted_faults_are_caught(tmp_path: Path) -> None:
    """A failure: the re-reading that everything above relies on would pass a wrong file."""
    path = tmp_path / "a.onnx"
    lower_onnx(text_program("llama"), path, opset=23, sizes=STATIC, compare=False)
    onnx_check.check_file(path, 23)

    def planted(change: Any) -> Path:
        model = onnx.load(str(path))
        change(model)
        onnx.save(model, str(tmp_path / "planted.onnx"))
        return tmp_path / "planted.onnx"

    def header(model: Any) -> None:
        model.opset_import[0].version = 18

    def second_domain(model: Any) -> None:
        model.opset_import.add(domain="com.microsoft", version=1)

    def contributed(model: Any) -> None:
        model.graph.node[0].domain = "com.microsoft"

    def function(model: Any) -> None:
        node = onnx.helper.make_node("Relu", ["x"], ["y"])
        imports = [onnx.helper.make_opsetid("", 23)]
        model.functions.append(onnx.helper.make_function("local", "F", ["x"], ["y"], [node], imports))

    def shape(model: Any) -> None:
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 7

    with pytest.raises(LoweringError, match=r"opset 23 was asked for, and the file states ai\.onnx 18"):
        onnx_check.check_file(planted(header), 23)
    with pytest.raises(LoweringError, match="checker refuses"):
        # the header as asked for, over operators that this opset does not have
        onnx_check.check_file(planted(header), 18)
    with pytest.raises(LoweringError, match=r"com\.microsoft 1"):
        onnx_check.check_file(planted(second_domain), 23)
    with pytest.raises(LoweringError, match=r"com\.microsoft\.\w+ is not an operator"):
        onnx_check.check_file(planted(contributed), 23)
    with pytest.raises(LoweringError, match="functions are left"):
        onnx_check.check_file(planted(function), 23)
    with pytest.raises(LoweringError, match="checker refuses"):
        onnx_check.check_file(planted(shape), 23)
    (tmp_path / "planted.onnx").write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoweringError, match="read back"):
        onnx_check.check_file(tmp_path / "planted.onnx", 23)
