"""Rewrite a checkpoint larger than the memory the process may take, write it back, and verify it.

    python benchmarks/streaming.py --gigabytes 3 --limit 1.6

Makes a Llama-shaped folder of several safetensors files with random weights, then, in a process whose data
segment is limited, captures it, fuses projections, folds norms, checks every site, writes the folder back and
compares it by running both weight by weight. Prints the size of the weights and the largest data segment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")


def make(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint and return the bytes of its weights."""
    import torch
    from transformers import LlamaConfig

    from graphopt.frontends.huggingface import capture_configuration
    from graphopt.ir.storage.safetensors_file import write_file
    from graphopt.ir.weights import Drawn, numel

    width = 1024
    layer = width * width * 2 + width * (width // 2) + 3 * width * 4096
    layers = max(2, round(gigabytes * 1e9 / 4 / layer))
    config = LlamaConfig(hidden_size=width, intermediate_size=4096, num_hidden_layers=layers,
                         num_attention_heads=16, num_key_value_heads=4, vocab_size=4096,
                         architectures=["LlamaForCausalLM"], dtype="float32")  # fmt: skip
    program = capture_configuration(config, dtype=torch.float32)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: list[dict[str, Drawn]] = [{}]
    size = total = 0
    for index, weight in enumerate(program.weights.values()):
        if weight.kind != "parameter":
            continue
        shape = tuple(weight.source.shape)
        bytes_ = numel(shape) * 4
        if size + bytes_ > 5e8:
            shards.append({})
            size = 0
        shards[-1][weight.name] = Drawn(shape, torch.float32, index, 0.02 if len(shape) > 1 else 1.0)
        size, total = size + bytes_, total + bytes_
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    print(f"made {total / 1e9:.2f} GB in {len(shards)} files, {layers} layers", flush=True)
    return total


def rewrite(source: Path, target: Path, limit: float) -> None:
    """Do the whole job under a limit."""
    import resource

    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9), int(limit * 1e9)))
    import graphopt
    from graphopt.ir.facts import Capture

    began = time.perf_counter()
    program = graphopt.capture(source, cache=False)
    captured = time.perf_counter() - began
    began = time.perf_counter()
    result = graphopt.optimize(program, "fuse-projections, fold-norms")
    rewritten = time.perf_counter() - began
    began = time.perf_counter()
    report = result.save_pretrained(target, check="streamed")
    written = time.perf_counter() - began
    peak = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData")
    )
    print(result.report)
    print(f"captured in {captured:.1f} s ({program.facts[Capture].compared or 'compared whole'}), "
          f"rewritten and verified per site in {rewritten:.1f} s, "
          f"written and compared in {written:.1f} s")  # fmt: skip
    print(f"largest error of the folder read back: {max(report.errors.values()):.2g}")
    print(f"limit {limit:.2f} GB of data; data segment at the end {peak / 1e6:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--limit", type=float, default=1.6, help="gigabytes of data the process may have")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        rewrite(Path(arguments.child[0]), Path(arguments.child[1]), arguments.limit)
        return
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "checkpoint"
        make(source, arguments.gigabytes)
        command = [
            sys.executable,
            __file__,
            "--limit",
            str(arguments.limit),
            "--child",
            str(source),
            f"{place}/rewritten",
        ]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
