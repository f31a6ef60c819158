"""Quality and cost of a program over the values of a run-time setting."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.reading import read_data
from ..ir.cost.active import ActiveWork, choices_of
from ..ir.errors import UsageError
from ..ir.program import Model, Program, as_program
from ..ir.ranks.rank_programs import ranks_of
from ..ir.running.execute import interpret, run
from ..ir.storage.atomic import atomic_file
from ..ir.storage.content import whole_hash
from ..ir.vocabulary import over_all_tokens
from .context import Context, Progress, Silent
from .metrics import BY_NAME, Batch, default_metric, measure_all


@dataclass(frozen=True)
class Point:
    """Quality and cost at one value of a run-time setting.

    Args:
        setting: value of the run-time setting.
        values: results by metric.
        flops: floating-point operations per token that were used; per row if the program takes no tokens.
        share: share used of the arithmetic that routers and settings control: the mean width, or k of the experts.
    """

    setting: float
    values: dict[str, float]
    flops: float
    share: float


def sweep(
    model: Model | Program,
    data: str | os.PathLike[str] | Iterable[Mapping[str, torch.Tensor]],
    dial: str | None = None,
    settings: Sequence[float] = (),
    *,
    points: int = 5,
    metrics: Sequence[str] = (),
    against: Model | Program | None = None,
    sequences: int | None = None,
    length: int = 2048,
    batch: int = 8,
    work_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[Point]:
    """Return measurements of a program on data at several values of a run-time setting.

    Args:
        model: anything that :func:`graphopt.capture` accepts.
        data: a .jsonl, .txt or .npz file, or batches of inputs by name.
        dial: name of the run-time setting; may be left out if the program has only one.
        settings: its values; if none are given, ``points`` values evenly over its range, or every number of experts.
        points: number of values, if they are not given.
        metrics: perplexity, accuracy, kl, agreement, cosine; by default the program's default metric.
        against: the original, for metrics that compare; by default the program with the setting at its default.
        sequences: maximum number of rows.
        length: maximum number of tokens per row.
        batch: rows per batch.
        work_dir: where points are stored, so that an interrupted sweep can continue.
        progress: notified of every batch.

    Returns:
        One point per value, in the order of the values.

    Raises:
        UsageError: there is no such setting, a value is out of its range, or there is no data.
    """
    program = as_program(model)
    if ranks_of(program):
        raise UsageError("a sharded program is not swept", hint="sweep it before it is sharded")
    name = _dial_name(program, dial)
    chosen_settings = list(settings) or _default_settings(program, name, points)
    limits = program.dials[name]
    for value in chosen_settings:
        if not limits.low <= value <= limits.high:
            raise UsageError(
                f"{name} cannot be {value:g}", hint=f"its range is {limits.low:g} to {limits.high:g}"
            )
    if not isinstance(data, (str, os.PathLike)):
        data = list(data)
    rows: list[Any] = list(
        read_data(program, data, sequences=sequences, length=length, batch=batch, shuffle=False)[0]
    )
    if not rows:
        raise UsageError("there is no data to sweep on")
    names = list(metrics) or [default_metric(program)]
    unknown = [n for n in names if n not in BY_NAME]
    if unknown:
        raise UsageError(f"there is no metric {unknown[0]!r}", hint=f"metrics are {', '.join(BY_NAME)}")
    reference = as_program(against) if against is not None else program
    context = Context(rows)
    compares = any(BY_NAME[n].compares for n in names)
    original = [whole_hash(reference)] if compares else []
    store = _PointStore(work_dir, program, name, [*names, *original], context.data_hash())
    reporter: Progress = progress or Silent()
    reporter.start(f"{len(chosen_settings)} settings of {name}", len(chosen_settings) * len(rows))
    points_measured: list[Point] = []
    try:
        for value in chosen_settings:
            point = store.get(value)
            if point is None:
                point = _measure_point(program, reference, context, rows, name, value, names, reporter)
                store.put(point)
            points_measured.append(point)
    finally:
        reporter.done()
    return points_measured


def _measure_point(
    program: Program, reference: Program, context: Context, rows: Sequence[Batch], dial: str, value: float,
    names: Sequence[str], progress: Progress,
) -> Point:  # fmt: skip
    active = ActiveWork(program)
    choice_nodes = choices_of(program)

    def measured(batch: Batch) -> Mapping[str, Any]:
        bound = context.bound(program, {**batch, dial: value})  # type: ignore[dict-item]
        outputs = interpret(program, bound, record=choice_nodes)
        active.add(bound, outputs)
        outputs = over_all_tokens(program, outputs)
        progress.step(f"{dial} {value:g}")
        return outputs

    compares = any(BY_NAME[n].compares for n in names)
    other: Callable[[Batch], Mapping[str, Any]] | None = None
    if compares:
        other = lambda batch: over_all_tokens(reference, run(reference, context.bound(reference, batch)))  # noqa: E731
    values = measure_all(names, measured, other, rows)
    share = active.routed_used / active.routed_possible if active.routed_possible else 1.0
    return Point(value, values, active.used / active.tokens, share)


def _dial_name(program: Program, name: str | None) -> str:
    if not program.dials:
        raise UsageError("the program has no run-time setting", hint="split-ffn and dial-top-k add one")
    if name is None and len(program.dials) == 1:
        return next(iter(program.dials))
    if name not in program.dials:
        raise UsageError(
            f"there is no run-time setting {name!r}" if name else "say which run-time setting",
            hint=f"it has {', '.join(program.dials)}",
        )
    return name


def _default_settings(program: Program, name: str, points: int) -> list[float]:
    if points < 2:
        raise UsageError("a sweep has two points or more")
    dial = program.dials[name]
    if name.startswith("active_experts"):
        return [float(k) for k in range(int(dial.low), int(dial.high) + 1)]
    return [dial.low + (dial.high - dial.low) * i / (points - 1) for i in range(points)]


class _PointStore:
    """Measured points by value of the setting, stored in a file of the work directory."""

    def __init__(
        self,
        work_dir: str | os.PathLike[str] | None,
        program: Program,
        dial: str,
        names: Sequence[str],
        data: str,
    ):
        import hashlib

        self.path: Path | None = None
        self.rows: dict[str, Any] = {}
        if work_dir is not None:
            identity = "\n".join([whole_hash(program), dial, *names, data])
            Path(work_dir).mkdir(parents=True, exist_ok=True)
            self.path = Path(work_dir) / f"sweep-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"
            if self.path.is_file():
                self.rows = json.loads(self.path.read_text())

    def get(self, value: float) -> Point | None:
        """Return the point at a value, if it was measured before; else None."""
        row = self.rows.get(repr(float(value)))
        return None if row is None else Point(**row)

    def put(self, point: Point) -> None:
        """Store a point."""
        self.rows[repr(float(point.setting))] = asdict(point)
        if self.path is not None:
            with atomic_file(self.path) as file:
                file.write_text(json.dumps(self.rows, indent=1))


def write_csv(path: str | os.PathLike[str], dial: str, points: Sequence[Point]) -> None:
    """Write points as a table: the setting, each metric, ``flops_a_token``, ``share``."""
    names = list(points[0].values)
    with atomic_file(Path(path)) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([dial, *names, "flops_a_token", "share"])
        for p in points:
            writer.writerow([p.setting, *(p.values[n] for n in names), p.flops, p.share])


def write_picture(path: str | os.PathLike[str], dial: str, points: Sequence[Point]) -> None:
    """Draw each metric against FLOPs per token; the suffix of the name determines the format.

    Raises:
        UsageError: matplotlib is not installed, or does not support the format.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("pictures need matplotlib", hint='pip install "graphopt[plots]"') from None
    names = list(points[0].values)
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(5.5 * len(names), 4), squeeze=False, layout="constrained"
    )
    for name, axis in zip(names, axes[0], strict=True):
        sorted_points = sorted(points, key=lambda p: p.flops)
        axis.plot([p.flops / 1e6 for p in sorted_points], [p.values[name] for p in sorted_points], marker="o")
        for p in sorted_points:
            axis.annotate(
                f"{p.setting:g}",
                (p.flops / 1e6, p.values[name]),
                textcoords="offset points",
                xytext=(4, 5),
                fontsize=8,
            )
        axis.set(xlabel="million FLOPs a token", ylabel=name, title=f"{name} over {dial}")
        axis.grid(alpha=0.3)
    try:
        kind = Path(path).suffix.lstrip(".") or "png"
        with atomic_file(Path(path)) as temporary:
            figure.savefig(temporary, format=kind, dpi=150)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    finally:
        pyplot.close(figure)


__all__ = ["Point", "sweep", "write_csv", "write_picture"]
