"""The command line. ``main`` turns errors into messages and exit codes; commands import torch only when they run."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run ``graphopt``."""
    # graphopt prints its own progress and tables; libraries stay quiet unless configured otherwise
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from .running import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        # interrupted before or after the command itself, which reports more
        sys.stderr.write("interrupted\n")
        status = 130
    sys.exit(status)
