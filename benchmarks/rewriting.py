"""Rewrite the SwiGLU of every layer of a Llama: ours against torch's two rewriters, side by side in one run.

    python benchmarks/rewriting.py --layers 32 --runs 5

All three replace ``silu(gate) * up`` by ``up * (gate * sigmoid(gate))`` at the same sites. Ours includes
inferring and checking the shapes of all new nodes, which replace_pattern leaves out; replace_pattern compiles
the graph itself. The time of making the graph runnable again afterwards is shown apart. Medians, and ratios
to ours.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from torch.nn import functional as F

import graphopt
from graphopt.ir.checking.verify import verify


def model(layers: int):
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
                                      num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
                                      use_cache=False)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def pattern(gate, up):
    return F.silu(gate) * up


def replacement(gate, up):
    return up * (gate * torch.sigmoid(gate))


def ours(program):
    done = graphopt.rewrite(program, pattern, replacement)
    verify(program, list(program.edit.touched))
    return len(done)


def fx_replace(module):
    def before(gate, up):
        return torch.ops.aten.mul.Tensor(torch.ops.aten.silu.default(gate), up)

    def after(gate, up):
        return torch.ops.aten.mul.Tensor(
            up, torch.ops.aten.mul.Tensor(gate, torch.ops.aten.sigmoid.default(gate))
        )

    found = torch.fx.subgraph_rewriter.replace_pattern(module, before, after)
    return len(found)


def inductor(module):
    from torch._inductor.pattern_matcher import Arg, CallFunction, PatternMatcherPass, register_graph_pattern

    patterns, count = PatternMatcherPass(), 0

    @register_graph_pattern(
        CallFunction(torch.ops.aten.mul.Tensor, CallFunction(torch.ops.aten.silu.default, Arg()), Arg()),
        pass_dict=patterns,
    )
    def handle(match, gate, up):
        nonlocal count
        count += 1
        node = match.output_node()
        with node.graph.inserting_before(node):
            sigmoid = node.graph.call_function(torch.ops.aten.sigmoid.default, (gate,))
            product = node.graph.call_function(torch.ops.aten.mul.Tensor, (gate, sigmoid))
            new = node.graph.call_function(torch.ops.aten.mul.Tensor, (up, product))
        node.replace_all_uses_with(new)
        match.erase_nodes()

    patterns.apply(module.graph)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    network = model(arguments.layers)
    ids = torch.randint(0, 128, (3, 13))
    program = graphopt.capture(network, {"input_ids": ids}, compare=False)
    with torch.no_grad():
        exported = torch.export.export(network, (), {"input_ids": ids}, strict=False)
    module = exported.module()
    print(
        f"{arguments.layers} layers; our graph {len(program.nodes)} nodes, "
        f"torch's {len(list(module.graph.nodes))}"
    )
    ways = {
        "graphopt.rewrite": (ours, program.copy),
        "torch.fx replace_pattern": (fx_replace, lambda: copy.deepcopy(module)),
        "Inductor PatternMatcherPass": (inductor, lambda: copy.deepcopy(module)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    compiling: dict[str, list[float]] = {name: [] for name in ways}
    sites: dict[str, int] = {}
    for _ in range(arguments.runs):
        for name, (run, fresh) in ways.items():
            graph = fresh()
            began = time.perf_counter()
            sites[name] = run(graph)
            times[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            if isinstance(graph, torch.fx.GraphModule):
                graph.recompile()
            else:
                torch.fx.GraphModule(torch.nn.Module(), graph.graph)
            compiling[name].append(time.perf_counter() - began)
    base = statistics.median(times["graphopt.rewrite"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(
            f"{name:<28} {sites[name]:>3} sites  median {middle * 1e3:7.1f} ms  "
            f"min {min(taken) * 1e3:7.1f} ms  ratio to ours {middle / base:.2f}"
        )


if __name__ == "__main__":
    main()
