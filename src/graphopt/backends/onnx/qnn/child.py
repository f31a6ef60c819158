"""The process that compiles and simulates, so that a crash of the compiler affects nothing else.

    python -m graphopt.backends.onnx.qnn.child REQUEST.json

The request names the model, the inputs (.npz), a folder for results, the SoC and the architecture. Results are written
before the process ends, since unloading the libraries may fail.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PROVIDER = "QNNExecutionProvider"


def _options(request: dict[str, Any], context: Path | None) -> Any:
    """Return a session's options: this device, strictly, and where the compiled context goes."""
    import onnxruntime
    import onnxruntime_qnn

    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    strict = "1" if request["strict"] else "0"
    options.add_session_config_entry("session.disable_cpu_ep_fallback", strict)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if context is not None:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(context))
        options.add_session_config_entry("ep.context_embed_mode", "0")
    settings = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": str(request["soc"]),
        "htp_arch": str(request["arch"]),
    }  # fmt: skip
    options.add_provider_for_devices(devices, settings)
    return options


def together(request: dict[str, Any]) -> dict[str, Any]:
    """Compile several graphs into one binary, which stores shared weights once."""
    import onnxruntime

    folder, models = Path(request["folder"]), [Path(m) for m in request["together"]]
    began, sessions = time.perf_counter(), []
    for model in models:
        options = _options(request, folder / f"{model.stem}_ctx.onnx")
        options.add_session_config_entry("ep.share_ep_contexts", "1")
        if model == models[-1]:
            options.add_session_config_entry("ep.stop_share_ep_contexts", "1")
        try:
            sessions.append(onnxruntime.InferenceSession(str(model), options))
        except Exception as error:
            return {"error": f"{model.name}: {str(error).strip()}"}
    return {"compile_seconds": time.perf_counter() - began}


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Compile, and run the simulator on each set of inputs."""
    import numpy
    import onnxruntime
    import onnxruntime_qnn

    report: dict[str, Any] = {"wheel": _version("onnxruntime-qnn"), "runtime": onnxruntime.__version__}
    folder = Path(request["folder"])
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    if "together" in request:
        return {**report, **together(request)}
    options = _options(request, folder / request["context"] if request.get("context") else None)
    began = time.perf_counter()
    try:
        session = onnxruntime.InferenceSession(request["model"], options)
    except Exception as error:
        return {**report, "error": str(error).strip()}
    report["compile_seconds"] = time.perf_counter() - began
    placed: dict[str, list[list[str]]] = {}
    for graph in session.get_provider_graph_assignment_info():
        placed.setdefault(graph.ep_name, []).extend([n.op_type, n.name] for n in graph.get_nodes())
    report["nodes"] = {name: len(nodes) for name, nodes in placed.items()}
    report["elsewhere"] = [node for name, nodes in placed.items() if name != PROVIDER for node in nodes]
    names = [value.name for value in session.get_outputs()]
    carried: dict[str, Any] = {}
    began = time.perf_counter()
    for number, file in enumerate(request["inputs"]):
        with numpy.load(file, allow_pickle=False) as arrays:
            # a set that has a value for a carried input starts a new sequence
            feeds = {**carried, **arrays}
            feed = {value.name: feeds[value.name] for value in session.get_inputs()}
        try:
            results = session.run(names, feed)
        except Exception as error:
            return {**report, "error": f"the simulator failed: {str(error).strip()}"}
        outputs = dict(zip(names, results, strict=True))
        carried = {successor: outputs.pop(output) for output, successor in request["carry"].items()}
        # carried values are written after the last step only
        last = carried if number + 1 == len(request["inputs"]) else {}
        numpy.savez(folder / f"outputs_{number}.npz", **outputs, **{f"next_{k}": v for k, v in last.items()})
    report["simulate_seconds"] = time.perf_counter() - began
    return report


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    answer = main(asked)
    place = Path(asked["folder"]) / "result.json"
    place.with_suffix(".part").write_text(json.dumps(answer))
    place.with_suffix(".part").rename(place)
    sys.stdout.flush()
    os._exit(0)
