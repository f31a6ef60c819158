"""``graphopt evaluate``: several programs on several sets of data, as one table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..ir.errors import UsageError
from ..measure.evaluation import Evaluation, evaluate, find_judge
from ..measure.metrics import BY_NAME
from .output import note, show_json, table
from .progress import ShownProgress
from .sources import read_program


def evaluate_programs(
    checkpoints: list[str],
    data: list[str],
    metrics: list[str],
    against: str | None,
    amount: tuple[int | None, int, int],
    dtype: str,
    as_json: bool,
    trust: bool,
) -> None:
    """Measure each program on each file and print a row for each pair."""
    for file in data:
        if not Path(file).is_file():
            raise UsageError(f"the data file {file} does not exist")
    known = (*BY_NAME, "bits_per_byte")
    wanted: list[Any] = [m if m in known else find_judge(m) for m in metrics]
    reference = read_program(against, trust) if against is not None else None
    sequences, length, batch = amount
    found: list[tuple[str, str, Evaluation]] = []
    for checkpoint in checkpoints:
        program = read_program(checkpoint, trust)
        for file in data:
            result = evaluate(
                program, file, wanted, against=reference, sequences=sequences, length=length, batch=batch,
                dtype=dtype, progress=ShownProgress(),
            )  # fmt: skip
            if not found and not as_json and result.sample:
                note(f"the first row of {file} begins {result.sample[:120]!r}")
            found.append((checkpoint, file, result))
    if as_json:
        show_json([{"program": c, "data": f, **asdict(r)} for c, f, r in found])
        return
    names = list(dict.fromkeys(name for _, _, result in found for name in result.values))
    rows = [
        [
            c,
            Path(f).name,
            *(_shown(r.values.get(n)) for n in names),
            r.tokens or f"{r.rows} rows",
            f"{r.seconds:.1f}",
        ]
        for c, f, r in found
    ]
    table("", ["program", "data", *names, "tokens", "seconds"], rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
