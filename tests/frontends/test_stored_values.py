"""What the files of a checkpoint say and its configuration does not: two matrices where it ties, scales, null."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import graphopt
from graphopt.frontends import compare_checkpoint, stored_values
from graphopt.frontends.huggingface import capture_huggingface
from graphopt.ir.errors import CheckpointError
from graphopt.ir.storage.safetensors_file import read_header


def changed(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def rewritten(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """A folder whose configuration ties and whose file holds two matrices."""
    zoo.make("llama").save_pretrained(tmp_path / "untied")
    return changed(tmp_path / "untied", tie_word_embeddings=True)


@pytest.mark.parametrize("large", [False, True])
def test_two_matrices_stay_two_where_the_configuration_ties_them(
    large: bool, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the library. Wrong for large files if ties are taken from the configuration, which is all that is compared."""
    if large:
        monkeypatch.setattr(compare_checkpoint, "memory_available", lambda: 0)
    program = graphopt.capture(untied)
    model = transformers.LlamaForCausalLM.from_pretrained(untied).eval()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.allclose(program(input_ids=ids)["logits"], expected, atol=1e-5)
    graphopt.optimize(program, "skip-layers{layers=[1]}").save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(written["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_one_matrix_stored_twice_is_one(untied: Path) -> None:
    rewritten(untied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    program = graphopt.capture(untied)
    tables = [w for w in program.weights.values() if tuple(w.source.shape) == (101, 32)]
    assert len(tables) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(-1, 44), st.integers(1, 200))
def test_stored_tensors_are_compared_in_parts(rows: int, columns: int, place: int, part: int) -> None:
    import tempfile

    one = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    other = one.clone()
    if 0 <= place < other.numel():
        other.view(-1)[place] += 1
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_values, "_PART", part)
        save_file({"one": one, "other": other}, f"{folder}/x.safetensors")
        held = read_header(Path(folder) / "x.safetensors")
        assert stored_values.equal(held["one"], held["other"]) == torch.equal(one, other)


def test_a_quantisation_that_is_null_is_none(tmp_path: Path) -> None:
    zoo.make("llama").save_pretrained(tmp_path / "in")
    program = graphopt.capture(changed(tmp_path / "in", quantization_config=None))
    assert program.anatomy.layers
    with pytest.raises(CheckpointError, match="quantised"):
        graphopt.capture(changed(tmp_path / "in", quantization_config={"quant_method": "fp8"}))


KEY = "model.layers.1.mlp.down_proj"


def _eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.weight"] = tensors[f"{KEY}.weight"].to(torch.float8_e4m3fn)


def _scaled(name: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{KEY}.{name}"] = torch.ones(1)

    return change


def _packed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.weight"] = (tensors[f"{KEY}.weight"] * 100).to(torch.int8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_eight_bits, "stored in float8_e4m3fn"),
        (_packed, "stored in integers"),
        (_scaled("weight_scale_inv"), "is stored beside"),
        (_scaled("weight_scale"), "is stored beside"),
        (_scaled("scales"), "is stored beside"),
        (_scaled("weight.absmax"), "is stored beside"),
    ],
)
def test_numbers_that_stand_for_others_are_refused(change: Any, reason: str, tmp_path: Path) -> None:
    zoo.make("llama").save_pretrained(tmp_path / "in")
    with pytest.raises(CheckpointError, match=reason):
        capture_huggingface(rewritten(tmp_path / "in", change), compare=False)


def test_numbers_of_experts_in_eight_bits_are_refused(tmp_path: Path) -> None:
    zoo.make("mixtral").save_pretrained(tmp_path / "in")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = next(k for k in tensors if "experts" in k)
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    with pytest.raises(CheckpointError, match="stored in float8_e4m3fn"):
        capture_huggingface(rewritten(tmp_path / "in", change), compare=False)


def test_what_nothing_reads_is_no_scale(tmp_path: Path) -> None:
    """A tensor that belongs to no weight is left out, as the library does."""
    zoo.make("llama").save_pretrained(tmp_path / "in")
    rewritten(
        tmp_path / "in",
        lambda t: t.update({"extra.head.weight": torch.ones(2), "vision.scale": torch.ones(1)}),
    )
    program = capture_huggingface(tmp_path / "in", compare=False)
    assert set(program.origin.unused) == {"extra.head.weight", "vision.scale"}
