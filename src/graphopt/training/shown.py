"""Training progress on standard error: a live line on a terminal, a line every half minute in a log."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_INTERVAL = 30.0


class TrainingProgress(Protocol):
    """Is notified of every training step."""

    def begin(self, steps: int, done: int) -> None:
        """Training starts; ``done`` of ``steps`` were done in an earlier session."""

    def step(self, step: int, loss: float, note: str = "") -> None:
        """A step is done."""

    def end(self) -> None:
        """Training stops."""


class Quiet:
    """Shows nothing."""

    def begin(self, steps: int, done: int) -> None:
        """Ignore the start."""

    def step(self, step: int, loss: float, note: str = "") -> None:
        """Ignore the step."""

    def end(self) -> None:
        """Ignore the end."""


class Shown:
    """Shows loss (a running mean), steps, elapsed time and time left.

    Args:
        what: name shown for the run.
    """

    def __init__(self, what: str = "training"):
        self.what = what
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def begin(self, steps: int, done: int) -> None:
        """Show where the run stands."""
        self.steps, self.first, self.mean = steps, done, float("nan")
        self.began = self.said = time.monotonic()
        if done:
            self.console.print(f"{self.what}: resuming after step {done} of {steps}", markup=False)
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=self.console,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=steps, completed=done, loss="", note="")

    def step(self, step: int, loss: float, note: str = "") -> None:
        """Show a step."""
        self.mean = loss if self.mean != self.mean else 0.95 * self.mean + 0.05 * loss
        if self.bar is not None and self.task is not None:
            fields = {"note": note} if note else {}
            self.bar.update(self.task, completed=step, loss=f"{self.mean:.4f}", **fields)  # type: ignore[arg-type]
            return
        now = time.monotonic()
        if note or now - self.said > _INTERVAL:
            self.said = now
            step_seconds = (now - self.began) / max(1, step - self.first)
            seconds_left = step_seconds * (self.steps - step)
            self.console.print(
                f"{self.what}: step {step} of {self.steps}, loss {self.mean:.4f}, "
                f"{seconds_left / 60:.1f} minutes left{', ' + note if note else ''}",
                markup=False,
            )

    def end(self) -> None:
        """Remove the live line."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
