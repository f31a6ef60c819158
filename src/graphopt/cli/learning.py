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


def train_program(given: Train) -> None:
    """Train, with progress, and save the program with what it learned."""
    as_method(given.recipe)
    settings = Settings(
        **{f.name: getattr(given, f.name) for f in fields(Settings) if hasattr(given, f.name)}
    )
    require_files(given.data, given.validation)
    folder = given.work_dir or f"{os.path.normpath(given.output)}.training"
    require_work_dir(folder)
    goes_on = f"the run is kept in {folder}; the same command goes on from there"
    with place(given.output, given.force, (given.program, given.data, given.validation), folder=True):
        program = read_program(given.program, given.trust, to_save=True)
        with on_interrupt(lambda: goes_on if (Path(folder) / FILE).is_file() else ""):
            done, record = train(
                program, given.recipe, given.data, settings, batch=given.batch, length=given.length,
                sequences=given.sequences, work_dir=folder, validation=given.validation,
                measure_every=given.measure_every, save_every=given.save_every, dtype=given.dtype,
                loss_on=given.loss_on, progress=_Kept(given.recipe, goes_on),
            )  # fmt: skip
        if rank():
            return
        with working(f"writing {given.output}"):
            done.save(given.output)
    first, last = record.losses[0], record.losses[-1]
    if given.as_json:
        show_json(
            {"output": given.output, "recipe": given.recipe, "steps": record.step, "seconds": record.seconds,
             "first_loss": first, "loss": last, "measured": record.measured}
        )  # fmt: skip
        return
    text(f"{given.recipe}: {record.step} steps in {record.seconds:.0f} s, loss {first:.4g} -> {last:.4g}")
    for step, measured in record.measured:
        text(f"  after step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in measured.items()))
    text(f"saved to {given.output}")


class _Kept(Shown):
    """Says where a run is kept once there is one."""

    def __init__(self, what: str, told: str):
        super().__init__(what)
        self.told = told

    def begin(self, steps: int, done: int) -> None:
        """Begin, or go on after ``done`` steps."""
        note(self.told)
        super().begin(steps, done)


def sweep_program(given: Sweep) -> None:
    """Print quality and cost at each setting; write them as CSV and as a picture."""
    inputs = (given.program, given.data, given.against)
    if given.csv is not None and given.csv == given.picture:
        raise UsageError(f"--csv and --picture are both {given.csv}")
    with (
        place(given.csv, given.force, inputs),
        place(given.picture, given.force, inputs),
        scores_in(given.work_dir),
    ):
        require_work_dir(given.work_dir)
        settings = _numbers(given.values) if given.values is not None else []
        program = read_program(given.program, given.trust)
        original = read_program(given.against, given.trust) if given.against is not None else None
        found = sweep(
            program, given.data, given.dial, settings, points=given.points, metrics=given.metric or [],
            against=original, sequences=given.sequences, length=given.length, batch=given.batch,
            work_dir=given.work_dir, progress=ShownProgress(),
        )  # fmt: skip
        name = given.dial or next(iter(program.dials))
        if given.csv is not None:
            write_csv(given.csv, name, found)
        if given.picture is not None:
            write_picture(given.picture, name, found)
        measured = list(found[0].values)
        rows = []
        for p in found:
            values = (f"{p.values[n]:.4f}" for n in measured)
            rows.append((f"{p.setting:g}", *values, f"{p.flops / 1e6:.3f}", f"{p.share:.1%}"))
        columns = (name, *measured, "MFLOPs a token", "of what it governs")
        listing(given.as_json, [{"dial": name, **vars(p)} for p in found], columns, rows)


def show_oracle(given: Oracle) -> None:
    """Print the best paths' losses by how much they compute, and which tokens would have gained most."""
    found = routing_oracle(
        read_program(given.program, given.trust), given.data, budget=given.budget, tokens=given.tokens,
        length=given.length, seed=given.seed, progress=ShownProgress(),
    )  # fmt: skip
    if given.as_json:
        show_json(
            {"tokens": [{**vars(t), "difficulty": t.difficulty} for t in found.tokens], "exactly": found.exactly,
             "all_largest": found.all_largest, "best": found.best, "mean_difficulty": found.mean_difficulty}
        )  # fmt: skip
        return
    title = f"Least loss by how many of {found.layers} feed-forwards are at their largest, over {len(found.tokens)} tokens"
    rows = [(n, f"{loss:.4f}", f"{loss - found.all_largest:+.4f}") for n, loss in found.exactly.items()]
    table(title, ("largest", "nats", "to all largest"), rows)
    text(
        f"all at their largest: {found.all_largest:.4f}; the best paths: {found.best:.4f}\n"
        "the oracle knows the answer and takes the least of many: a bound, nothing that can be run"
    )
    hardest = [
        (f"{t.difficulty:.3f}", f"{t.all_largest:.3f}", "".join(map(str, t.path)), repr(t.text))
        for t in sorted(found.tokens, key=lambda t: -t.difficulty)[:8]
    ]
    table("Tokens that a better path would have helped most", ("difficulty", "loss", "path", "text"), hardest)


def _numbers(written: str) -> list[float]:
    try:
        return [float(word) for word in written.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--values takes numbers, not {written!r}", hint="--values '0 0.5 1'") from None
