"""What must hold of sizes goes with a file: a runtime takes any."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import graphopt
from graphopt.cli.running import run


class Threes(nn.Module):
    """Another function of rows that are no threes, or longer than twelve."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 3 or x.shape[1] > 12:
            return x.sum(-1, keepdim=True)
        return x.reshape(x.shape[0], -1, 3).softmax(-1).flatten(1)


def limits_in(path: Path) -> str:
    held = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    return held.get("graphopt.sizes", "")


def test_limits_are_in_the_report_the_file_and_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong if a file computed something else for sizes that the model decides by, and nobody was told."""
    program = graphopt.capture(Threes().eval(), torch.randn(2, 6))
    report = program.lower("onnx", tmp_path / "a.onnx")
    assert {"sequence <= 12", "sequence % 3 == 0"} <= set(report.limits)
    assert limits_in(tmp_path / "a.onnx") == "; ".join(report.limits)
    program.save(tmp_path / "saved")
    assert run(["lower", str(tmp_path / "saved"), "--to", "onnx", "-o", str(tmp_path / "b.onnx")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "sequence <= 12" in said and "may not detect other sizes" in said


def test_sizes_that_are_numbers_and_free_ones_need_no_word(tmp_path: Path) -> None:
    program = graphopt.capture(Threes().eval(), torch.randn(2, 6))
    fixed = program.lower("onnx", tmp_path / "a.onnx", sizes={"sequence": 9})
    assert fixed.limits == ()
    free = graphopt.capture(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    assert free.lower("onnx", tmp_path / "b.onnx").limits == ()
    assert limits_in(tmp_path / "a.onnx") == limits_in(tmp_path / "b.onnx") == ""
