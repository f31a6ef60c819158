"""A process that imports transformers once and forks for every folder that is to be reloaded.

Reloading a folder as graphopt does starts Python and imports transformers, six seconds for a small model.
The process that forks has no threads and has run nothing. A line on standard input is a JSON list: the
script, its arguments, and the file that takes what it says; the answer is the exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class ReloadServer:
    """The other end: starts the process when it is first asked."""

    def __init__(self, said: Path):
        self.said = said
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, arguments: list[str]) -> tuple[int, str]:
        """Run the script that reloads a folder; return its exit status and what it said."""
        from graphopt.backends.huggingface.save import SCRIPT

        if self.process is None:
            quiet = {
                "HF_HUB_OFFLINE": "1",
                "TQDM_DISABLE": "1",
                "PYTHONWARNINGS": "ignore",
                "OMP_NUM_THREADS": "1",
            }
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **quiet},
            )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([str(SCRIPT), arguments, str(self.said)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), self.said.read_text()

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin:
            self.process.stdin.close()
            self.process.wait(300)  # a loaded machine must not decide


def serve() -> None:
    """Answer until standard input ends."""
    from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

    for line in sys.stdin:
        script, arguments, said = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(script, arguments, said))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(script: str, arguments: list[str], said: str) -> int:
    """Run the script as Python would, with its output in a file."""
    file: Any = open(said, "w")  # noqa: SIM115
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if not isinstance(ended.code, (int, type(None))):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve()
