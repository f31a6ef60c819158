"""Dropped sync points and four-bit sums over real processes: ratios of times, and what the cost model says.

    python benchmarks/communication.py [--ranks 2 4] [--rates 100 1000]        (rates in Mbit/s; loopback is always run)
    python benchmarks/communication.py --llama-70b                              (prediction alone, no processes)

Two processes are joined by a link of limited rate where the machine permits network namespaces (root, iproute2); else, and
for four processes, over the loopback interface. The four programs take turns in the same processes. Times are medians; a
ratio below 1 is faster than the sharded original. Beside each stands the ratio that the cost model gives, with the link
fitted to plain all-reduces in the same processes: the time measured for the original, less what the model saves in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KINDS = ("original", "dropped", "quantised", "both")
SIZES = {"one token": (1, 1), "a prompt of 256": (1, 256)}


def make(folder: Path, ranks: int) -> None:
    """Save the four programs: a Llama of 12 layers, random weights."""
    import torch
    import transformers

    import graphopt

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 512, (2, 16))
    program = graphopt.optimize(model, f"shard-tensor-parallel{{size={ranks}}}", inputs={"input_ids": ids})
    data = [{"input_ids": torch.randint(0, 512, (2, 128))} for _ in range(2)]
    quantise = "quantize-communication{algorithm=two-step}" if ranks > 2 else "quantize-communication"
    pipelines = {"original": "", "dropped": "drop-sync-points{fraction=1}", "quantised": quantise}
    pipelines["both"] = f"{pipelines['dropped']}, {quantise}"
    for kind, passes in pipelines.items():
        made = graphopt.optimize(program, passes, data=data, verify="off") if passes else program
        made.save(folder / kind)


def work(folder: Path, rounds: int) -> None:
    """What each rank runs: all programs in turn, then the fit of the link."""
    import torch

    import graphopt
    from graphopt.ir import groups
    from graphopt.ir.cost import communication
    from graphopt.ir.cost.link_fit import fit, measure

    torch.set_num_threads(1)
    groups.join()
    programs = {kind: graphopt.load(folder / kind) for kind in KINDS}
    modules = {kind: program.module(fold_weights=True).eval() for kind, program in programs.items()}
    ranks = groups.world_size()
    link = fit(measure(rounds=10), ranks)
    result: dict[str, object] = {"link": f"{link.latency * 1e6:.0f} µs, {link.bandwidth / 1e6:.0f} MB/s"}
    for title, (batch, length) in SIZES.items():
        ids = torch.zeros(batch, length, dtype=torch.long)
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        with torch.no_grad():
            for number in range(rounds + 2):
                for kind in KINDS if number % 2 else KINDS[::-1]:
                    groups.barrier()
                    began = time.perf_counter()
                    modules[kind](input_ids=ids)
                    groups.barrier()
                    times[kind].append(time.perf_counter() - began)
        middle = {kind: statistics.median(values[2:]) for kind, values in times.items()}
        sizes = {"batch": batch, "sequence": length}
        spent = {
            kind: sum(s.seconds or 0 for s in communication(p, link, sizes, algorithm="ring"))
            for kind, p in programs.items()
        }
        sent = {kind: sum(s.sent for s in communication(p, None, sizes)) for kind, p in programs.items()}
        result[title] = {
            kind: {
                "milliseconds": round(1e3 * middle[kind], 2),
                "ratio": round(middle[kind] / middle["original"], 3),
                "predicted": round(1 - (spent["original"] - spent[kind]) / middle["original"], 3),
                "sent": sent[kind],
            }
            for kind in KINDS
        }
    if groups.rank() == 0:
        print(json.dumps(result))


@contextlib.contextmanager
def shaped(rate: int) -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a link of ``rate`` Mbit/s each way; yields what to put before each command."""
    names, ends = ["graphopt-a", "graphopt-b"], ["ga", "gb"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
            limit = ["tbf", "rate", f"{rate}mbit", "burst", "64kb", "latency", "400ms"]
            subprocess.run(
                ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", end, "root", *limit],
                check=True, capture_output=True,
            )  # fmt: skip
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run(folder: Path, ranks: int, rounds: int, prefixes: list[list[str]] | None = None) -> None:
    """Start the ranks and print what the first says."""
    address = "10.77.0.1" if prefixes else "127.0.0.1"
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": address,
            "MASTER_PORT": "29577", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        if prefixes:
            environment["GLOO_SOCKET_IFNAME"] = ["ga", "gb"][rank]
        command = [sys.executable, __file__, "--work", str(folder), "--rounds", str(rounds)]
        processes.append(
            subprocess.Popen([*(prefixes[rank] if prefixes else []), *command], env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )  # fmt: skip
    outputs = [process.communicate(timeout=1200) for process in processes]
    if any(process.returncode for process in processes):
        print("\n".join(error[-600:] for _, error in outputs), file=sys.stderr)
        return
    found = json.loads(outputs[0][0].strip().splitlines()[-1])
    print(f"  fitted link: {found.pop('link')}")
    for title, rows in found.items():
        for kind, row in rows.items():
            print(
                f"  {title:16s} {kind:10s} {row['milliseconds']:9.2f} ms  ratio {row['ratio']:.3f}  "
                f"predicted {row['predicted']:.3f}  {row['sent']} bytes a rank"
            )
    sys.stdout.flush()


def predict() -> None:
    """LLaMA2-70B on eight A100, 70 % of the sync points after attention dropped, by the cost model alone."""
    sys.path.insert(0, str(Path(__file__).parent))
    from large_models import configuration

    import graphopt
    from graphopt.frontends.huggingface import capture_configuration
    from graphopt.ir.cost import communication
    from graphopt.ir.cost.collectives import Link

    program = capture_configuration(configuration(80))
    sharded = graphopt.optimize(program, "shard-tensor-parallel{size=8}", verify="off")
    dropped = graphopt.optimize(sharded, "drop-sync-points{fraction=0.7}", verify="off")
    quantised = graphopt.optimize(dropped, "quantize-communication{group=128 outliers=none}", verify="off")
    # an NCCL all-reduce takes 5 to 10 µs end to end however short; over Ethernet a hop takes 30 µs
    links = [Link("300 GB/s", 300e9, 5e-6), Link("10 GB/s", 10e9, 30e-6)]
    for link in links:
        for batch, length in ((1, 1), (1, 128), (1, 2048)):
            sizes = {"batch": batch, "sequence": length}
            times = {}
            for name, each in (("original", sharded), ("dropped", dropped), ("both", quantised)):
                compute = graphopt.cost(sharded, sizes=sizes, device="a100").time_seconds or 0.0
                sent = sum(s.seconds or 0.0 for s in communication(each, link, sizes))
                times[name] = compute + sent
            share = 1 - compute / times["original"]
            faster = times["original"] / times["dropped"] - 1
            both = times["original"] / times["both"] - 1
            print(
                f"{link.name:9s} {length:5d} tokens: {1e3 * times['original']:.2f} ms, {share:.0%} of it communication; "
                f"70 % dropped: {faster:+.1%} faster, with 4-bit sums as well: {both:+.1%} (paper: 19.7 %)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--rates", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--llama-70b", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.rounds)
        return
    if arguments.llama_70b:
        predict()
        return
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make(folder, ranks)
            print(f"{ranks} processes, loopback")
            run(folder, ranks, arguments.rounds)
            for rate in arguments.rates if ranks == 2 else []:
                print(f"{ranks} processes, {rate} Mbit/s")
                try:
                    with shaped(rate) as prefixes:
                        run(folder, ranks, arguments.rounds, prefixes)
                except (OSError, subprocess.CalledProcessError) as problem:
                    print(f"  this machine permits no such link: {problem}")


if __name__ == "__main__":
    main()
