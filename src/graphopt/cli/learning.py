"""``graphopt train``, ``graphopt sweep`` and ``graphopt oracle``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..ir.errors import UsageError
from ..ir.groups import rank
from ..ir.storage import require_savable
from ..measure.oracle import routing_oracle
from ..measure.sweeping import sweep, write_csv, write_picture
from ..training import Settings, Shown
from ..training.learning import as_method, train
from ..training.state import FILE
from .interrupts import on_interrupt, scores_in
from .output import note, show_json, table, text
from .places import place
from .progress import ShownProgress, Working
from .sources import read_program, require_work_dir


def train_program(
    source: str, output: str, recipe: str, data: str, settings: dict[str, Any], amount: tuple[int | None, int, int],
    validation: str | None, measure_every: int, kept: tuple[str | None, float, str], loss_on: str, force: bool,
    as_json: bool, trust: bool,
) -> None:  # fmt: skip
    """Train, with progress, and save the program with what it learned."""
    as_method(recipe)
    made = Settings(**settings)
    for file in (data, validation):
        if file is not None and not Path(file).is_file():
            raise UsageError(f"the data file {file} does not exist")
    sequences, length, batch = amount
    work_dir, save_every, dtype = kept
    folder = work_dir or f"{os.path.normpath(output)}.training"
    require_work_dir(folder)
    goes_on = f"the run is kept in {folder}; the same command goes on from there"
    with place(output, force, (source, data, validation), folder=True):
        program = read_program(source, trust)
        require_savable(program)
        with on_interrupt(lambda: goes_on if (Path(folder) / FILE).is_file() else ""):
            done, record = train(
                program, recipe, data, made, batch=batch, length=length, sequences=sequences, work_dir=folder,
                validation=validation, measure_every=measure_every, save_every=save_every,
                dtype=dtype, loss_on=loss_on, progress=_Kept(recipe, goes_on),
            )  # fmt: skip
        if rank():
            return
        with Working(f"writing {output}"):
            done.save(output)
    result = {
        "output": output, "recipe": recipe, "steps": record.step, "seconds": record.seconds,
        "first_loss": record.losses[0], "loss": record.losses[-1], "measured": record.measured,
    }  # fmt: skip
    if as_json:
        show_json(result)
        return
    text(
        f"{recipe}: {record.step} steps in {record.seconds:.0f} s, loss {record.losses[0]:.4g} -> {record.losses[-1]:.4g}"
        + "".join(
            f"\n  after step {n}: " + ", ".join(f"{k} {v:.4g}" for k, v in m.items())
            for n, m in record.measured
        )
        + f"\nsaved to {output}"
    )


class _Kept(Shown):
    """Says where a run is kept once there is one."""

    def __init__(self, what: str, told: str):
        super().__init__(what)
        self.told = told

    def begin(self, steps: int, done: int) -> None:
        """Begin, or go on after ``done`` steps."""
        note(self.told)
        super().begin(steps, done)


def sweep_program(
    source: str, data: str, dial: str | None, values: str | None, points: int, metrics: list[str], against: str | None,
    amount: tuple[int | None, int, int], csv: str | None, picture: str | None, work_dir: str | None, force: bool,
    as_json: bool, trust: bool,
) -> None:  # fmt: skip
    """Print quality and cost at each setting; write them as CSV and as a picture."""
    inputs = (source, data, against)
    if csv is not None and csv == picture:
        raise UsageError(f"--csv and --picture are both {csv}")
    kept = on_interrupt(lambda: scores_in(work_dir))
    with place(csv, force, inputs), place(picture, force, inputs), kept:
        _sweep(
            source,
            data,
            dial,
            values,
            points,
            metrics,
            against,
            amount,
            csv,
            picture,
            work_dir,
            as_json,
            trust,
        )


def _sweep(
    source: str, data: str, dial: str | None, values: str | None, points: int, metrics: list[str], against: str | None,
    amount: tuple[int | None, int, int], csv: str | None, picture: str | None, work_dir: str | None, as_json: bool,
    trust: bool,
) -> None:  # fmt: skip
    require_work_dir(work_dir)
    settings = _numbers(values) if values is not None else []
    program = read_program(source, trust)
    original = read_program(against, trust) if against is not None else None
    sequences, length, batch = amount
    found = sweep(
        program, data, dial, settings, points=points, metrics=metrics, against=original, sequences=sequences,
        length=length, batch=batch, work_dir=work_dir, progress=ShownProgress(),
    )  # fmt: skip
    name = dial or next(iter(program.dials))
    if csv is not None:
        write_csv(csv, name, found)
    if picture is not None:
        write_picture(picture, name, found)
    if as_json:
        show_json([{"dial": name, **vars(p)} for p in found])
        return
    measured = list(found[0].values)
    rows = [
        (
            f"{p.setting:g}",
            *(f"{p.values[n]:.4f}" for n in measured),
            f"{p.flops / 1e6:.3f}",
            f"{p.share:.1%}",
        )
        for p in found
    ]
    table("", (name, *measured, "MFLOPs a token", "of what it governs"), rows)


def show_oracle(
    source: str,
    data: str,
    tokens: int,
    budget: int | None,
    length: int,
    seed: int,
    as_json: bool,
    trust: bool,
) -> None:
    """Print the best paths' losses by how much they compute, and which tokens would have gained most."""
    program = read_program(source, trust)
    found = routing_oracle(
        program, data, budget=budget, tokens=tokens, length=length, seed=seed, progress=ShownProgress()
    )
    if as_json:
        show_json(
            {"tokens": [{**vars(t), "difficulty": t.difficulty} for t in found.tokens], "exactly": found.exactly,
             "all_largest": found.all_largest, "best": found.best, "mean_difficulty": found.mean_difficulty}
        )  # fmt: skip
        return
    rows = [
        (count, f"{loss:.4f}", f"{loss - found.all_largest:+.4f}") for count, loss in found.exactly.items()
    ]
    table(
        f"Least loss by how many of {found.layers} feed-forwards are at their largest, over {len(found.tokens)} tokens",
        ("largest", "nats", "to all largest"), rows,
    )  # fmt: skip
    text(
        f"all at their largest: {found.all_largest:.4f}; the best paths: {found.best:.4f}\n"
        "the oracle knows the answer and takes the least of many: a bound, nothing that can be run"
    )
    hardest = sorted(found.tokens, key=lambda t: -t.difficulty)[:8]
    table(
        "Tokens that a better path would have helped most",
        ("difficulty", "loss", "path", "text"),
        [
            (f"{t.difficulty:.3f}", f"{t.all_largest:.3f}", "".join(map(str, t.path)), repr(t.text))
            for t in hardest
        ],
    )


def _numbers(written: str) -> list[float]:
    try:
        return [float(word) for word in written.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--values takes numbers, not {written!r}", hint="--values '0 0.5 1'") from None
