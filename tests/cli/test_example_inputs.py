"""Commands capture checkpoints on the inputs that the user gives: arrays of a file, or shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import zoo

import graphopt


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes images of any size."""
    import transformers as t

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("images") / "resnet"
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    t.ResNetModel(config).save_pretrained(folder)
    return folder


def test_a_shape(images: Path, told: Callable[..., Any]) -> None:
    """Wrong if the shape were not that of the capture."""
    found = told("inspect", images, "--shape", "pixel_values=2x3x48x80")
    assert found["inputs"]["pixel_values"] == ["float32", "batch", 3, 48, 80]


def test_arrays_of_a_file(images: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    """Wrong if the file were not read, or its batch of one froze."""
    numpy.savez(tmp_path / "x.npz", pixel_values=numpy.zeros((1, 3, 40, 56), dtype="float32"))
    found = told("inspect", images, "--inputs", tmp_path / "x.npz")
    assert found["inputs"]["pixel_values"] == ["float32", "batch", 3, 40, 56]


def test_lower_tells_shapes_from_sizes(images: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    """Wrong if one were taken for the other, since both are given as --shape."""
    shapes = ["--shape", "pixel_values=2x3x48x64", "--shape", "batch=1"]
    told("lower", images, "--to", "onnx", "-o", tmp_path / "r.onnx", *shapes)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "r.onnx"))
    assert session.get_inputs()[0].shape == [1, 3, 48, 64]


def test_programs_take_later_commands_without_them(
    images: Path, told: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong if a saved program, whose inputs are settled, were captured again or the option passed over in silence."""
    shape = ["--shape", "pixel_values=2x3x48x64"]
    told("optimize", images, "-p", "fuse-branches{allow_no_match=true}", "-o", tmp_path / "program", *shape)
    from graphopt.cli.running import run

    assert run(["inspect", str(tmp_path / "program"), "--shape", "pixel_values=2x3x32x32"]) == 0
    shown = capsys.readouterr()
    assert "was captured before" in shown.err
    assert "48, 64" in shown.out
    found = told("verify", images, tmp_path / "program", *shape)
    assert found["verdict"] == "holds"


def test_tokens_of_another_rank_are_refused(told: Callable[..., Any], tmp_path: Path) -> None:
    """What is made to fit them, such as positions, ended in an error of torch."""
    zoo.make("llama").save_pretrained(tmp_path / "llama")
    found = told("inspect", tmp_path / "llama", "--shape", "input_ids=2x9x3", status=2)
    assert "LlamaForCausalLM does not take input_ids as given" in found["message"]
    with pytest.raises(graphopt.UsageError, match=r"it takes input_ids such as \[3, 13\]"):
        graphopt.capture(tmp_path / "llama", {"input_ids": torch.Size([2, 9, 3])})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--shape", "pixel_values=abc"], "--shape takes the name and the sizes"),
        (["--shape", "pixel_values=1x0x3"], "--shape takes the name and the sizes"),
        (["--shape", "pixels=1x3x32x32"], "takes no input 'pixels'"),
        (["--shape", "pixel_values=3x32x32"], "does not take pixel_values as given"),
        (["--inputs", "{bad}"], "cannot be read as arrays"),
        (["--inputs", "{text}"], "is not a .npz file"),
        (["--inputs", "nowhere.npz"], "does not exist"),
        (["--inputs", "{good}", "--shape", "pixel_values=1x3x32x32"], "pixel_values is given twice"),
    ],
)
def test_what_is_wrong_is_said(
    given: list[str], message: str, images: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    """Wrong if a mistake were found by an error of a library, or after the capture."""
    places = {name: tmp_path / f"{name}.npz" for name in ("good", "bad")} | {"text": tmp_path / "x.txt"}
    numpy.savez(places["good"], pixel_values=numpy.zeros((1, 3, 32, 32), dtype="float32"))
    numpy.savez(places["bad"], pixel_values=numpy.array([{}], dtype=object))
    places["text"].write_text("words")
    found = told("inspect", images, *(g.format(**places) for g in given), status=2)
    assert message in found["message"]
