"""What dropped sync points and four-bit sums cost the small Llama, on text it was neither trained nor calibrated on.

    python examples/tensor_parallel.py [--ranks 4 8] [--quick]

Writes tensor_parallel.json and, with matplotlib, tensor_parallel.png beside this script; goes on where it stopped. Small
models are the hard case for SPD: the paper finds blocks that bear no dropping only in its smallest ones.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table
from study import CALIBRATION, HERE, MODELS, Results, calibration, perplexity, reference_model

import graphopt
from graphopt.ir.ranks.rank_programs import synchronisations
from graphopt.training import Settings, Shown
from graphopt.training.distillation import distil_sync_points

BITS = (2, 3, 4, 5, 6, 8)
KINDS = {
    "4 bits, calibrated outliers": "",
    "4 bits, random outliers": "outliers=random",
    "4 bits, no outliers": "outliers=none",
    "4 bits, a scale per 32 values": "group=32 outliers=none",
    "4 bits, a scale per 64 values": "group=64 outliers=none",
    "4 bits, two steps": "algorithm=two-step",
}


def quantized(program: graphopt.Program, options: str, sequences: int) -> graphopt.Program:
    """Quantise the sums that are left; the contract is judged here, on other data."""
    data = calibration(program, sequences)
    return graphopt.optimize(program, "quantize-communication{" + options + "}", data=data, verify="off")


def dropped(program: graphopt.Program, names: list[str]) -> graphopt.Program:
    """Drop the sync points after these attentions."""
    if not names:
        return program
    numbers = " ".join(name.split(".")[1] for name in names)
    return graphopt.optimize(program, "drop-sync-points{blocks=[" + numbers + "]}", verify="off")


def study(ranks: int, results: Results, quick: bool) -> None:
    """Measure everything for one number of ranks."""
    judged, sequences = (16, 8) if quick else (96, 64)
    steps = 40 if quick else 640
    whole = reference_model("llama")
    program = graphopt.optimize(whole, f"shard-tensor-parallel{{size={ranks}}}")
    base = results.get(f"{ranks} ranks: as it was", lambda: perplexity(program, judged))
    scores = results.get(f"{ranks} ranks: scores", lambda: sensitivities(program, sequences))
    order = sorted((n for n in scores if n != "base"), key=lambda n: scores[n])
    training = Settings(steps=steps, learning_rate=3e-4, warmup=steps // 20)
    work = MODELS / "runs" / f"tensor_parallel_{ranks}_{steps}"

    def distilled(names: list[str]) -> graphopt.Program:
        return distil_sync_points(
            program, names, CALIBRATION, training, work_dir=work, length=256, progress=Shown("distilling")
        )[0]

    for count in (2, 4, 6, 8):
        names = order[:count]
        results.get(
            f"{ranks} ranks: {count} of 8 dropped", lambda n=names: perplexity(dropped(program, n), judged)
        )
        results.get(
            f"{ranks} ranks: {count} of 8 dropped, distilled",
            lambda n=names: perplexity(distilled(n), judged),
        )
    for bits in BITS:
        results.get(
            f"{ranks} ranks: {bits} bits",
            lambda b=bits: perplexity(quantized(program, f"bits={b}", sequences), judged),
        )
    for kind, options in KINDS.items():
        results.get(
            f"{ranks} ranks: {kind}", lambda o=options: perplexity(quantized(program, o, sequences), judged)
        )
    best: tuple[float, str] | None = None
    for count in (8, 7, 6, 5, 4, 3, 2, 1):
        for bits in (4, 5, 6):
            key = f"{ranks} ranks: {count} dropped and distilled, {bits} bits"
            value = results.get(
                key,
                lambda c=count, b=bits: perplexity(
                    quantized(distilled(order[:c]), f"bits={b}", sequences), judged
                ),
            )
            if value <= base * 1.01 and best is None:
                best = (value, key)
        if best is not None:
            break
    results.get(f"{ranks} ranks: largest combination under 1 %", lambda: best[1] if best else "none")
    results.get(f"{ranks} ranks: all-reduces", lambda: len(synchronisations(program)))


def sensitivities(program: graphopt.Program, sequences: int) -> dict[str, float]:
    """Return the sensitivity of each block, by the backward sweep."""
    from graphopt.measure.context import Context
    from graphopt.passes.tensor_parallel.sensitivity import backward_sweep

    context = Context(calibration(program, sequences), work_dir=MODELS / "runs" / "sensitivity")
    return {n: round(v, 5) for n, v in backward_sweep(program, context, "perplexity", print).items()}


def grouping(results: Results, quick: bool) -> None:
    """Head grouping has something to choose where ranks get several key-value heads: here at two ranks."""
    judged, sequences = (16, 8) if quick else (96, 32)
    whole = reference_model("llama")
    data = calibration(whole, sequences)
    results.get(
        "2 ranks: as it was",
        lambda: perplexity(graphopt.optimize(whole, "shard-tensor-parallel{size=2}"), judged),
    )
    for title, first in {
        "": "",
        ", heads grouped": "group-heads{size=2}, ",
        ", heads grouped, not matched": "group-heads{size=2 match=false}, ",
    }.items():
        for count in (4, 8):

            def measure(first: str = first, count: int = count) -> float:
                made = graphopt.optimize(whole, first + "shard-tensor-parallel{size=2}", data=data)
                names = [f"attention.{i}" for i in range(8 - count, 8)]
                return perplexity(dropped(made, names), judged)

            results.get(f"2 ranks: last {count} dropped{title}", measure)


def show(results: Results, ranks: list[int]) -> None:
    """Print the tables, and draw them."""
    for number in ranks:
        base = results.rows[f"{number} ranks: as it was"]
        table = Table("", "perplexity", "loss", title=f"{number} ranks", box=None)
        for key, value in results.rows.items():
            if key.startswith(f"{number} ranks") and isinstance(value, float):
                table.add_row(key.partition(": ")[2], f"{value:.3f}", f"{value / base - 1:+.2%}")
        Console(width=120).print(table)
        Console().print(results.rows.get(f"{number} ranks: largest combination under 1 %", ""))
    draw(results, ranks)


def draw(results: Results, ranks: list[int]) -> None:
    """Draw sensitivities and losses; without matplotlib there is no picture."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4))
    for place, number in enumerate(n for n in ranks if f"{n} ranks: scores" in results.rows):
        base = results.rows[f"{number} ranks: as it was"]
        scores = {k: v for k, v in results.rows[f"{number} ranks: scores"].items() if k != "base"}
        origin = results.rows[f"{number} ranks: scores"]["base"]
        left.bar([i + 0.4 * place for i in range(len(scores))], [100 * v / origin for v in scores.values()], 0.4,
                 label=f"{number} ranks")  # fmt: skip
        for title in ("", ", distilled"):
            points = [(c, results.rows.get(f"{number} ranks: {c} of 8 dropped{title}")) for c in (2, 4, 6, 8)]
            points = [(c, 100 * (v / base - 1)) for c, v in points if v is not None]
            middle.plot(*zip(*points, strict=True), "o--" if title else "o-", label=f"{number} ranks{title}")
        points = [(b, 100 * (results.rows[f"{number} ranks: {b} bits"] / base - 1)) for b in BITS]
        right.plot(*zip(*points, strict=True), "o-", label=f"{number} ranks")
    for level, name in ((0.5, "insensitive"), (5, "sensitive")):
        left.axhline(level, linestyle=":", color="grey")
        left.text(0, level, f" {name} up to here", fontsize=7, va="bottom")
    left.set(
        yscale="symlog",
        xlabel="attention block",
        ylabel="sensitivity, % of perplexity",
        title="What each sync point is worth",
    )
    middle.set(
        yscale="symlog", xlabel="sync points dropped, of 8", ylabel="loss of perplexity, %", title="Dropped"
    )
    right.set(
        yscale="symlog", xlabel="bits", ylabel="loss of perplexity, %", title="Quantised (one outlier in 64)"
    )
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "tensor_parallel.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--quick", action="store_true", help="little data and few steps: to see that it runs")
    arguments = parser.parse_args()
    results = Results(HERE / ("tensor_parallel_quick.json" if arguments.quick else "tensor_parallel.json"))
    for ranks in arguments.ranks:
        study(ranks, results, arguments.quick)
    grouping(results, arguments.quick)
    show(results, [2, *arguments.ranks])


if __name__ == "__main__":
    main()
