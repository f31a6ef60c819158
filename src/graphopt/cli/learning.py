"""``graphopt train``, ``graphopt sweep`` and ``graphopt oracle``."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

from ..ir.errors import UsageError
from ..ir.groups import rank
from ..measure.oracle import routing_oracle
from ..measure.sweeping import sweep, write_csv, write_picture
from ..training import Settings, Shown
from ..training.learning import as_method, train
from ..training.state import FILE
from .app import Oracle, Sweep, Train
from .output import listing, note, show_json, table, text
from .places import on_interrupt, place, scores_in
from .progress import ShownProgress, working
from .sources import read_program, require_files, require_work_dir


def train_program(args: Train) -> None:
    """Train a program, with progress, and save the result."""
    as_method(args.recipe)
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)})
    require_files(args.data, args.validation)
    folder = args.work_dir or f"{os.path.normpath(args.output)}.training"
    require_work_dir(folder)
    resumable = f"the run is kept in {folder}; the same command resumes it"
    with place(args.output, args.force, (args.program, args.data, args.validation), folder=True):
        program = read_program(args.program, args, to_save=True)
        with on_interrupt(lambda: resumable if (Path(folder) / FILE).is_file() else ""):
            trained, record = train(
                program, args.recipe, args.data, settings, batch=args.batch, length=args.length,
                sequences=args.sequences, work_dir=folder, validation=args.validation,
                measure_every=args.measure_every, save_every=args.save_every, dtype=args.dtype,
                loss_on=args.loss_on, progress=_ResumableProgress(args.recipe, resumable),
            )  # fmt: skip
        if rank():
            return
        with working(f"writing {args.output}"):
            trained.save(args.output)
    first, last = record.losses[0], record.losses[-1]
    if args.as_json:
        show_json(
            {"output": args.output, "recipe": args.recipe, "steps": record.step, "seconds": record.seconds,
             "first_loss": first, "loss": last, "measured": record.measured}
        )  # fmt: skip
        return
    text(f"{args.recipe}: {record.step} steps in {record.seconds:.0f} s, loss {first:.4g} -> {last:.4g}")
    for step, measured in record.measured:
        text(f"  after step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
    text(f"saved to {args.output}")


class _ResumableProgress(Shown):
    """Training progress that first says where the run is kept."""

    def __init__(self, what: str, resume_note: str):
        super().__init__(what)
        self.told = resume_note

    def begin(self, steps: int, done: int) -> None:
        """Start, or resume after ``done`` steps."""
        note(self.told)
        super().begin(steps, done)


def sweep_program(args: Sweep) -> None:
    """Print quality and cost at each value; write them as CSV and as a picture."""
    inputs = (args.program, args.data, args.against)
    if args.csv is not None and args.csv == args.picture:
        raise UsageError(f"--csv and --picture are both {args.csv}")
    with (
        place(args.csv, args.force, inputs),
        place(args.picture, args.force, inputs),
        scores_in(args.work_dir),
    ):
        require_work_dir(args.work_dir)
        settings = _numbers(args.values) if args.values is not None else []
        program = read_program(args.program, args)
        original = read_program(args.against, args) if args.against is not None else None
        points = sweep(
            program, args.data, args.dial, settings, points=args.points, metrics=args.metric or [],
            against=original, sequences=args.sequences, length=args.length, batch=args.batch,
            work_dir=args.work_dir, progress=ShownProgress(),
        )  # fmt: skip
        name = args.dial or next(iter(program.dials))
        if args.csv is not None:
            write_csv(args.csv, name, points)
        if args.picture is not None:
            write_picture(args.picture, name, points)
        measured = list(points[0].values)
        rows = []
        for p in points:
            values = (f"{p.values[n]:.4f}" for n in measured)
            rows.append((f"{p.setting:g}", *values, f"{p.flops / 1e6:.3f}", f"{p.share:.1%}"))
        columns = (name, *measured, "MFLOPs per token", "share of what it controls")
        listing(args.as_json, [{"dial": name, **vars(p)} for p in points], columns, rows)


def show_oracle(args: Oracle) -> None:
    """Print the best paths' losses by how much they compute, and the tokens that would have gained most."""
    oracle = routing_oracle(
        read_program(args.program, args), args.data, budget=args.budget, tokens=args.tokens,
        length=args.length, seed=args.seed, progress=ShownProgress(),
    )  # fmt: skip
    if args.as_json:
        show_json(
            {"tokens": [{**vars(t), "difficulty": t.difficulty} for t in oracle.tokens], "exactly": oracle.exactly,
             "all_largest": oracle.all_largest, "best": oracle.best, "mean_difficulty": oracle.mean_difficulty}
        )  # fmt: skip
        return
    title = (
        f"Least loss by how many of {oracle.layers} feed-forwards are at their largest, "
        f"over {len(oracle.tokens)} tokens"
    )
    rows = [(n, f"{loss:.4f}", f"{loss - oracle.all_largest:+.4f}") for n, loss in oracle.exactly.items()]
    table(title, ("largest", "nats", "to all largest"), rows)
    text(
        f"all at their largest: {oracle.all_largest:.4f}; the best paths: {oracle.best:.4f}\n"
        "the oracle knows the answer and takes the minimum of many paths: a bound that no router can be expected to reach"
    )
    hardest = [
        (f"{t.difficulty:.3f}", f"{t.all_largest:.3f}", "".join(map(str, t.path)), repr(t.text))
        for t in sorted(oracle.tokens, key=lambda t: -t.difficulty)[:8]
    ]
    table("Tokens that a better path would have helped most", ("difficulty", "loss", "path", "text"), hardest)


def _numbers(written: str) -> list[float]:
    try:
        return [float(word) for word in written.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--values takes numbers, not {written!r}", hint="--values '0 0.5 1'") from None
