"""Files for one device: what it would refuse is said beforehand, and a compiler that fails takes nothing else with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import nn

import graphopt
from graphopt import targets
from graphopt.backends.onnx import target as onnx_target
from graphopt.backends.onnx.qnn import run
from graphopt.backends.onnx.qnn.measures import signal_to_noise
from graphopt.cli.running import run as command
from graphopt.ir.errors import LoweringError
from graphopt.ir.program import Program
from tools.target_sweep.cases import CASES
from tools.target_sweep.verdicts import DEVICES, differences, verdict

NPU = "qnn-htp-v75"
compiler = pytest.mark.skipif(not run.available(), reason="onnxruntime-qnn is not installed")


class Net(nn.Module):
    def __init__(self, last: Any = torch.relu) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Linear(8, 5),
            last,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        return self.last(self.head(y.mean((2, 3))))


def program(last: Any = torch.relu, dynamic: bool = False) -> Program:
    torch.manual_seed(0)
    sizes = {"x": {0: "batch"}} if dynamic else None
    return graphopt.capture(Net(last).eval(), {"x": torch.randn(2, 3, 8, 8)}, dynamic=sizes)


def test_targets_are_read_from_their_sweeps() -> None:
    """Known faults of the compiler stand in the file: an operator that it takes and computes wrongly is refused."""
    device = targets.find_target(NPU)
    assert device.refuses("MatMul", 3) == ""
    assert device.refuses("Attention", 4, "w8a16") == ""
    assert "does not take Erf" in device.refuses("Erf", 3)
    assert "computes Reciprocal wrongly in w8a8" in device.refuses("Reciprocal", 3, "w8a8")
    assert "wrongly in w8a16" in device.refuses("Log", 3, "w8a16")
    assert device.refuses("Log", 3) == ""
    assert "at most 5 dimensions, not 6" in device.refuses("Transpose", 6)
    assert "never tried" in device.refuses("NonMaxSuppression", 3)
    assert device.wheel.startswith("onnxruntime-qnn ")
    for name in targets.names():
        swept = json.loads((Path(targets.__file__).parent / f"{name}.json").read_text())
        assert [(c["operator"], c["form"]) for c in swept["cases"]] == [
            (c.operator, c.form) for c in CASES
        ], f"{name}.json was not made with these cases: run the sweep again"
        assert swept["device"] == DEVICES[name]
    with pytest.raises(LoweringError, match="did you mean 'qnn-htp-v75'"):
        targets.find_target("qnn-htp-v7")


def test_onnx_runtime_is_a_target_at_each_opset(tmp_path: Path) -> None:
    """Sixteen bits came with opset 21, fused norms with 23; scales for blocks are not taken in w8a8."""
    old, new = targets.find_target("onnx-20"), targets.find_target("onnx")
    assert new.opset == 23
    assert old.refuses("MatMul", 3, "w8a8") == ""
    assert "does not take MatMul" in old.refuses("MatMul", 3, "w8a16")
    assert "does not take RMSNormalization" in old.refuses("RMSNormalization", 3)
    assert new.refuses("MatMul", 3, "w8a16") == new.refuses("RMSNormalization", 3) == ""
    assert new.takes_blocks("MatMul", "w4a16")
    assert not new.takes_blocks("MatMul", "w8a8")
    report = program(dynamic=True).lower("onnx", tmp_path / "a.onnx", target="onnx", opset=21)
    assert report.opset == 21
    with pytest.raises(LoweringError, match="onnx-21 is opset 21, not 23"):
        program().lower("onnx", tmp_path / "b.onnx", target="onnx-21", opset=23)
    with pytest.raises(LoweringError, match="asks a device's compiler"):
        program().lower("onnx", tmp_path / "b.onnx", target="onnx", check=True)
    assert not (tmp_path / "b.onnx").exists()


def test_blocks_that_a_runtime_does_not_take_are_named_and_avoided(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    data = [{"input": torch.randn(1, 5, 64)} for _ in range(4)]
    captured = graphopt.capture(net, data[0])
    passes = "fit-target{{allow_no_match=true}}, quantize{{weights=8 activations=8 block=32{}}}"
    blocked = graphopt.optimize(captured, passes.format(""), data=data)
    with pytest.raises(LoweringError, match="2 nodes cannot go to onnx-23") as told:
        blocked.lower("onnx", tmp_path / "a.onnx", target="onnx")
    assert "no scale per block of inputs in w8a8" in told.value.message
    if targets.find_target("onnx").wheel == f"onnxruntime {onnxruntime.__version__}":
        # what the table says is so; another version may take more
        with pytest.raises(LoweringError, match="does not run the file"):
            blocked.lower("onnx", tmp_path / "a.onnx")
    fitting = graphopt.optimize(captured, passes.format(" target=onnx"), data=data)
    assert len(fitting.report.passes[-1].notes) == 2
    fitting.lower("onnx", tmp_path / "a.onnx", target="onnx")


def test_differences_of_two_sweeps_are_told() -> None:
    def of(snr: float, placed: bool = True) -> dict[str, Any]:
        said = {"float": {"placed": placed, "snr": snr if placed else None, "why": "" if placed else "no"}}
        return {"cases": [{"operator": "Mul", "form": "a", "verdicts": said}]}

    assert differences(of(60), of(62)) == []
    assert differences(of(60), of(12)) == ["Mul (a), float: 60 dB -> 12 dB"]
    assert differences(of(60), of(60, placed=False)) == ["Mul (a), float: refused now no"]
    assert differences({"cases": []}, of(60)) == ["Mul (a): new"]


def test_what_varies_or_cannot_be_placed_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="does not support dynamic sizes, and batch would"):
        program(dynamic=True).lower("onnx", tmp_path / "a.onnx", target=NPU)
    with pytest.raises(LoweringError) as told:
        program(torch.erf).lower("onnx", tmp_path / "a.onnx", target=NPU)
    assert "1 nodes cannot go to qnn-htp-v75" in told.value.message
    assert "Erf" in told.value.message
    assert "test_targets.py" in told.value.message, "the line of the model is not said"
    with pytest.raises(LoweringError, match="asks a device's compiler"):
        program().lower("onnx", tmp_path / "a.onnx", check=True)
    assert not list(tmp_path.iterdir())


def test_without_the_compiler_all_but_the_check_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "available", lambda: False)
    report = program().lower("onnx", tmp_path / "out", target=NPU)
    assert report.opset == 23
    assert report.checked is None
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["model.onnx", "report.json"]
    with pytest.raises(LoweringError, match="needs onnxruntime-qnn") as told:
        program().lower("onnx", tmp_path / "again", target=NPU, check=True)
    assert "graphopt[qnn]" in told.value.hint
    assert not (tmp_path / "again").exists()


class AfterItsFirstWord(subprocess.Popen[bytes]):
    """The clock starts once the child has said something: how fast it starts is the machine's affair."""

    def __init__(self, *arguments: Any, cwd: Path, **options: Any):
        self.log = cwd / "log"
        super().__init__(*arguments, cwd=cwd, **options)

    def wait(self, timeout: float | None = None) -> int:
        while timeout is not None and self.poll() is None and not self.log.stat().st_size:
            time.sleep(0.01)
        return super().wait(timeout)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import os, sys; print('finalize failed', file=sys.stderr); os.kill(os.getpid(), 11)", "ended by SIGSEGV: finalize failed"),
        ("import sys; print('out of licence'); sys.exit(7)", "ended with status 7: out of licence"),
        ("import time; print('working', flush=True); time.sleep(600)", "did not end within 2 s: working"),
    ],
)  # fmt: skip
def test_a_compiler_that_crashes_or_hangs_is_ended_and_heard(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "available", lambda: True)
    monkeypatch.setattr(run, "child_command", lambda request: [sys.executable, "-c", script])
    monkeypatch.setattr(subprocess, "Popen", AfterItsFirstWord)
    found = run.simulate(tmp_path / "m.onnx", [], soc=57, arch=75, timeout=2)
    assert said in found.error
    monkeypatch.setattr(onnx_target, "simulate", lambda *a, **k: found)
    monkeypatch.setattr("graphopt.backends.onnx.lower.require_compiler", lambda: None)
    with pytest.raises(LoweringError) as told:
        program().lower("onnx", tmp_path / "out", target=NPU, check=True)
    assert said in told.value.message
    assert not (tmp_path / "out").exists()


def test_signal_to_noise_in_decibels() -> None:
    a = numpy.array([1.0, 2.0])
    assert signal_to_noise(a, a) == 200
    assert signal_to_noise(a * 1.1, a) == pytest.approx(20)
    assert signal_to_noise(numpy.array([numpy.nan, 0]), a) == -200


@compiler
def test_compiled_and_simulated_with_no_node_elsewhere(tmp_path: Path, capsys: Any) -> None:
    made = program().save(tmp_path / "program")
    assert (
        command(["lower", str(made), "--to", "onnx", "--target", NPU, "--check", "-o", str(tmp_path / "out")])
        == 0
    )
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert files >= {"model.onnx", "model_ctx.onnx", "report.json"}
    told = json.loads((tmp_path / "out" / "report.json").read_text())["checked"]
    assert told["nodes"] > 3
    assert min(told["against_runtime"].values()) > 40
    assert min(told["against_float"].values()) > 40
    for file in told["context"]:
        assert Path(file).is_file(), "the report names files that are not there"
    assert command(["lower", str(made), "--to", "onnx", "--target", NPU, "-o", str(tmp_path / "out")]) != 0
    capsys.readouterr()


@compiler
def test_a_wrong_simulation_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = run.simulate

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = honest(*arguments, **options)
        found.outputs = [{k: v + 0.1 * v.std() for k, v in o.items()} for o in found.outputs]
        return found

    monkeypatch.setattr(onnx_target, "simulate", wrong)
    with pytest.raises(LoweringError, match="differs from ONNX Runtime on the same file"):
        program().lower("onnx", tmp_path / "out", target=NPU, check=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "operator", "form", "kind"),
    [
        ("onnx-20", "MatMul", "weight", "w8a8"),
        ("onnx-20", "MatMul", "weight", "w8a16"),
        ("onnx-21", "Conv", "depthwise", "w4a16"),
        ("onnx-23", "MatMul", "weight in blocks of 32", "w8a8"),
        ("onnx-23", "Attention", "grouped heads", "float"),
    ],
)
def test_the_sweep_of_a_runtime_says_what_its_file_says(
    name: str, operator: str, form: str, kind: str
) -> None:
    """Where ONNX Runtime has moved, this fails: run the sweep again, with --against."""
    case = next(c for c in CASES if (c.operator, c.form) == (operator, form))
    swept = json.loads((Path(targets.__file__).parent / f"{name}.json").read_text())
    (held,) = (c for c in swept["cases"] if (c["operator"], c["form"]) == (operator, form))
    said = verdict(case, kind, DEVICES[name])
    assert said is not None
    assert said["placed"] == held["verdicts"][kind]["placed"]
    assert not said["placed"] or said["snr"] > 40


@compiler
@pytest.mark.parametrize(
    ("operator", "form", "kind", "right"),
    [
        ("MatMul", "weight", "w8a16", True),
        ("MatMul", "weight in blocks of 32", "w4a16", True),
        ("Conv", "depthwise, nine entries, dilated", "float", False),
        ("Conv", "depthwise, nine entries of which each second is zero", "float", True),
        ("Log", "", "w8a16", False),
        ("Erf", "", "float", False),
    ],
)
def test_the_sweep_says_what_its_file_says(operator: str, form: str, kind: str, right: bool) -> None:
    """Where the compiler has mended a fault, this fails, and what goes round it can go."""
    case = next(c for c in CASES if (c.operator, c.form) == (operator, form))
    said = verdict(case, kind, DEVICES[NPU])
    assert said is not None
    assert (said["placed"] and said["snr"] >= targets.LEAST_SNR) == right
