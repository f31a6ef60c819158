"""Quantised folders that are damaged or contradict themselves: errors that name the file and the tensor, no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_folders import FORMATS, configure, quantise_folder, weight_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphopt.formats.registry import open_quantised
from graphopt.frontends.checkpoint_files import read_folder
from graphopt.frontends.quantised import dequantised
from graphopt.ir.errors import CheckpointError

Damage = Callable[[dict[str, Tensor]], Any]
MODULE = "model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one matrix that is quantised, and one that is not; no model is made."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    tensors = {
        MODULE + "weight": torch.randn(64, 64).bfloat16(),
        "lm_head.weight": torch.randn(32, 64).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    return folder


def without(name: str) -> Damage:
    return lambda parts: parts.pop(name)


def put(name: str, value: Callable[[Tensor], Tensor]) -> Damage:
    return lambda parts: parts.update({name: value(parts[name])})


def state(**changes: Any) -> Damage:
    name = "weight.quant_state.bitsandbytes__nf4"

    def damage(parts: dict[str, Tensor]) -> None:
        said = json.loads(bytes(parts[name].tolist())) | changes
        parts[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return damage


def nan(value: Tensor) -> Tensor:
    damaged = value.float().clone()
    damaged.flatten()[0] = float("nan")
    return damaged.to(value.dtype)


def longer(value: Tensor) -> Tensor:
    return torch.cat([value, value[:1]])


def a_float(value: Tensor) -> Tensor:
    return value.float()


def integers(value: Tensor) -> Tensor:
    return value.float().to(torch.int32)


def zeros(value: Tensor) -> Tensor:
    return torch.zeros_like(value)


DAMAGES: dict[str, dict[str, tuple[Damage, str]]] = {
    "pack-4": {
        "no scale": (without("weight_scale"), "nothing that goes with it"),
        "no codes": (without("weight_packed"), "nothing that goes with it"),
        "no shape": (without("weight_shape"), "weight_shape is missing"),
        "codes too long": (put("weight_packed", longer), "weight_packed has the shape"),
        "scales too long": (put("weight_scale", longer), "weight_scale has the shape"),
        "scale not a number": (put("weight_scale", nan), "not finite"),
        "scales of zero": (put("weight_scale", zeros), "scales of 0"),
        "scales of integers": (put("weight_scale", integers), "weight_scale has the type int32"),
        "codes of floats": (put("weight_packed", a_float), "weight_packed has the type float32"),
        "shape of floats": (put("weight_shape", a_float), "weight_shape has the type float32"),
        "negative shape": (put("weight_shape", lambda s: -s), "weight_shape says"),
        "huge shape": (put("weight_shape", lambda s: s * 2**50), "weight_packed has the shape"),
        "odd shape": (put("weight_shape", lambda s: s - 1), "groups of 32 do not divide 63"),
        "shape of three": (put("weight_shape", longer), "no pair of numbers"),
    },
    "pack-4-asymmetric": {"no zeros": (without("weight_zero_point"), "it has no weight_zero_point")},
    "int8": {
        "no scale": (without("weight_scale"), ""),
        "codes of words": (put("weight", integers), "type torch.int32"),
        "scales too long": (put("weight_scale", longer), "weight_scale has the shape"),
    },
    "nvfp4": {
        "two global scales": (put("weight_global_scale", longer), "one number"),
        "global scale of zero": (put("weight_global_scale", zeros), "not finite"),
        "scales of floats": (put("weight_scale", a_float), "weight_scale has the type float32"),
    },
    "gptq": {
        "no codes": (without("qweight"), "no qweight"),
        "no scales": (without("scales"), "it has no scales"),
        "no zeros": (without("qzeros"), "it has no qzeros"),
        "a group beyond": (put("g_idx", lambda g: g + 1), "g_idx names groups beyond"),
        "a group below": (put("g_idx", lambda g: g - 1), "g_idx names groups beyond"),
        "groups of floats": (put("g_idx", a_float), "g_idx has the type float32"),
        "groups too long": (put("g_idx", longer), "g_idx has the shape"),
        "codes of floats": (put("qweight", a_float), "no qweight"),
        "zeros of floats": (put("qzeros", a_float), "zeros lie in words"),
        "scale not a number": (put("scales", nan), "not finite"),
        "scales of zero": (put("scales", zeros), "scales of 0"),
    },
    "awq": {
        "scales too long": (put("scales", longer), "scales has the shape"),
        "codes too short": (put("qweight", lambda q: q[:-1]), "groups of 32 do not divide 63"),
    },
    "fp8": {
        "no scale": (without("weight_scale_inv"), "no weight_scale_inv"),
        "no codes": (without("weight"), "no matrix of eight-bit floats"),
        "scales too long": (put("weight_scale_inv", longer), "weight_scale_inv has the shape"),
        "scale not a number": (put("weight_scale_inv", nan), "not finite"),
        "scales of integers": (put("weight_scale_inv", integers), "weight_scale_inv has the type int32"),
        "codes of integers": (put("weight", integers), "no matrix of eight-bit floats"),
    },
    "torchao-int4": {
        "no codes": (without("_weight_qdata"), "it has no _weight_qdata"),
        "no zeros": (without("_weight_zero_point"), "it has no _weight_zero_point"),
        "scales too long": (put("_weight_scale", longer), "_weight_scale has the shape"),
        "codes of words": (put("_weight_qdata", integers), "_weight_qdata has the type int32"),
        "scale not a number": (put("_weight_scale", nan), "not finite"),
    },
    "nf4": {
        "no scales": (without("weight.absmax"), "it has no weight.absmax"),
        "no codes": (without("weight"), "it has no weight"),
        "no state": (without("weight.quant_state.bitsandbytes__nf4"), "other parts are missing"),
        "short table": (put("weight.quant_map", lambda m: m[:15]), "weight.quant_map has the shape"),
        "scale not a number": (put("weight.absmax", nan), "not finite"),
        "huge shape": (state(shape=[2**39, 2**39]), "weight has the shape"),
        "negative shape": (state(shape=[-64, -64]), "says"),
        "shape of words": (state(shape="ab"), "says"),
        "no type": (state(dtype="load"), "says"),
        "no such type": (state(dtype="float3"), "does not say"),
        "block of nothing": (state(blocksize=0), "says"),
        "no text": (put("weight.quant_state.bitsandbytes__nf4", lambda t: t[:9]), "does not say"),
        "text of floats": (put("weight.quant_state.bitsandbytes__nf4", a_float), "no text of JSON"),
    },
    "nf4-double": {
        "no outer scales": (without("weight.nested_absmax"), "it has no weight.nested_absmax"),
        "huge outer blocks": (state(nested_blocksize=2**39), ""),
        "short outer table": (put("weight.nested_quant_map", lambda m: m[:9]), "weight.nested_quant_map has the shape"),
        "plain scales": (put("weight.absmax", a_float), "weight.absmax has the type float32"),
    },
    "llm-int8": {
        "scales too long": (put("SCB", longer), "SCB has the shape"),
        "codes of floats": (put("weight", a_float), "no matrix of integers"),
        "another order": (put("weight_format", lambda f: f + 1), "one kind of GPU"),
        "scale not a number": (put("SCB", nan), "not finite"),
    },
    "modelopt-float8": {
        "no scale": (without("weight_scale"), "no weight_scale"),
        "two scales": (put("weight_scale", lambda s: s.repeat(2)), "must be one number"),
        "scale of integers": (put("weight_scale", integers), "weight_scale has the type int32"),
        "four-bit floats": (put("weight", lambda w: w.view(torch.uint8)), "no matrix of FP8"),
    },
    "modelopt-nvfp4": {
        "no common scale": (without("weight_scale_2"), "must be one number"),
        "scales too long": (put("weight_scale", longer), "weight_scale has the shape"),
        "odd codes": (put("weight", lambda w: w[:, :-1].contiguous()), "do not divide 62"),
        "inputs multiplied": (lambda parts: parts.update(pre_quant_scale=torch.ones(64)), "pre_quant_scale"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "label"), [(n, d) for n, damages in DAMAGES.items() for d in damages])
def test_damaged_matrices_are_named(name: str, label: str, plain: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name][label]
    folder = tmp_path / "damaged"
    shutil.copytree(plain, folder)
    quantise_folder(folder, name, change=lambda module, parts: damage(parts))
    try:
        files = dequantised(read_folder(folder))
        for source in files.tensors.values():
            source.load()
    except CheckpointError as error:
        assert message in str(error), str(error)
        assert str(folder) in str(error) and MODULE.rstrip(".") in str(error), str(error)
    else:
        # what is left is a plain tensor beside nothing, or means the same
        assert not message


def test_headers_of_torchao_that_say_something_else(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(plain, folder)
    quantise_folder(folder, "torchao-int4")
    file = weight_file(folder)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    said = json.loads(header[MODULE + "weight"])
    changes: list[tuple[Any, str]] = [
        (said | {"_type": "Int4TilePackedTo4dTensor"}, "Int4TilePackedTo4dTensor"),
        (said | {"_type": 7}, "which is not read"),
        (said | {"_data": []}, "the header has"),
        (said | {"_tensor_data_names": ["qdata"]}, "the header has"),
        (said | {"_tensor_data_names": [["qdata"]]}, "the header has"),
        (said | {"_data": said["_data"] | {"block_size": [1, 48]}}, "do not divide"),
        (said | {"_data": said["_data"] | {"block_size": [1, 0]}}, "do not divide"),
        (said | {"_data": said["_data"] | {"block_size": [2**70, 32]}}, "do not divide"),
        (said | {"_data": said["_data"] | {"target_dtype": "int4"}}, "codes are said to be"),
        ({"_type": "Tensor"}, "the file's header says nothing"),
    ]
    for change, message in changes:
        save_file(load_file(file), file, metadata=header | {MODULE + "weight": json.dumps(change)})
        with pytest.raises(CheckpointError) as caught:
            dequantised(read_folder(folder))
        assert message in str(caught.value) and str(folder) in str(caught.value)


WRONG: list[Any] = [
    None,
    [],
    {},
    "x",
    -1,
    0,
    3,
    48,
    2**70,
    True,
    [1],
    ["x"],
    {"a": 1},
    [[1, 2]],
    [-1, 5],
    1.5,
]


@pytest.mark.parametrize("name", ["pack-4", "gptq", "awq", "fp8", "torchao-int8", "nf4", "modelopt-nvfp4"])
def test_settings_of_any_kind(name: str, plain: Path, tmp_path: Path) -> None:
    """Nothing but an error that names config.json comes of settings of other types, or the matrix is read."""
    folder = tmp_path / "damaged"
    shutil.copytree(plain, folder)
    quantise_folder(folder, name)
    files = read_folder(folder)
    settings = FORMATS[name][0]
    tried = 0

    def variants(value: Any) -> list[Any]:
        made = list(WRONG)
        if isinstance(value, dict):
            for key, inner in value.items():
                made += [value | {key: other} for other in variants(inner)]
                made.append({k: v for k, v in value.items() if k != key})
        return made

    for variant in variants(settings):
        config = files.config | {"quantization_config": variant}
        try:
            found = dequantised(replace(files, config=config)).tensors
            found[MODULE + "weight"].load() if MODULE + "weight" in found else None
        except CheckpointError as error:
            assert str(folder) in str(error), str(error)
        tried += 1
    assert tried > 40


def test_methods_that_are_not_known_are_named(plain: Path, tmp_path: Path) -> None:
    tensors = read_folder(plain).tensors
    for settings, words in (
        ({"quant_method": "aqlm"}, ["aqlm"]),
        ({"quant_method": "quark", "version": "0.9"}, ["quark", "0.9"]),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, ["gemv", "AutoAWQ"]),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, ["3"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, ["marlin"]),
        (
            {
                "quant_method": "modelopt",
                "producer": {"version": "0.33"},
                "quantization": {"quant_algo": "W4A8_AWQ"},
            },
            ["0.33", "W4A8_AWQ", "vLLM"],
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            open_quantised(settings, tensors, torch.bfloat16, str(plain))
        said = f"{caught.value} {caught.value.hint}"
        assert all(word in said for word in words), said
    shutil.copytree(plain, tmp_path / "given")
    configure(tmp_path / "given", {"quantization_config": {"quant_method": ["gptq"]}})
    with pytest.raises(CheckpointError, match="which is not read"):
        dequantised(read_folder(tmp_path / "given"))
