"""Quantised folders: values bit for bit, a layer skipped, written back in the same layout, read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from amounts import cases
from quantised_folders import BESIDE, FORMATS, mxfp4_folder, quantise_folder, weight_file
from safetensors.torch import load_file

import graphopt
from graphopt.formats.registry import write_quantised
from graphopt.frontends.checkpoint_files import read_folder
from graphopt.frontends.quantised import dequantised
from graphopt.ir.quantised.stored import is_quantised


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16, layers: int = 3) -> None:
    """Save a small Llama."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_layout_and_leave_as_they_came(name: str, tmp_path: Path) -> None:
    llama(tmp_path, torch.float16 if name.startswith(("gptq", "awq")) else torch.bfloat16)
    values = quantise_folder(tmp_path, name)
    files = dequantised(read_folder(tmp_path))
    assert set(values) <= set(files.tensors)
    for key, value in values.items():
        source = files.tensors[key]
        assert is_quantised(source) and source.shape == tuple(value.shape) and source.dtype == value.dtype
        assert torch.equal(source.load(), value), key
    before = load_file(weight_file(tmp_path))
    for key in values:
        source = files.tensors[key]
        # also where nothing moved: these are what moved matrices are written as
        for part, value in source.layout.write(source.quantised()).items():
            stored = before[key.removesuffix("weight") + part]
            if name == "nf4-double" and part.endswith(("absmax", "nf4")):
                continue
            assert value.shape == stored.shape and value.dtype == stored.dtype, (key, part)
            assert torch.equal(_bytes(value), _bytes(stored)), (key, part)
    written = write_quantised(files.config["quantization_config"], files.tensors)
    assert written.settings == FORMATS[name][0] and not written.plain and set(written.kept) == set(values)
    assert set(written.tensors) == set(before)
    for key, source in written.tensors.items():
        assert source.shape == tuple(before[key].shape) and source.dtype == before[key].dtype
        assert torch.equal(_bytes(source.load()), _bytes(before[key])), key


def test_a_mixture_of_quantised_experts_loses_some(tmp_path: Path) -> None:
    """Matrices of experts each with scales of their own, which the program holds as one stack."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    values = quantise_folder(tmp_path / "in", "pack-4-asymmetric")
    before = load_file(tmp_path / "in" / "model.safetensors")
    program = graphopt.capture(tmp_path / "in")
    done = graphopt.optimize(program, "prune-experts{keep=3 score=random}")
    left = [s["left"] for s in done.history[-1]["plan"]["sites"]]
    report = done.save_pretrained(tmp_path / "out", check="streamed")
    assert not report.plain and len(report.quantised) == 2 * (4 + 3 * 3)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in after.items():
        layer, _, expert = key.removeprefix("model.layers.").partition(".mlp.experts.")
        number, _, rest = expert.partition(".")
        old = f"model.layers.{layer}.mlp.experts.{left[int(layer)][int(number)]}.{rest}" if rest else key
        if not key.endswith("mlp.gate.weight"):
            assert torch.equal(_bytes(value), _bytes(before[old])), key
    assert len(values) == 2 * (4 + 3 * 4)


def test_experts_in_four_bit_floats(tmp_path: Path) -> None:
    """GPT-OSS as it is published: stacks of experts, transposed, in blocks of 32 with powers of two."""
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        sliding_window=8, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    values = mxfp4_folder(tmp_path / "in")
    before = load_file(tmp_path / "in" / "model.safetensors")
    program = graphopt.capture(tmp_path / "in")
    for key, value in values.items():
        assert torch.equal(program.weights[program.checkpoint[key].name].source.load(), value), key
    report = graphopt.optimize(program, "skip-layers{layers=[1]}").save_pretrained(
        tmp_path / "out", check="streamed"
    )
    assert not report.plain and len(report.quantised) == 4
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert len(after) == len(before) * 2 // 3 + 1
    for key, value in after.items():
        assert torch.equal(_bytes(value), _bytes(before[key.replace("layers.1.", "layers.2.")])), key
    # moved, not as they were read
    pruned = graphopt.optimize(program, "prune-experts{keep=3 score=random}")
    left = [s["left"] for s in pruned.history[-1]["plan"]["sites"]]
    pruned.save_pretrained(tmp_path / "few", check="streamed")
    after = load_file(tmp_path / "few" / "model.safetensors")
    for layer, experts in enumerate(left):
        for name in ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            assert torch.equal(after[key], before[key][list(experts)]), key


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


FIRST = ["pack-4-asymmetric", "gptq-old", "fp8-power-scales", "torchao-int4", "nf4-double", "modelopt-nvfp4"]


def test_matrices_made_plain_are_named_where_the_others_stay(tmp_path: Path) -> None:
    """Wrong if a library looked for codes of a matrix that has none any more."""
    llama(tmp_path / "in", layers=2)
    quantise_folder(tmp_path / "in", "pack-4")
    program = graphopt.capture(tmp_path / "in", compare=False)
    partly = graphopt.optimize(program, passes=["dequantize-weights{skip=[layers.1]}"])
    report = partly.save_pretrained(tmp_path / "out")
    assert len(report.quantised) == 7
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {n for n in ignored if "layers.0" in n} == {
        k.removesuffix(".weight") for k in program.checkpoint if "layers.0" in k and "_proj" in k
    }
    assert not any("layers.1" in n for n in ignored)
    again = graphopt.capture(tmp_path / "out", compare=False)
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(again(input_ids=tokens)["logits"], program(input_ids=tokens)["logits"])


@pytest.mark.parametrize(
    "name",
    cases(
        FIRST,
        sorted({*FORMATS} - {*FIRST}),
    ),
)
def test_a_layer_skipped_written_and_read_again(name: str, tmp_path: Path) -> None:
    half = name.startswith(("gptq", "awq"))
    llama(tmp_path / "in", torch.float16 if half else torch.bfloat16)
    values = quantise_folder(tmp_path / "in", name)
    before = load_file(weight_file(tmp_path / "in"))
    program = graphopt.capture(tmp_path / "in")
    assert any("quantised with" in note for note in program.origin.notes)
    for key, value in values.items():
        assert torch.equal(program.weights[program.checkpoint[key].name].source.load(), value), key
    shorter = graphopt.optimize(program, passes=["skip-layers{layers=[1]}"])
    report = shorter.save_pretrained(tmp_path / "out")
    assert not report.plain and len(report.quantised) == 14
    after = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in after.items():
        old = key.replace("layers.1.", "layers.2.")
        assert value.dtype == before[old].dtype and torch.equal(_bytes(value), _bytes(before[old])), key
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written == FORMATS[name][0]
    if name in BESIDE:
        beside = json.loads((tmp_path / "out" / BESIDE[name]).read_text())
        assert {**beside, "quant_method": written["quant_method"]} == written
    again = graphopt.capture(tmp_path / "out")
    tokens = torch.randint(128, (2, 7))
    mask = torch.ones_like(tokens)
    a, b = (p(input_ids=tokens, attention_mask=mask)["logits"] for p in (shorter, again))
    assert torch.equal(a, b)
