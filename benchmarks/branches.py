"""Fused branches against the same network written by hand with one convolution a stage, and against the training form.

    python benchmarks/branches.py [--layers 10 50 200]

Prints ratios of times, the two sides run alternately in one process, in torch and in ONNX Runtime; peak memory of
activations; and what fusing costs against capturing as networks get deeper.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from branch_networks import NETWORKS, randomised, repvgg_block

ROUNDS = 200


def by_hand(program: graphopt.Program) -> nn.Module:
    """Return the deployed network as somebody would write it: convolutions with the fused kernels, and ReLU."""
    from graphopt.ir.running.fold import fold
    from graphopt.ir.schema import arguments, is_operator

    folded = fold(program)
    layers: list[nn.Module] = []
    for node in folded.graph.nodes:
        if is_operator(node, "aten.conv2d"):
            found = arguments(node)
            kernel = folded.weights[found["weight"].name].source.load()
            o, i = kernel.shape[0], kernel.shape[1] * found["groups"]
            made = nn.Conv2d(
                i, o, tuple(kernel.shape[2:]), tuple(found["stride"]), tuple(found["padding"]),
                tuple(found["dilation"]), found["groups"],
            )  # fmt: skip
            made.weight.data = kernel
            assert made.bias is not None
            made.bias.data = folded.weights[found["bias"].name].source.load()
            layers.append(made)
        elif is_operator(node, "aten.relu"):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).eval()


def ratio(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """Return the median of time(first) / time(second) over rounds, and its quartiles; sides take turns."""
    for run in (first, second, first, second):
        run()
    found = []
    for index in range(rounds):
        times = {}
        for name, run in ((0, first), (1, second)) if index % 2 else ((1, second), (0, first)):
            began = time.perf_counter()
            run()
            times[name] = time.perf_counter() - began
        found.append(times[0] / times[1])
    low, middle, high = statistics.quantiles(found, n=4)
    return middle, low, high


def session(
    module: nn.Module | graphopt.Program, x: torch.Tensor, folder: Path, name: str
) -> Callable[[], Any]:
    """Return a run of the network in ONNX Runtime on one thread."""
    import onnxruntime

    path = folder / f"{name}.onnx"
    program = module if isinstance(module, graphopt.Program) else graphopt.capture(module, x)
    program.lower("onnx", path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(path, options)
    given = {made.get_inputs()[0].name: x.numpy()}
    return lambda: made.run(None, given)


def compare(name: str, x: torch.Tensor) -> None:
    """Print the ratios of one network; its head is left out so that all of it is convolutions."""
    torch.manual_seed(0)
    head = (nn.Linear, nn.Flatten, nn.AdaptiveAvgPool2d)
    network = randomised(nn.Sequential(*(m for m in NETWORKS[name][0]() if not isinstance(m, head))))
    fused = graphopt.optimize(network, "fuse-branches", inputs=x)
    hand = by_hand(fused)
    module = fused.module(fold_weights=True).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        assert torch.allclose(hand(x), fused(x), atol=1e-3 * float(fused(x).abs().max()))
        rows = {
            "torch: by hand / itself, which is the noise": ratio(lambda: hand(x), lambda: hand(x)),
            "torch: fused / by hand": ratio(lambda: module(x), lambda: hand(x)),
            "ONNX Runtime: fused / by hand": ratio(
                session(fused, x, folder, "f"), session(hand, x, folder, "h")
            ),
            "torch: training form / fused": ratio(lambda: network(x), lambda: module(x), 50),
            "ONNX Runtime: training form / fused": ratio(
                session(graphopt.capture(network, x), x, folder, "t"), session(fused, x, folder, "g"), 50
            ),
        }
    for what, (middle, low, high) in rows.items():
        print(f"{name}: {what}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})", flush=True)
    sizes = dict(zip(graphopt.capture(network, x).signature.sizes, (x.shape[0], *x.shape[2:]), strict=False))
    before, after, written = (
        graphopt.cost(p, sizes=sizes).peak_memory
        for p in (graphopt.capture(network, x), fused, graphopt.capture(hand, x))
    )
    print(
        f"{name}: peak memory of activations: {before / 1e6:.2f} -> {after / 1e6:.2f} MB (by hand {written / 1e6:.2f})"
    )


def depth(layers: int) -> None:
    """Print what fusing costs against capturing."""
    torch.manual_seed(0)
    network = nn.Sequential(repvgg_block(3, 8), *(repvgg_block(8, 8) for _ in range(layers - 1))).eval()
    x = torch.randn(1, 3, 16, 16)
    began = time.perf_counter()
    program = graphopt.capture(network, x)
    captured = time.perf_counter() - began
    began = time.perf_counter()
    graphopt.optimize(program, "fuse-branches")
    fused = time.perf_counter() - began
    nodes = len(list(program.graph.nodes))
    share = f"{fused / captured:.3f} of it"
    print(
        f"{layers} layers, {nodes} nodes: capture {captured:.2f} s, fuse {fused:.2f} s, {share}", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[10, 50, 200])
    parser.add_argument("--networks", nargs="*", default=["repvgg", "mobileone", "acnet"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.networks:
        compare(name, torch.randn(8, 3, 224, 224))
    for layers in arguments.layers:
        depth(layers)
