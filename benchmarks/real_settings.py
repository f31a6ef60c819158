"""Every architecture of the tests' zoo with the default settings of its configuration class, as a folder.

    python benchmarks/real_settings.py [--only llama --only bert]

Only width, depth, vocabulary and experts are small: windows, positions, patterns and images are those of real folders. A
layer is taken out, and experts where there are any; each folder is loaded with transformers and compared beyond its windows
with the original model whose layer passes its input on. Where there is a window, a short one is tried as well. Ends with
status 1 if a folder is wrong.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> int:
    """Try all, print a line each and the counts."""
    import real_settings
    import transformers
    import zoo

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(zoo.CASES))
    chosen = parser.parse_args().only or list(zoo.CASES)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts: collections.Counter[str] = collections.Counter()
    for name in chosen:
        passes = ["skip-layers{layers=[1]}"]
        if zoo.CASES[name].blocks.get("experts"):
            passes.append("prune-experts{keep=2 score=random}")
        for text in passes:
            for short in (False, True):
                started = time.process_time()
                with tempfile.TemporaryDirectory() as folder:
                    found = real_settings.outcome(name, text, Path(folder), short=short)
                if found is None:
                    continue
                counts[found.verdict] += 1
                window = "short window" if short else "defaults"
                took = time.process_time() - started
                print(
                    f"{found.verdict:8} {name:14} {text:34} {window:13} {took:5.0f} s  {found.told}",
                    flush=True,
                )
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("right", "refused", "wrong")))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
