"""Progress on standard error, for anything that takes more than two seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .output import errors

DELAY = 2.0
"""Seconds after which people want to know what is being done."""


class ShownProgress:
    """Shows the progress of a pass, with the last step and the time left."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.what, self.total, self.count, self.began = "", 0, 0, time.monotonic()

    def start(self, what: str, total: int) -> None:
        """Start; if the total is 0, only print the message."""
        if total == 0:
            errors.print(what, markup=False)
            return
        self.done()
        self.what, self.total, self.count, self.began = what, total, 0, time.monotonic()

    def step(self, note: str = "") -> None:
        """Advance by one."""
        self.count += 1
        if self.bar is None and time.monotonic() - self.began > DELAY:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=errors,
            )  # fmt: skip
            self.bar.start()
            self.bar.add_task(self.what, total=self.total, note="")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.count, total=self.total, note=note)

    def done(self) -> None:
        """Stop showing progress."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextlib.contextmanager
def writing(output: str) -> Iterator[Callable[[str, int], None]]:
    """Show progress of writing tensors, in bytes; yields a function to call with the name and size of each."""
    progress, written = ShownProgress(), 0
    progress.what = f"writing {output}"

    def count(name: str, size: int) -> None:
        nonlocal written
        written += size
        progress.total = progress.count + 1
        progress.step(f"{name} {written / 1e9:.2f} GB")

    try:
        yield count
    finally:
        progress.done()


@contextlib.contextmanager
def working(what: str, delay: float = DELAY) -> Iterator[None]:
    """Print what is being done if it takes longer than a number of seconds, or at once if that is 0."""
    if not delay:
        errors.print(f"{what} ...", markup=False)
        yield
        return
    stop = threading.Event()

    def wait() -> None:
        if not stop.wait(DELAY):
            errors.print(f"{what} ...", markup=False)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
