"""``graphopt evaluate``: several programs on several sets of data, as one table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..measure.evaluation import Evaluation, evaluate, find_judge
from ..measure.metrics import BY_NAME
from .app import Evaluate
from .output import listing, note
from .progress import ShownProgress
from .sources import read_program, require_files


def evaluate_programs(given: Evaluate) -> None:
    """Measure each program on each file and print a row for each pair."""
    require_files(*given.data)
    known = (*BY_NAME, "bits_per_byte")
    wanted: list[Any] = [m if m in known else find_judge(m) for m in given.metric or []]
    reference = read_program(given.against, given.trust) if given.against is not None else None
    found: list[tuple[str, str, Evaluation]] = []
    for checkpoint in given.checkpoints:
        program = read_program(checkpoint, given.trust)
        for file in given.data:
            result = evaluate(
                program, file, wanted, against=reference, sequences=given.sequences, length=given.length,
                batch=given.batch, dtype=given.dtype, progress=ShownProgress(),
            )  # fmt: skip
            if not found and not given.as_json and result.sample:
                note(f"the first row of {file} begins {result.sample[:120]!r}")
            found.append((checkpoint, file, result))
    names = list(dict.fromkeys(name for _, _, result in found for name in result.values))
    rows = []
    for checkpoint, file, r in found:
        values = (_shown(r.values.get(n)) for n in names)
        rows.append([checkpoint, Path(file).name, *values, r.tokens or f"{r.rows} rows", f"{r.seconds:.1f}"])
    document = [{"program": c, "data": f, **asdict(r)} for c, f, r in found]
    listing(given.as_json, document, ["program", "data", *names, "tokens", "seconds"], rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
