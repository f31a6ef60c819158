"""Try single operators on a device, and write down what its compiler and simulator make of them.

    python -m graphopt.backends.qnn.sweep qnn-htp-v75 -o qnn-htp-v75.json [--against OLD.json]

The file goes beside ``graphopt/ir/targets``. With ``--against`` differences to an older sweep are listed, as when
the compiler's package has moved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track

from .cases import CASES, Case, Operand
from .measures import reference, signal_to_noise
from .run import simulate

DEVICES: dict[str, dict[str, int]] = {
    "qnn-htp-v73": {"soc": 43, "arch": 73, "opset": 23},
    "qnn-htp-v75": {"soc": 57, "arch": 75, "opset": 23},
    "qnn-htp-v79": {"soc": 69, "arch": 79, "opset": 23},
    "qnn-htp-v81": {"soc": 87, "arch": 81, "opset": 23},
}
"""Qualcomm's numbers of systems on a chip, and the architecture of the HTP in each."""

KINDS = ("float", "w8a8", "w8a16", "w4a8", "w4a16")
_STORED = {"a8": ("uint8", 255), "a16": ("uint16", 65535)}


def build(case: Case, kind: str, path: Path, opset: int) -> dict[str, Any]:
    """Write the one-operator model of a case in a type, and return its inputs."""
    import ml_dtypes
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = numpy.random.default_rng(7)
    nodes, initialisers, inputs, read, feed = [], [], [], [], {}
    types = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}

    def constant(name: str, value: Any) -> str:
        initialisers.append(numpy_helper.from_array(value, name))
        return name

    def stored(name: str, low: float, high: float) -> str:
        """A value as it is after being stored in the activations' type."""
        if kind == "float":
            return name
        dtype, steps = _STORED[kind[2:]]
        low, high = min(low, 0.0), max(high, 0.0)
        scale = numpy.float32(max(high - low, 1e-6) / steps)
        zero = numpy.array(round(-low / float(scale))).astype(dtype)
        at = [constant(f"{name}_scale", numpy.array(scale)), constant(f"{name}_zero", zero)]
        nodes.append(helper.make_node("QuantizeLinear", [name, *at], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *at], [f"{name}_dq"]))
        return f"{name}_dq"

    def weight(name: str, value: Any) -> str:
        if kind == "float":
            return constant(name, value)
        axis = 0 if case.operator == "Conv" else 1
        scale, wide, options = _scales(value, axis, case.block, 127 if kind.startswith("w8") else 7)
        stored_as = ml_dtypes.int4 if kind.startswith("w4") else numpy.int8
        whole = constant(f"{name}_q", numpy.round(value / wide).astype(stored_as))
        zero = constant(f"{name}_zero", numpy.zeros(scale.shape, stored_as))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [whole, constant(f"{name}_scale", scale), zero], [f"{name}_dq"], **options
            )
        )
        return f"{name}_dq"

    for number, operand in enumerate(case.operands):
        name = f"operand_{number}"
        if operand is None:
            read.append("")
            continue
        if operand.role == "integers":
            value = numpy.array(operand.values, "int64").reshape(operand.shape)
            if not any(o is not None and o.role == "input" for o in case.operands):
                inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, operand.shape))
                feed[name] = value
                read.append(name)
            else:
                read.append(constant(name, value))
            continue
        if operand.role == "condition":
            inputs.append(helper.make_tensor_value_info(name, TensorProto.BOOL, operand.shape))
            feed[name] = draw.uniform(size=operand.shape) < 0.5
            read.append(name)
            continue
        value = draw.uniform(operand.low, operand.high, operand.shape).astype("float32")
        if operand.role == "input":
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, operand.shape))
            feed[name] = value
            read.append(stored(name, operand.low, operand.high))
        elif operand.role == "weight":
            read.append(weight(name, value))
        elif _plain(case, number, operand):
            read.append(constant(name, value))
        else:
            read.append(stored(constant(name, value), operand.low, operand.high))
    if not inputs:
        raise ValueError(f"{case.operator} has no input")
    outs = ["out"] if case.operator != "TopK" else ["out", "places"]
    if case.operator == "Split":
        outs = ["out", "rest"]
    nodes.append(helper.make_node(case.operator, read, outs, **case.attributes))
    shapes = onnx.shape_inference.infer_shapes(_model(nodes, inputs, [], initialisers, opset))
    known = {v.name: v.type.tensor_type for v in shapes.graph.value_info}
    ends = ["out"]
    if kind != "float" and case.output == "float":
        low, high = _range(case, kind, path, nodes, inputs, initialisers, feed, opset)
        ends = [stored("out", low, high)]
    dims = [d.dim_value for d in known["out"].shape.dim] if "out" in known else None
    outputs = [helper.make_tensor_value_info(e, types[case.output], dims) for e in ends]
    onnx.save(_model(nodes, inputs, outputs, initialisers, opset), str(path))
    return feed


def _scales(value: Any, axis: int, block: int, high: int) -> tuple[Any, Any, dict[str, int]]:
    """Return a weight's scales as the pass makes them, one for each entry of the weight, and how the node says it."""
    import numpy

    if block:  # along the other dimension
        parts = value.reshape(-1, block, value.shape[1])
        scale = (abs(parts).max(1) / high).astype("float32")
        return scale, numpy.repeat(scale, block, 0), {"axis": 0, "block_size": block}
    others = tuple(d for d in range(value.ndim) if d != axis)
    scale = (abs(value).max(others) / high).astype("float32")
    return scale, numpy.expand_dims(scale, others), {"axis": axis}


def _plain(case: Case, number: int, operand: Operand) -> bool:
    """Tell whether a constant is no tensor of the model's but a setting of the operator."""
    return case.operator in ("Clip", "Resize", "Pow") or (
        case.operator in ("Gemm", "Conv", "ConvTranspose") and number == 2
    )


def _range(
    case: Case, kind: str, path: Path, nodes: Any, inputs: Any, initialisers: Any, feed: Any, opset: int
) -> tuple[float, float]:
    """Return least and largest value of the output, by running what is there so far."""
    import onnx
    from onnx import TensorProto, helper

    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    onnx.save(_model(nodes, inputs, outputs, initialisers, opset), str(path))
    found = reference(path, feed)["out"]
    return float(found.min()), float(found.max())


def _model(nodes: Any, inputs: Any, outputs: Any, initialisers: Any, opset: int) -> Any:
    from onnx import helper

    graph = helper.make_graph(nodes, "case", inputs, outputs, initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


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
                "why": f"ONNX Runtime: {str(error).strip().splitlines()[0][:120]}",
            }
        found = simulate(path, [feed], soc=device["soc"], arch=device["arch"], timeout=120)
    if found.error or found.elsewhere or not found.outputs:
        why = found.error.splitlines()[0][:160] if found.error else "it stays on the CPU"
        if "fallback" in why:
            why = "it stays on the CPU"
        return {"placed": False, "snr": None, "why": why}
    worst = min(signal_to_noise(found.outputs[0][n], expected[n]) for n in expected)
    return {"placed": True, "snr": round(worst, 1), "why": "", "wheel": found.wheel}


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
    return {"device": device, "wheel": f"onnxruntime-qnn {wheel}", "cases": cases}


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


def main() -> None:
    """Sweep, write, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", choices=sorted(DEVICES))
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--against")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    old = json.loads(Path(given.against).read_text()) if given.against else None
    found = sweep(given.device, given.workers)
    Path(given.output).write_text(json.dumps(found, indent=1) + "\n")
    if old is not None:
        lines = differences(old, found)
        print("\n".join(lines) or "nothing changed")


if __name__ == "__main__":
    main()
