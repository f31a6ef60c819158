"""Try single operators on a target, and write down what its compiler and simulator, or runtime, make of them.

    python -m tools.target_sweep qnn-htp-v75 -o qnn-htp-v75.json [--against OLD.json]

The file goes beside ``src/graphopt/targets``. With ``--against`` differences to an older sweep are listed, as when
the compiler's package has moved.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .verdicts import DEVICES, as_text, differences, sweep


def main() -> None:
    """Sweep, write, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", choices=sorted(DEVICES))
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--against")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    old = json.loads(Path(given.against).read_text()) if given.against else None
    found = sweep(given.device, given.workers)
    Path(given.output).write_text(as_text(found))
    if old is not None:
        lines = differences(old, found)
        print("\n".join(lines) or "nothing changed")


if __name__ == "__main__":
    main()
