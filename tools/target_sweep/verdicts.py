"""What devices and runtimes make of single operators."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track

from graphopt.backends.onnx.qnn.measures import reference, signal_to_noise
from graphopt.backends.onnx.qnn.run import simulate

from .cases import CASES, Case
from .models import KINDS, build

DEVICES: dict[str, dict[str, int]] = {
    "onnx-20": {"opset": 20},
    "onnx-21": {"opset": 21},
    "onnx-23": {"opset": 23},
    "qnn-htp-v73": {"soc": 43, "arch": 73, "opset": 23},
    "qnn-htp-v75": {"soc": 57, "arch": 75, "opset": 23},
    "qnn-htp-v79": {"soc": 69, "arch": 79, "opset": 23},
    "qnn-htp-v81": {"soc": 87, "arch": 81, "opset": 23},
}
"""ONNX Runtime itself at each opset; Qualcomm's numbers of systems on a chip, and the architecture of the HTP in each."""


def verdict(case: Case, kind: str, device: Mapping[str, int]) -> dict[str, Any] | None:
    """Try one case in one type; None where the type says nothing about it."""
    if kind != "float" and case.output != "float":
        return None
    if (kind.startswith("w4") and not case.weighted) or (kind == "float" and case.block):
        return None
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "case.onnx"
        try:
            feed = build(case, kind, path, device["opset"])
            expected = reference(path, feed)
        except Exception as error:  # a form that ONNX Runtime itself does not take says nothing of the device
            return {
                "placed": False,
                "snr": None,
                "why": f"ONNX Runtime: {_plainly(error, path)}",
            }
        if "soc" not in device:
            return _computed(path, feed, expected)
        found = simulate(path, [feed], soc=device["soc"], arch=device["arch"], timeout=120)
    if found.error or found.elsewhere or not found.outputs:
        why = found.error.splitlines()[0][:160] if found.error else "it stays on the CPU"
        if "fallback" in why:
            why = "it stays on the CPU"
        return {"placed": False, "snr": None, "why": why}
    worst = min(signal_to_noise(found.outputs[0][n], expected[n]) for n in expected)
    return {"placed": True, "snr": round(worst, 1), "why": "", "wheel": found.wheel}


def _plainly(error: Exception, path: Path) -> str:
    """Return what a runtime said, without the parts that differ from run to run."""
    line = str(error).strip().splitlines()[0].removeprefix("[ONNXRuntimeError] : ")
    return line.replace(str(path), "the model").rpartition(" failed:")[2].strip()[:120]


def _computed(path: Path, feed: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Compare ONNX Runtime with ONNX's own reference in numpy, which does not know every form."""
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    said = {"placed": True, "snr": None, "why": "", "wheel": onnxruntime.__version__}
    try:
        evaluator = ReferenceEvaluator(str(path))
        expected = dict(zip(evaluator.output_names, evaluator.run(None, dict(feed)), strict=True))
    except Exception as error:
        return {**said, "why": f"not compared: {type(error).__name__}"}
    return {**said, "snr": round(min(signal_to_noise(found[n], expected[n]) for n in expected), 1)}


def sweep(name: str, workers: int = 2) -> dict[str, Any]:
    """Return all verdicts on a device."""
    device = DEVICES[name]
    asked = [(case, kind) for case in CASES for kind in KINDS]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda pair: verdict(pair[0], pair[1], device), asked)
        said = list(track(results, f"operators on {name}", total=len(asked)))
    wheel = next((s["wheel"] for s in said if s and "wheel" in s), "")
    cases: list[dict[str, Any]] = []
    for case in CASES:
        found = {
            kind: {k: v for k, v in s.items() if k != "wheel"}
            for (c, kind), s in zip(asked, said, strict=True)
            if c is case and s is not None
        }
        sizes = [len(o.shape) for o in case.operands if o is not None and o.role == "input"]
        cases.append(
            {
                "operator": case.operator, "form": case.form, "limit": case.limit,
                "dimensions": max(sizes, default=0), "verdicts": found,
            }
        )  # fmt: skip
    package = "onnxruntime-qnn" if "soc" in device else "onnxruntime"
    return {"device": device, "wheel": f"{package} {wheel}", "cases": cases}


def as_text(found: Mapping[str, Any]) -> str:
    """Return a sweep as JSON, a line for each case."""
    head = json.dumps({k: v for k, v in found.items() if k != "cases"})[:-1]
    lines = ",\n".join(json.dumps(case) for case in found["cases"])
    return f'{head}, "cases": [\n{lines}\n]}}\n'


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in words what changed from one sweep to another: what is taken, and precision by more than 6 dB."""
    held = {(c["operator"], c["form"]): c["verdicts"] for c in old["cases"]}
    lines = []
    for case in new["cases"]:
        key = (case["operator"], case["form"])
        title = f"{case['operator']} ({case['form']})" if case["form"] else case["operator"]
        if key not in held:
            lines.append(f"{title}: new")
            continue
        for kind, now in case["verdicts"].items():
            before = held[key].get(kind)
            if before is None or before["placed"] != now["placed"]:
                lines.append(
                    f"{title}, {kind}: {'taken' if now['placed'] else 'refused'} now {now['why']}".rstrip()
                )
            elif now["snr"] is not None and abs(now["snr"] - (before["snr"] or 0)) > 6:
                lines.append(f"{title}, {kind}: {before['snr']} dB -> {now['snr']} dB")
    return lines
