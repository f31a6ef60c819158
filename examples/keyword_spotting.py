"""A keyword detector trained with branches and without, fused, exported and streamed.

    python examples/keyword_spotting.py [--steps 800] [--seeds 3]

Both forms cost the same once they run: one convolution a stage. What is measured: how well clips are told apart
after either training, that fusing changes no decision, that pieces give what the whole gives, and frames a
second on one core. Interrupted runs go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "reference_models"))

from keyword_detector import JUDGED_ON, SETTINGS, SHAPE, TEST_SEED, dataset, train_detector  # noqa: E402
from keyword_network import KeywordDetector, clip_score  # noqa: E402

import graphopt  # noqa: E402
from graphopt.ir.checking.streaming import initial_state, stream  # noqa: E402

FORMS: dict[str, dict[str, Any]] = {
    "branches": SHAPE,
    "single": {**SHAPE, "kernels": [9], "pointwise": 1, "identity": False},
}


def scores(run: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return the score of every clip."""
    with torch.no_grad():
        return torch.cat([clip_score(run(part)) for part in inputs.split(256)])


def deploy(
    module: KeywordDetector, inputs: torch.Tensor
) -> tuple[graphopt.Program, graphopt.Program, dict[str, float]]:
    """Fuse and stream a detector, and say what that changed."""
    fused = graphopt.optimize(module, "fuse-branches", inputs=inputs[:4])
    before, after = scores(module, inputs), scores(fused, inputs)
    streaming = graphopt.optimize(fused, "stream-convolutions")
    with torch.no_grad():
        whole = fused(inputs[:16])
    pieces = torch.cat(list(stream(streaming, inputs[:16].split([1, 2, 3, 5, 8, 13, 105], -1))), -1)
    return fused, streaming, {
        "convolutions": sum(n for name, n in fused.operators.items() if "conv" in name),
        "multiply_adds": graphopt.cost(fused, sizes={"batch": 1, "size": 100}).flops / 2,
        "decisions_changed": int(((before > 0) != (after > 0)).sum()),
        "score_difference": float((before - after).abs().max()),
        "streaming_difference": float((pieces - whole).abs().max()),
    }  # fmt: skip


def frames_a_second(streaming: graphopt.Program, frames: int = 2000) -> dict[str, float]:
    """Run frame by frame in ONNX Runtime on one core; a second of audio is 100 frames."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        streaming.lower("onnx", path, sizes={"batch": 1, "size": 1})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
    given = {i.name: torch.zeros([int(s) for s in i.shape]).numpy() for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    began = time.perf_counter()
    for _ in range(frames):
        values = dict(zip(outputs, session.run(None, given), strict=True))
        given |= {name: values[f"next_{name}"] for name in initial_state(streaming)}
    return {"onnx_frames_a_second": frames / (time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=HERE / "reference_models" / "runs")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "keyword_spotting.json")
    arguments = parser.parse_args()
    inputs, _ = dataset(JUDGED_ON, TEST_SEED, arguments.work_dir / "keyword_detector" / "test.safetensors")
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for form, shape in FORMS.items():
            settings = replace(SETTINGS, steps=arguments.steps, seed=seed)
            module, record, reached = train_detector(
                arguments.work_dir / "keyword_spotting" / f"{form}-{seed}-{arguments.steps}", shape, settings,
                cache=arguments.work_dir / "keyword_detector",
            )  # fmt: skip
            _, streaming, deployed = deploy(module, inputs)
            rows.append({"form": form, "seed": seed, **reached, **deployed, "minutes": record.seconds / 60})
            rows[-1] |= frames_a_second(streaming)
            arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print a row a run, and the means of both forms."""
    names = [n for n in rows[0] if n not in ("form", "seed")]
    table = Table(*("form", "seed", *(n.replace("_", " ") for n in names)), box=None)
    for row in rows:
        table.add_row(row["form"], str(row["seed"]), *(f"{row[n]:.4g}" for n in names))
    for form in FORMS:
        own = [row for row in rows if row["form"] == form]
        table.add_row(form, "mean", *(f"{sum(r[n] for r in own) / len(own):.4g}" for n in names))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
