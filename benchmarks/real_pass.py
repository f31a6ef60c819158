"""One pipeline on one real checkpoint, in a process of its own: time, memory, quality, speed, and what it leaves as.

    python benchmarks/real_pass.py --job JOB.json --result RESULT.json

The process is the unit, so that peak memory is that of one pipeline. ``benchmarks/real_models.py`` writes the jobs.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.ir.checking.comparison import relative_error
from graphopt.ir.facts import KVCache
from graphopt.ir.program import Program

MIB = 1 << 20


def peak() -> float:
    """Return the most memory that this process has had so far, in MiB.

    The kernel's count for the process image is read where there is one: getrusage starts from what the parent had when
    it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def size_of(path: Path) -> float:
    """Return MiB on disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / MIB


def losses(program: Program, rows: list[list[int]]) -> list[float]:
    """Return the mean negative log likelihood of each row's tokens after its first, in nats."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        logits = program(input_ids=ids)["logits"][0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return found


def tokens_a_second(program: Program, prompts: list[list[int]], new: int, times: int) -> list[float]:
    """Return greedy tokens a second, one row at a time, of each of several runs after one that warms up."""
    found = []
    for number in range(times + 1):
        row = [prompts[number % len(prompts)]]
        began = time.perf_counter()
        graphopt.generate(program, row, max_new_tokens=new, eos_token_id=None)
        if number:
            found.append(new / (time.perf_counter() - began))
    return found


def leave(program: Program, exits: list[str], rows: list[list[int]], place: Path) -> dict[str, Any]:
    """Write the program in each form, and compare what is read back; a refusal is its reason."""
    found: dict[str, Any] = {}
    for name in exits:
        began = time.perf_counter()
        target = place / name.replace(" ", "-")
        try:
            found[name] = {"error": EXITS[name](program, target, rows)}
            found[name] |= {
                "seconds": round(time.perf_counter() - began, 1),
                "size": round(size_of(target), 1),
            }
        except graphopt.GraphoptError as error:
            found[name] = {"refused": str(error).splitlines()[0]}
    return found


def _saved(program: Program, target: Path, rows: list[list[int]]) -> float:
    program.save(target)
    again = graphopt.load(target)
    inputs = _given(program, rows)
    return max(relative_error(again(**inputs)[n], v) for n, v in program(**inputs).items())


def _given(program: Program, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    from graphopt.ir.running.examples import example_inputs

    if KVCache in program.facts:
        return example_inputs(program)
    return {"input_ids": torch.tensor([rows[0][:64]])}


def _folder(program: Program, target: Path, rows: list[list[int]]) -> float:
    return max(program.save_pretrained(target).errors.values())


def _onnx(program: Program, target: Path, rows: list[list[int]]) -> float:
    target.mkdir()
    report = program.lower("onnx", target / "model.onnx")
    return max(report.errors.values())


def _genai(program: Program, target: Path, rows: list[list[int]]) -> float:
    program.lower("genai", target)
    return 0.0


EXITS: dict[str, Callable[[Program, Path, list[list[int]]], float]] = {
    "saved": _saved,
    "Hugging Face": _folder,
    "ONNX": _onnx,
    "genai": _genai,
}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job; every number is of this process alone."""
    torch.set_num_threads(job["threads"])
    result: dict[str, Any] = {"pipeline": job["pipeline"], "imported": peak()}
    program = graphopt.load(job["program"])
    if job["pipeline"]:
        calibration = [{"input_ids": torch.tensor(job["calibration"][i : i + 2])}
                       for i in range(0, len(job["calibration"]), 2)]  # fmt: skip
        try:
            program = graphopt.optimize(program, job["pipeline"], data=calibration)
        except graphopt.GraphoptError as error:
            return {**result, "refused": str(error).splitlines()}
        entry = program.report.passes[-1]
        result |= {
            "seconds": entry.seconds, "sites": len(entry.sites), "refused_sites": len(entry.refused),
            "error": entry.error, "checks": entry.checks, "notes": entry.notes, "contract": entry.contract,
            "change": {k: list(v) for k, v in entry.change.items()}, "metric": entry.metric,
        }  # fmt: skip
    result["peak"] = peak()
    result["weights"] = (
        sum(math.prod(w.source.shape) * w.source.dtype.itemsize for w in program.weights.values()) / MIB
    )
    if job["judge"] and KVCache not in program.facts and "logits" in program.outputs:
        result["losses"] = [losses(program, rows) for rows in job["draws"]]
    if job["generate"]:
        try:
            speeds = tokens_a_second(program, job["prompts"], job["new"], job["times"])
            result |= {"tokens_a_second": statistics.median(speeds), "speeds": speeds}
        except graphopt.GraphoptError as error:
            result["no_text"] = str(error).splitlines()[0]
    with tempfile.TemporaryDirectory() as place:
        result["exits"] = leave(program, job["exits"], job["draws"][0], Path(place))
    result["peak_with_exits"] = peak()
    return result


def capture(job: dict[str, Any]) -> dict[str, Any]:
    """Capture a checkpoint and save it."""
    torch.set_num_threads(job["threads"])
    began = time.perf_counter()
    program = graphopt.capture(job["capture"], cache=False)
    found = {"seconds": time.perf_counter() - began, "peak": peak()}
    program.save(job["to"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    job = json.loads(given.job.read_text())
    found = capture(job) if "capture" in job else work(job)
    given.result.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
