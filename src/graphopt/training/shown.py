"""Progress of training on standard error: a live line on a terminal, a line every half minute in a log."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_INTERVAL = 30.0


class TrainingProgress(Protocol):
    """Hears of every step."""

    def begin(self, steps: int, done: int) -> None:
        """``done`` of ``steps`` were made in an earlier session."""

    def step(self, step: int, loss: float, note: str = "") -> None:
        """A step was made."""

    def end(self) -> None:
        """Training stops."""


class Quiet:
    """Shows nothing."""

    def begin(self, steps: int, done: int) -> None:
        """Begin."""

    def step(self, step: int, loss: float, note: str = "") -> None:
        """Count."""

    def end(self) -> None:
        """End."""


class Shown:
    """Loss (a running mean), steps, time spent and time left.

    Args:
        what: the name of what is trained.
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
            self.console.print(f"{self.what}: going on after step {done} of {steps}", markup=False)
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
        """Take the live line away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
