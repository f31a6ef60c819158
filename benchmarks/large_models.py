"""Capture, inspection and exact passes on the graph of Llama-2-70B, by number of layers, without weights.

    python benchmarks/large_models.py --layers 20 40 80 160

Prints, per depth: seconds of capture, anatomy, cost, passes (plan, rewrite, verify), their ratio to capture,
anonymous memory over the same steps, and seconds to save and load a program of that depth (at toy width,
since saving needs weights).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TQDM_DISABLE", "1")


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    with open("/proc/self/status") as file:
        match = re.search(r"RssAnon:\s+(\d+) kB", file.read())
    return int(match.group(1)) * 1024 if match else 0


def configuration(layers: int, toy: bool = False):
    from transformers import LlamaConfig

    if toy:
        return LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
                           num_attention_heads=8, num_key_value_heads=2, vocab_size=256,
                           architectures=["LlamaForCausalLM"])  # fmt: skip
    return LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def one(layers: int, pipeline: str) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from graphopt.frontends.huggingface import capture_configuration
    from graphopt.ir.cost import cost
    from graphopt.ir.storage import load_program, save_program
    from graphopt.ir.weights import Drawn
    from graphopt.measure.context import Context
    from graphopt.passes import parse_pipeline
    from graphopt.passes.framework.manager import run_pass

    began, memory = time.perf_counter(), anonymous_bytes()
    program = capture_configuration(configuration(layers))
    capture = time.perf_counter() - began
    captured = anonymous_bytes()
    began = time.perf_counter()
    blocks = len(program.anatomy.blocks)
    anatomy = time.perf_counter() - began
    began = time.perf_counter()
    cost(program, {"batch": 1, "sequence": 4096}, "h200")
    costing = time.perf_counter() - began
    began = time.perf_counter()
    current = program
    for step in parse_pipeline(pipeline):
        current, _ = run_pass(current, step, Context(), verify_with="off")
    passes = time.perf_counter() - began
    overhead = anatomy + costing + passes
    print(
        f"{layers:>4} layers  {len(program.nodes):>6} nodes  {blocks:>4} blocks  capture {capture:6.1f} s  "
        f"anatomy {anatomy:5.2f} s  cost {costing:5.2f} s  passes {passes:5.2f} s  "
        f"overhead/capture {overhead / capture:.3f}  "
        f"anonymous memory: capture +{(captured - memory) / 1e6:.0f} MB, "
        f"after passes +{(anonymous_bytes() - memory) / 1e6:.0f} MB",
        flush=True,
    )
    toy = capture_configuration(configuration(layers, toy=True), dtype=torch.float32)
    for name, weight in list(toy.weights.items()):
        if weight.kind == "parameter":
            toy.weights[name] = weight.with_source(
                Drawn(tuple(weight.source.shape), weight.source.dtype, 0, 0.05)
            )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        save_program(toy, f"{folder}/program")
        saving = time.perf_counter() - began
        began = time.perf_counter()
        load_program(f"{folder}/program")
        loading = time.perf_counter() - began
    print(f"      saved in {saving:.2f} s, loaded in {loading:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 40, 80, 160])
    parser.add_argument(
        "--passes", default="fuse-projections, split-projections, fold-norms, skip-layers{layers=[3 4]}"
    )
    arguments = parser.parse_args()
    if len(arguments.layers) == 1:
        one(arguments.layers[0], arguments.passes)
        return
    # a process each, so that memory of one depth is not that of another
    for layers in arguments.layers:
        subprocess.run(
            [sys.executable, __file__, "--layers", str(layers), "--passes", arguments.passes], check=True
        )


if __name__ == "__main__":
    main()
