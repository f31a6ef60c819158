"""The command line. ``main`` turns errors into messages and exit codes; commands import torch when run."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run ``graphopt``."""
    # progress and tables are ours; libraries stay quiet unless asked
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from .running import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        # before or after the command itself, which says more
        sys.stderr.write("interrupted\n")
        status = 130
    sys.exit(status)
