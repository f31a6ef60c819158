"""Capture of checkpoint folders beside torch.export alone of the same model, in CPU seconds.

    python benchmarks/capture.py [--only NAMES...] [--repeats 1]

Each model has random weights and is written as a folder; its width is small, since tracing costs the same at any width.
One process a model: after a capture of few layers, which loads what torch loads once, it times torch.export alone, the
capture without and with comparison, the capture whose layers are all exported, and a second capture. Ratios are those of
one process. Peak memory is that of processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["GRAPHOPT_CACHE"] = "off"
BASE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
GROUPED = {**BASE, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama, 30 layers": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 30}),
    "Llama, 80 layers": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 80}),
    "Llama, 160 layers": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 160}),
    "Gemma 3, 18 layers of two kinds": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GROUPED, "num_hidden_layers": 18, "head_dim": 8, "sliding_window": 64},
    ),
    "Qwen3-MoE, 24 layers": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**GROUPED, "num_hidden_layers": 24, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2,
         "moe_intermediate_size": 24},
    ),
}  # fmt: skip


def write(name: str, folder: Path, layers: int | None = None) -> None:
    """Write a model with random weights."""
    import torch
    import transformers

    config_class, model_class, options = MODELS[name]
    config = getattr(transformers, config_class)(
        **{**options, **({"num_hidden_layers": layers} if layers else {})}
    )
    torch.manual_seed(0)
    getattr(transformers, model_class)(config).to(torch.float32).save_pretrained(folder)


def timed(function: Callable[[], Any]) -> float:
    """Return CPU seconds of all threads."""
    began = time.process_time()
    function()
    return time.process_time() - began


def export_alone(folder: Path) -> float:
    """Return CPU seconds of torch.export, of a model without memory whose building is not counted."""
    import torch
    from torch.utils._pytree import tree_map

    from graphopt.frontends import huggingface
    from graphopt.frontends.architecture import build, load_config
    from graphopt.frontends.checkpoint_files import read_folder
    from graphopt.frontends.example_inputs import Given, example_inputs
    from graphopt.ir.compat import new_fake_mode

    config = load_config(folder, read_folder(folder).config)
    model, mode = build(config, torch.float32, "sdpa"), new_fake_mode()
    huggingface._fake(model, mode)
    example = example_inputs(model, Given())
    with mode, torch.no_grad():
        fakes = tree_map(lambda v: torch.empty(v.shape, dtype=v.dtype), example.inputs)
        return timed(lambda: huggingface._export(model, fakes, "auto", example.sizes))


def full(folder: Path) -> None:
    """Capture with all layers exported, without comparison."""
    from graphopt.frontends import huggingface
    from graphopt.frontends.stamping.record import CannotStamp

    planned = huggingface.plan_stamping
    huggingface.plan_stamping = lambda *_: CannotStamp("a benchmark exports all layers")
    try:
        huggingface.capture_huggingface(folder, compare=False)
    finally:
        huggingface.plan_stamping = planned


def one(name: str, folder: Path) -> dict[str, float]:
    """Time a model in this process."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from graphopt.frontends.huggingface import capture_huggingface

    with tempfile.TemporaryDirectory() as small:
        write(name, Path(small), layers=4)
        capture_huggingface(small)
        export_alone(Path(small))
    return {
        "export": export_alone(folder),
        "stamped": timed(lambda: capture_huggingface(folder, compare=False)),
        "compared": timed(lambda: capture_huggingface(folder)),
        "full": timed(lambda: full(folder)),
    }


def peak(name: str, folder: Path, how: str) -> float:
    """Return the peak memory in MiB of a capture in this process."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from graphopt.frontends.huggingface import capture_huggingface

    full(folder) if how == "full" else capture_huggingface(folder, compare=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(*arguments: str) -> Any:
    """Run this file in a process of its own and return what it prints last."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        print(json.dumps(one(options.time[0], Path(options.time[1]))))
        return
    if options.peak:
        print(json.dumps(peak(options.peak[0], Path(options.peak[1]), options.peak[2])))
        return
    print("CPU seconds; in brackets: over torch.export alone in the same process; memory in MiB at the peak")
    print(
        "| model | export alone | capture | with comparison | all layers exported | memory | all exported |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            write(name, Path(folder))
            memory = [child("--peak", name, folder, how) for how in ("stamped", "full")]
            for _ in range(options.repeats):
                found = child("--time", name, folder)
                base = found["export"]
                cells = [f"{found[k]:.2f} ({found[k] / base:.3f})" for k in ("stamped", "compared", "full")]
                print(
                    f"| {name} | {base:.2f} | {' | '.join(cells)} | {memory[0]:.0f} | {memory[1]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
