"""Code in a process of its own, as ``python -c`` runs it, without the seconds in which torch is imported.

A process that has imported torch and graphopt, has no threads and has run nothing forks for each. A line on its standard
input is a JSON list: code, arguments and a file for what is printed; or the id of a process to wait for, negative to ask
whether it has ended. The answer is the id of the process, its exit status, or nothing where it has not ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Fork:
    """A process that was started."""

    server: Forks
    pid: int
    said: Path
    returncode: int | None = None

    def ready(self, line: str, seconds: float = 120) -> bool:
        """Wait until the process has printed a line."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if f"{line}\n" in self.said.read_text():
                return True
            time.sleep(0.01)
        return False

    def send(self, how: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, how)

    def wait(self) -> int:
        """Return the exit status; that of a process which a signal ended is the signal's number, negative."""
        return int(self.server.ask(self.pid))

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait until it has ended; return what it printed, and keep its exit status: as of a process of subprocess."""
        until = time.monotonic() + timeout
        while not (status := self.server.ask(-self.pid).strip()):
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.02)
        self.returncode = int(status)
        return self.stdout, self.stderr

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.returncode is None:
            self.send(signal.SIGKILL)

    @property
    def stdout(self) -> str:
        """What it printed."""
        return self.said.read_text()

    @property
    def stderr(self) -> str:
        """What it printed to standard error."""
        return self.said.with_suffix(".err").read_text()


class Forks:
    """The other end: starts the process that forks when it is first asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        self.count = 0

    def ask(self, question: Any) -> str:
        """Return the answer to a line."""
        if self.process is None:
            source = str(Path(__file__).parents[1] / "src")
            quiet = {"PYTHONPATH": source, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **quiet},
            )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(self, code: str, *arguments: object) -> Fork:
        """Start a process that runs the code with these arguments."""
        self.count += 1
        said = self.folder / f"{self.count}.out"
        said.touch()
        return Fork(self, int(self.ask([code, [*map(str, arguments)], str(said)])), said)

    def run(self, code: str, *arguments: object) -> tuple[int, Fork]:
        """Run the code to its end; return the exit status and what it printed."""
        fork = self.start(code, *arguments)
        return fork.wait(), fork

    def close(self) -> None:
        """End the process that forks."""
        if self.process is not None and self.process.stdin:
            self.process.stdin.close()
            self.process.wait(300)  # a loaded machine must not decide


def serve() -> None:
    """Answer until standard input ends."""
    import torch  # noqa: F401

    import graphopt

    assert graphopt.capture, "modules are imported when they are first asked for"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            ended, status = os.waitpid(abs(question), 0 if question > 0 else os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if ended else "", flush=True)
            continue
        child = os.fork()
        if child == 0:
            os._exit(run(*question))
        print(child, flush=True)


def run(code: str, arguments: list[str], said: str) -> int:
    """Run the code as Python would."""
    for descriptor, path in ((1, said), (2, str(Path(said).with_suffix(".err")))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve()
