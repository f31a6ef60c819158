"""What nested experts, big and small ones, fewer active experts and pruning cost the reference models.

    python examples/experts.py [dynamoe duo phds pruning] [--quick]

Each part writes its numbers to experts_PART.json beside this script and goes on where it stopped; experts.png is drawn of
all of them. Text judged is neither trained nor calibrated on. Everything runs on one thread, one part at a time or several
side by side.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from study import (
    CALIBRATION,
    HERE,
    JUDGED,
    MODELS,
    TRAINING,
    Results,
    calibration,
    perplexity,
    reference_model,
)

import graphopt
from graphopt.training import Settings, Shown

PARTS = ("dynamoe", "duo", "phds", "pruning")
SHARES = (0.25, 0.5, 0.75, 1.0)


Lazily = Callable[[], graphopt.Program]


class Study:
    """One part: its numbers, how much it trains and judges.

    Args:
        part: its name.
        quick: few steps and rows, to see that it runs.
    """

    def __init__(self, part: str, quick: bool):
        self.quick = quick
        self.results = Results(HERE / f"experts_{part}{'_quick' if quick else ''}.json")
        self.rows = 8 if quick else 64
        rate = 5e-4 if part == "phds" else 3e-4
        self.settings = Settings(steps=4 if quick else 400, learning_rate=rate, warmup=1 if quick else 20)

    def trained(self, program: Lazily, recipe: str, name: str, **changes: Any) -> Lazily:
        """Return what trains a program, or takes up what was trained, once its result is asked for."""

        @functools.cache
        def train() -> graphopt.Program:
            settings = replace(self.settings, **changes)
            work = MODELS / "runs" / f"experts_{name}_{settings.steps}"
            done, record = graphopt.train(
                program(), recipe, TRAINING, settings, batch=8, length=256, work_dir=work, device="cpu",
                progress=Shown(name),
            )  # fmt: skip
            self.results.get(f"{name}: seconds a step", lambda: round(record.seconds / record.step, 2))
            return done

        return train

    def judge(self, program: graphopt.Program) -> float:
        """Return the perplexity on validation text."""
        return perplexity(program, self.rows)


def frozen(program: graphopt.Program, value: float, dial: str = "") -> graphopt.Program:
    """Return a program with its run-time setting at a value for good."""
    name = f"dial={dial} " if dial else ""
    return graphopt.optimize(program, f"freeze-dial{{{name}value={value}}}", verify="off")


def at_share(program: graphopt.Program, share: float) -> float:
    """Return the setting of delta at which feed-forwards are this wide in the mean, on calibration text."""
    low, high = 0.0, 1.0
    if share <= 0.25 or share >= 1:
        return low if share <= 0.25 else high
    for _ in range(9):
        middle = (low + high) / 2
        (point,) = graphopt.sweep(program, CALIBRATION, settings=[middle], sequences=8, length=256)
        low, high = (middle, high) if point.share < share else (low, middle)
    return (low + high) / 2


def dynamoe(study: Study) -> None:
    """Nested experts against models pruned to the same arithmetic, both trained for the same number of steps."""
    get = study.results.get
    llama = reference_model("llama")
    data = calibration(llama, 32)
    get("as it was", lambda: study.judge(llama))
    split = graphopt.optimize(llama, "split-ffn", data=data)
    for theta in (0.8,) if study.quick else (0.55, 0.8, 0.3):
        made = study.trained(lambda: split, f"dynamoe{{theta={theta}}}", f"dynamoe_{theta}")
        for share in SHARES:
            delta = get(
                f"theta {theta}, {share:.0%}: delta", lambda m=made, s=share: round(at_share(m(), s), 4)
            )

            def measure(made: Lazily = made, delta: float = delta) -> dict[str, float]:
                (point,) = graphopt.sweep(made(), JUDGED, settings=[delta], sequences=study.rows, length=256)
                return {"perplexity": round(point.values["perplexity"], 4), "share": round(point.share, 4),
                        "mflops": round(point.flops / 1e6, 4)}  # fmt: skip

            get(f"theta {theta}, {share:.0%}: routed", measure)
            if share in (0.5, 0.75):
                get(
                    f"theta {theta}, {share:.0%}: the same widths, given to other tokens",
                    lambda m=made, d=delta: shuffled(m(), d, study.rows),
                )
            if share < 1:
                get(
                    f"theta {theta}, {share:.0%}: every token the same width",
                    lambda m=made, s=share: study.judge(
                        graphopt.optimize(m(), f"extract-width{{width={s}}}", verify="off")
                    ),
                )
    for share in SHARES:
        pruned = llama
        if share < 1:
            text = f"prune-ffn{{fraction={1 - share} score=activation}}"
            pruned = graphopt.optimize(llama, text, data=data, verify="off")
            get(f"pruned to {share:.0%}", lambda p=pruned: study.judge(p))
        name = f"pruned_{int(100 * share)}"
        tuned = study.trained(lambda p=pruned: p, "language", name)
        get(f"pruned to {share:.0%}, trained", lambda t=tuned: study.judge(t()))


def shuffled(program: graphopt.Program, delta: float, rows: int) -> float:
    """Perplexity where each layer gives the widths that its router chose to tokens at random."""
    from graphopt.data.reading import read_data
    from graphopt.ir.running.execute import interpret
    from graphopt.measure.choices import nested_blocks, with_choices_as_input

    form = with_choices_as_input(program)
    choices = [b.parts["choice"] for b in nested_blocks(program)]
    generator = torch.Generator().manual_seed(0)
    given = []
    for batch in read_data(program, JUDGED, sequences=rows, length=256, shuffle=False)[0]:
        found = interpret(program, program.bind((), {**batch, "delta": delta}), record=choices, stop=True)
        each = [found[c.name] for c in choices]
        mixed = [c.flatten()[torch.randperm(c.numel(), generator=generator)].reshape(c.shape) for c in each]
        given.append({**batch, "routing": torch.stack(mixed)})
    return round(graphopt.evaluate(form, given, "perplexity").values["perplexity"], 4)


def duo(study: Study) -> None:
    """Big and small experts: routers against random routing and the oracle."""
    get = study.results.get
    llama = reference_model("llama")
    split = graphopt.optimize(llama, "split-ffn{widths=[1/16 1] separate=true}", data=calibration(llama, 32))
    get("all big, before", lambda: study.judge(llama))
    get("all small, before", lambda: study.judge(frozen(split, 0.0)))
    made = study.trained(lambda: split, "duo-distil{language=1}", "duo_distil")
    get("all big", lambda: study.judge(frozen(made(), 1.0)))
    get("all small", lambda: study.judge(frozen(made(), 0.0)))
    for target in (0.5,) if study.quick else (0.25, 0.5, 0.75):
        steps = study.settings.steps // 2
        routed = study.trained(
            made, f"duo-routers{{target={target}}}", f"duo_routers_{target}", steps=steps, learning_rate=3e-3
        )

        def measure(routed: Lazily = routed) -> dict[str, float]:
            (point,) = graphopt.sweep(routed(), JUDGED, settings=[0.5], sequences=study.rows, length=256)
            # the share of the arithmetic counts small experts too
            return {"perplexity": round(point.values["perplexity"], 4), "share": round(point.share, 4)}

        get(f"routers for {target:.0%} big", measure)
    get("random routing", lambda: random_routing(made(), 3 if study.quick else 100, study.rows))
    get("oracle", lambda: oracle(made(), 2 if study.quick else 96))


def random_routing(program: graphopt.Program, patterns: int, rows: int) -> dict[str, Any]:
    """Perplexities of random patterns of layers, half of them big, and of a random half for every token."""
    from graphopt.data.reading import read_data
    from graphopt.measure.choices import with_choices_as_input

    form = with_choices_as_input(program)
    batches = read_data(form, JUDGED, sequences=rows, length=256, shuffle=False)[0]
    generator = torch.Generator().manual_seed(0)
    layers = form.signature.inputs["routing"].shape[0]
    assert isinstance(layers, int)

    def judged(routes: Any) -> float:
        given = [{**b, "routing": routes(b["input_ids"].shape)} for b in batches]
        return graphopt.evaluate(form, given, "perplexity").values["perplexity"]

    found = []
    for _ in range(patterns):
        big = torch.zeros(layers, dtype=torch.long)
        big[torch.randperm(layers, generator=generator)[: layers // 2]] = 1
        found.append(judged(lambda shape, big=big: big[:, None, None].expand(layers, *shape).contiguous()))
    each = judged(lambda shape: torch.randint(2, (layers, *shape), generator=generator))
    found.sort()
    return {"best of patterns": round(found[0], 4), "median pattern": round(found[len(found) // 2], 4),
            "worst": round(found[-1], 4), "patterns": patterns, "token by token": round(each, 4),
            "rows": rows}  # fmt: skip


def oracle(program: graphopt.Program, tokens: int) -> dict[str, Any]:
    """Mean loss of the best path by how many feed-forwards are big, of all paths and of the usual ones."""
    found = graphopt.routing_oracle(program, JUDGED, tokens=tokens, length=128)
    return {
        "tokens": len(found.tokens),
        "all big": round(found.all_largest, 4),
        "exactly": {str(b): round(v, 4) for b, v in found.exactly.items()},
        "best": round(found.best, 4),
        "mean difficulty": round(found.mean_difficulty, 4),
    }


def phds(study: Study) -> None:
    """The run-time setting of active experts before and after training for it, and models trained at one number."""
    get = study.results.get
    mixture = graphopt.optimize(reference_model("mixture"), "dial-top-k")
    made = {
        "before": lambda: mixture,
        "multi-k": study.trained(lambda: mixture, "phds", "phds"),
        "multi-k, anchor 1": study.trained(lambda: mixture, "phds{anchor=1}", "phds_anchor"),
        "multi-k, anchor 1 in the second half": study.trained(
            lambda: mixture, "phds{anchor=1 anchor_from=0.5}", "phds_early"
        ),
        "trained at 1": study.trained(lambda: mixture, "language{dial=1}", "phds_at_1"),
        "trained at 2": study.trained(lambda: mixture, "language{dial=2}", "phds_at_2"),
    }
    for name, program in made.items():
        for k in (1, 2):
            get(f"{name}: {k} active", lambda p=program, k=k: study.judge(frozen(p(), k)))


def pruning(study: Study) -> None:
    """Experts and channels removed by importance and at random, without training."""
    get = study.results.get
    llama, mixture = reference_model("llama"), reference_model("mixture")
    get("llama", lambda: study.judge(llama))
    get("mixture", lambda: study.judge(mixture))
    seeds = range(1 if study.quick else 3)
    for fraction in (0.25, 0.5):
        for score in ("norm", "activation", "wanda", "contribution", "peak", "random"):
            for seed in seeds if score == "random" else range(1):
                get(
                    f"width -{fraction:.0%} by {score}" + (f", seed {seed}" if score == "random" else ""),
                    lambda f=fraction, s=score, n=seed: study.judge(
                        graphopt.optimize(
                            llama,
                            f"prune-ffn{{fraction={f} score={s}}}",
                            data=calibration(llama, 32),
                            verify="off",
                            seed=n,
                        )
                    ),
                )
        get(
            f"width -{fraction:.0%} by norm, cfsp",
            lambda f=fraction: study.judge(
                graphopt.optimize(
                    llama,
                    f"prune-ffn{{fraction={f} allocation=cfsp}}",
                    data=calibration(llama, 32),
                    verify="off",
                )
            ),
        )
    for keep in (6, 4):
        for score in ("weight", "count", "random"):
            for seed in seeds if score == "random" else range(1):
                get(
                    f"{keep} of 8 experts by {score}" + (f", seed {seed}" if score == "random" else ""),
                    lambda k=keep, s=score, n=seed: study.judge(
                        graphopt.optimize(
                            mixture,
                            f"prune-experts{{keep={k} score={s}}}",
                            data=calibration(mixture, 32),
                            verify="off",
                            seed=n,
                        )
                    ),
                )


def show(parts: list[str], quick: bool) -> None:
    """Print every number."""
    for part in parts:
        results = Results(HERE / f"experts_{part}{'_quick' if quick else ''}.json")
        table = Table("", "", title=part, box=None)
        for key, value in results.rows.items():
            table.add_row(key, str(value))
        Console(width=140).print(table)


def draw() -> None:
    """Draw what was measured; without matplotlib there is no picture."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    found = {part: Results(HERE / f"experts_{part}.json").rows for part in PARTS}
    if not all(found.values()):
        return
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    rows = found["dynamoe"]
    left.plot(
        [25, 50, 75, 100],
        [rows[f"pruned to {s:.0%}, trained"] for s in SHARES],
        "ko-",
        label="pruned, trained",
    )
    left.plot([25, 50, 75], [rows[f"pruned to {s:.0%}"] for s in SHARES[:3]], "k:", label="pruned")
    for theta in (0.3, 0.55, 0.8):
        points = [rows[f"theta {theta}, {s:.0%}: routed"] for s in SHARES]
        left.plot(
            [100 * p["share"] for p in points],
            [p["perplexity"] for p in points],
            "o-",
            label=f"routed, theta {theta}",
        )
    left.set(ylim=(20, 45), xlabel="mean width, %", ylabel="perplexity", title="Nested experts (DynaMoE)")
    rows = found["duo"]
    exact = rows["oracle"]["exactly"]
    middle.plot([int(b) for b in exact], list(exact.values()), "o-", label="best path with so many")
    middle.axhline(rows["oracle"]["all big"], color="grey", linestyle=":", label="all big")
    middle.set(xlabel="big feed-forwards, of 8", ylabel="nats a token", title="Oracle (Duo-LLM)")
    rows = found["phds"]
    for name in ("before", "multi-k", "trained at 1", "trained at 2"):
        right.plot([1, 2], [rows[f"{name}: {k} active"] for k in (1, 2)], "o-", label=name)
    right.set(xticks=[1, 2], xlabel="active experts", ylabel="perplexity", title="Setting of k (MoE-PHDS)")
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(HERE / "experts.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"out of {', '.join(PARTS)}; all of them if none is given")
    parser.add_argument("--quick", action="store_true", help="little data and few steps: to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = arguments.parts or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    for part in parts:
        {"dynamoe": dynamoe, "duo": duo, "phds": phds, "pruning": pruning}[part](Study(part, arguments.quick))
    show(parts, arguments.quick)
    if not arguments.quick:
        draw()


if __name__ == "__main__":
    main()
