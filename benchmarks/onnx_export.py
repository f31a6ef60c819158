"""Seconds from a Program to an ONNX graph: graphopt's export against plain ``torch.onnx.export``.

Both start from the same program in one process, on a Llama of small width, and end with an optimised graph
in memory, so that neither writes, checks nor compares. ``plain`` gets the program as an ExportedProgram;
``original`` gets what ``torch.export`` makes of the model.

    python benchmarks/onnx_export.py --layers 16 --opset 20
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from graphopt.backends.checking.sizes import static_sizes
from graphopt.backends.onnx.graph import build_graph
from graphopt.backends.onnx.sizes import with_sizes
from graphopt.backends.torch.exported import exported_program
from graphopt.frontends.torch_module import capture_module


def llama(layers: int, hidden: int) -> torch.nn.Module:
    """Return a Llama of random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=hidden, intermediate_size=hidden * 3 // 2, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--opset", type=int, default=20)
    parser.add_argument(
        "--static", action="store_true", help="batch 1, sequence 128 instead of dynamic sizes"
    )
    parser.add_argument(
        "--original", action="store_true", help="also export what torch.export makes of the model"
    )
    options = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    def plain(exported: torch.export.ExportedProgram) -> Any:
        program = torch.onnx.export(exported, dynamo=True, verbose=False, opset_version=options.opset)
        assert program is not None
        return program.model

    def case(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor], Any]:
        model = llama(layers, options.hidden)
        ids = torch.randint(5, 100, (3, 13))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        program = capture_module(model, inputs, compare=False)
        sizes = static_sizes(program, {"batch": 1, "sequence": 128}) if options.static else {}
        return model, inputs, with_sizes(program, sizes)

    # what is loaded at first use is nobody's time
    warm = case(1)[2]
    build_graph(warm, options.opset)
    plain(exported_program(warm))

    model, inputs, program = case(options.layers)
    ours, graph = timed(lambda: build_graph(program, options.opset))
    theirs, other = timed(lambda: plain(exported_program(program)))
    sizes = "static" if options.static else "dynamic"
    print(f"Llama of {options.layers} layers, opset {options.opset}, {sizes} sizes")
    print(f"graphopt              {ours:7.2f} s  {len(graph.graph):5d} nodes")
    print(f"torch.onnx.export     {theirs:7.2f} s  {len(other.graph):5d} nodes  ratio {theirs / ours:.1f}")
    if options.original:
        dims = None if options.static else {k: dict.fromkeys(range(2), torch.export.Dim.AUTO) for k in inputs}
        if options.static:
            inputs = {k: v[:1].repeat(1, 10)[:, :128].clone() for k, v in inputs.items()}
        captured = torch.export.export(model, (), inputs, dynamic_shapes=dims, strict=False)
        original, other = timed(lambda: plain(captured))
        nodes = f"{len(other.graph):5d} nodes"
        print(f"  from torch.export   {original:7.2f} s  {nodes}  ratio {original / ours:.1f}")


if __name__ == "__main__":
    main()
