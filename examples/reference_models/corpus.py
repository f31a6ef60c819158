"""The text that the reference language models learn from and are judged on, made anew on any machine.

    python examples/reference_models/corpus.py [-o FOLDER]

writes ``train.jsonl``, ``calibration.jsonl``, ``validation.jsonl`` (documentation of the packages in
``sources.DOCUMENTED``; whole files go to one split) and ``out_of_domain.jsonl`` (prose), a document a line,
with ``manifest.json``: versions, licences, sizes and a SHA-256 of each file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sources import DOCUMENTED, PROSE, Document, documentation, installed, prose, without_repeats

FOLDER = Path(__file__).parent / "data"
SPLITS = ("train", "calibration", "validation", "out_of_domain")
_HELD_OUT_PERCENT = 4  # of the files, for calibration and for validation each
_EVERY_NTH_OF_PROSE = 12  # about as much text as the held-out splits


def split_of(source: str) -> str:
    """Return the split of a source file: by its name, so that it does not change when others come or go."""
    bucket = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % 100
    if bucket < _HELD_OUT_PERCENT:
        return "validation"
    return "calibration" if bucket < 2 * _HELD_OUT_PERCENT else "train"


def collect() -> dict[str, list[Document]]:
    """Return the documents of each split."""
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    for package in DOCUMENTED:
        for document in without_repeats(documentation(package), seen):
            splits[split_of(document.source)].append(document)
    splits["out_of_domain"] = list(prose())[::_EVERY_NTH_OF_PROSE]
    return splits


def write_corpus(folder: Path = FOLDER) -> dict[str, Any]:
    """Write every split and the manifest; return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "packages": {
            package.distribution: {"version": installed(package)[1], "licence": package.licence}
            for package in (*DOCUMENTED, PROSE)
        },
        "splits": {},
    }
    for name, documents in collect().items():
        content = _lines(documents)
        (folder / f"{name}.jsonl").write_bytes(content)
        manifest["splits"][name] = {
            "documents": len(documents),
            "characters": sum(len(d.text) for d in documents),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _lines(documents: Iterable[Document]) -> bytes:
    return "".join(json.dumps({"text": d.text, "source": d.source}) + "\n" for d in documents).encode()


def read_split(name: str, folder: Path = FOLDER) -> list[str]:
    """Return the texts of a split, writing the corpus first where it is missing."""
    path = folder / f"{name}.jsonl"
    if not (folder / "manifest.json").is_file():
        write_corpus(folder)
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=FOLDER)
    print(json.dumps(write_corpus(parser.parse_args().output), indent=2))
