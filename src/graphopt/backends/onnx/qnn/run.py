"""Compiling and simulating in a child process, and the results."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ir.errors import LoweringError

TIMEOUT = 900.0
"""Seconds after which the compiler is considered to hang."""


@dataclass
class Simulated:
    """Results of compiling and simulating a model.

    Attributes:
        nodes: how many nodes each execution provider took.
        elsewhere: operator and name of the nodes that are not on the NPU.
        outputs: by name, for each set of inputs.
        compile_seconds: for the context binary.
        simulate_seconds: for all sets of inputs.
        wheel: version of the compiler's package.
        error: what went wrong; empty if nothing did.
    """

    nodes: dict[str, int] = field(default_factory=dict)
    elsewhere: list[tuple[str, str]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    compile_seconds: float = 0.0
    simulate_seconds: float = 0.0
    wheel: str = ""
    error: str = ""


def available() -> bool:
    """Tell whether the compiler is installed."""
    return importlib.util.find_spec("onnxruntime_qnn") is not None


def require() -> None:
    """Raise an error if the compiler is missing.

    Raises:
        LoweringError: it is.
    """
    if not available():
        raise LoweringError(
            "compiling and simulating for the NPU needs onnxruntime-qnn",
            hint='pip install "graphopt[qnn]" (libraries of Qualcomm under a licence of their own); without the check the '
            "file is written anyway",
        )


def simulate(
    model: Path, inputs: Sequence[Mapping[str, Any]], *, soc: int, arch: int, strict: bool = True,
    context: Path | None = None, timeout: float = TIMEOUT, carry: Sequence[str] = (),
) -> Simulated:  # fmt: skip
    """Compile a model and run the simulator in a separate process.

    Args:
        model: an ONNX file.
        inputs: sets of arrays by name; without any, the model is only compiled.
        soc: Qualcomm's number of the system on a chip, which decides how floats are computed.
        arch: version of the HTP.
        strict: fail if a node would run on the CPU.
        context: where the compiled context goes (an ONNX file that holds it, and a binary beside it).
        timeout: seconds after which the child is terminated.
        carry: inputs that a set may leave out, to get them from the ``next_`` outputs of the set before.

    Returns:
        The results; ``error`` says what failed. A compiler that refuses, crashes or hangs does not raise.

    Raises:
        LoweringError: the compiler is not installed.
    """
    require()
    import numpy

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for number, arrays in enumerate(inputs):
            files.append(str(folder / f"inputs_{number}.npz"))
            numpy.savez(files[-1], **arrays)
        request = {
            "model": str(model), "inputs": files, "folder": name, "soc": soc, "arch": arch, "strict": strict,
            "context": context.name if context is not None else "", "carry": {f"next_{name}": name for name in carry},
        }  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request))
        message = _run_child(folder, timeout)
        result_path = folder / "result.json"
        if not result_path.is_file():
            return Simulated(error=message)
        result = json.loads(result_path.read_text())
        outputs = []
        for number in range(len(files)):
            file = folder / f"outputs_{number}.npz"
            if file.is_file():
                with numpy.load(file, allow_pickle=False) as arrays:
                    outputs.append({key: arrays[key] for key in arrays.files})
        if context is not None and "error" not in result:
            for file in folder.glob(f"{context.stem}*"):
                os.replace(_moved(file, context.parent), context.parent / file.name)
        return Simulated(
            result.get("nodes", {}), [tuple(n) for n in result.get("elsewhere", [])], outputs,
            result.get("compile_seconds", 0.0), result.get("simulate_seconds", 0.0), result.get("wheel", ""),
            result.get("error", ""),
        )  # fmt: skip


def compile_together(
    models: Sequence[Path], *, soc: int, arch: int, timeout: float = TIMEOUT
) -> tuple[list[Path], str]:
    """Compile graphs into one binary beside them, which stores shared weights once.

    Args:
        models: in one folder.
        soc: as :func:`simulate` takes it.
        arch: likewise.
        timeout: seconds.

    Returns:
        The files, and an error message, which is empty on success.
    """
    require()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "together": [str(m) for m in models], "folder": name, "soc": soc, "arch": arch, "strict": True,
        }  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request))
        message = _run_child(folder, timeout)
        result_path = folder / "result.json"
        if not result_path.is_file():
            return [], message
        result = json.loads(result_path.read_text())
        if "error" in result:
            return [], str(result["error"])
        compiled = []
        for file in sorted(f for f in folder.iterdir() if "_ctx" in f.name):
            compiled.append(models[0].parent / file.name)
            os.replace(_moved(file, models[0].parent), compiled[-1])
        return compiled, ""


def _moved(file: Path, folder: Path) -> Path:
    """Move a file to the file system of a folder, so that putting it in place is atomic."""
    import shutil

    beside = folder / f".{file.name}.part"
    shutil.copyfile(file, beside)
    return beside


def child_command(request: Path) -> list[str]:
    """Return the command of the process that compiles and simulates."""
    return [sys.executable, "-m", "graphopt.backends.onnx.qnn.child", str(request)]


def _run_child(folder: Path, timeout: float) -> str:
    """Run the child and return its error message; empty if it produced a result."""
    command = child_command(folder / "request.json")
    log = folder / "log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"the compiler did not end within {timeout:g} s" + _tail(log)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if status < 0:
        return f"the compiler was ended by {signal.Signals(-status).name}" + _tail(log)
    return f"the compiler ended with status {status}" + _tail(log)


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ": " + " | ".join(lines[-3:]) if lines else ""
