"""Progress on standard error, for anything that takes more than two seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .output import errors

_DELAY = 2.0


class ShownProgress:
    """Progress of a pass, with what was just done and the time left."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.what = ""
        self.total = 0
        self.count = 0
        self.began = 0.0

    def start(self, what: str, total: int) -> None:
        """Begin; a total of 0 is a message."""
        if total == 0:
            errors.print(what, markup=False)
            return
        self.done()
        self.what, self.total, self.count, self.began = what, total, 0, time.monotonic()

    def step(self, note: str = "") -> None:
        """Advance by one."""
        self.count += 1
        if self.bar is None and time.monotonic() - self.began > _DELAY:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=errors,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, note="")
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.count, note=note)

    def done(self) -> None:
        """End."""
        if self.bar is not None:
            self.bar.stop()
        self.bar = self.task = None


class Written:
    """Progress of writing tensors, in bytes."""

    def __init__(self, what: str):
        self.inner = ShownProgress()
        self.what = what
        self.bytes = 0

    def __enter__(self) -> Written:
        self.inner.began = time.monotonic()
        self.inner.what = self.what
        return self

    def __call__(self, name: str, size: int) -> None:
        """Count one tensor."""
        self.bytes += size
        self.inner.total = max(self.inner.total, self.inner.count + 1)
        self.inner.step(f"{name} {self.bytes / 1e9:.2f} GB")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner.done()


class Working:
    """A line that says what is going on, shown only if it takes more than two seconds."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        import threading

        self.stop = threading.Event()

        def wait() -> None:
            if not self.stop.wait(_DELAY):
                errors.print(f"{self.what} ...", markup=False)

        self.thread = threading.Thread(target=wait, daemon=True)
        self.thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()
