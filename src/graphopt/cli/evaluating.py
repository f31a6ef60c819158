"""``graphopt evaluate``: several programs on several data sets, as one table."""

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


def evaluate_programs(args: Evaluate) -> None:
    """Measure each program on each file and print a row for each pair."""
    require_files(*args.data)
    built_in = (*BY_NAME, "bits_per_byte")
    metrics: list[Any] = [m if m in built_in else find_judge(m) for m in args.metric or []]
    reference = read_program(args.against, args) if args.against is not None else None
    results: list[tuple[str, str, Evaluation]] = []
    for checkpoint in args.checkpoints:
        program = read_program(checkpoint, args)
        for file in args.data:
            result = evaluate(
                program, file, metrics, against=reference, sequences=args.sequences, length=args.length,
                batch=args.batch, dtype=args.dtype, progress=ShownProgress(),
            )  # fmt: skip
            if not results and not args.as_json and result.sample:
                note(f"the first row of {file} begins {result.sample[:120]!r}")
            results.append((checkpoint, file, result))
    names = list(dict.fromkeys(name for _, _, result in results for name in result.values))
    rows = []
    for checkpoint, file, r in results:
        values = (_format_value(r.values.get(n)) for n in names)
        rows.append([checkpoint, Path(file).name, *values, r.tokens or f"{r.rows} rows", f"{r.seconds:.1f}"])
    document = [{"program": c, "data": f, **asdict(r)} for c, f, r in results]
    listing(args.as_json, document, ["program", "data", *names, "tokens", "seconds"], rows)


def _format_value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
