"""Models on the NPU's simulator: nodes, signal-to-noise ratios, and what it does to what they are for.

    python benchmarks/npu.py [--target qnn-htp-v75] [--sequence 32] [--only decoding]

The packaged sentence encoder (do its similarities keep their order?), the reference Llama (does it say the same next
tokens, at once and token by token with caches?) and the keyword detector (does it decide the same, fused and streaming?),
in float16 and quantised, calibrated on data that is not judged on.
Needs ``pip install "graphopt[qnn]"``. Compiled and simulated; no device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import graphopt
from graphopt.backends.onnx.qnn.measures import reference
from graphopt.backends.onnx.qnn.run import simulate
from graphopt.data.reading import read_data
from graphopt.data.tokenizer import Tokenizer
from graphopt.ir.program import Program
from graphopt.targets import find_target

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
FORMS = ("", "w8a16", "w8a8", "w4a16")


def small(program: Program, form: str, data: list[dict[str, torch.Tensor]]) -> Program:
    """Return a program fitted, and quantised unless the form is empty."""
    passes = "fold-norms{allow_no_match=true}, fit-target{allow_no_match=true}"
    if form:
        passes += f", quantize{{weights={form[1]} activations={form[3:]}}}"
    return graphopt.optimize(program, passes, data=data)


def on_npu(
    program: Program, batches: list[dict[str, torch.Tensor]], sizes: dict[str, int], name: str
) -> tuple[Any, Iterator[dict[str, Any]]]:
    """Lower, check, and simulate inputs; return the report and the outputs."""
    device = find_target(name)
    folder = tempfile.mkdtemp()
    place = Path(folder) / "out"
    report = program.lower("onnx", place, target=name, check=True, sizes=sizes)
    feeds = []
    for batch in batches:
        given = {k: v.numpy() for k, v in program.bind((), batch).items()}
        host = place / "model_host.onnx"
        if host.is_file():
            taken = _inputs(host)
            given |= reference(host, {k: v for k, v in given.items() if k in taken})
        feeds.append({k: v for k, v in given.items() if k in _inputs(place / "model.onnx")})
    found = simulate(place / "model.onnx", feeds, soc=device.soc, arch=device.arch, timeout=1800)
    if found.error:
        raise SystemExit(found.error)
    return report, iter(found.outputs)


def _inputs(path: Path) -> dict[str, Any]:
    """Return the inputs of a file and their types."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in graph.input}


def encoder(target: str, length: int) -> Iterator[tuple[str, str, Any, str]]:
    """Yield the encoder's forms with the rank correlation of all similarities between sentences."""
    import sentence_encoder as example

    program = graphopt.capture(example.checkpoint_folder())
    tokenizer = Tokenizer(program)
    sentences = [s for pair in example.read_pairs() for s in pair]
    rows = []
    for sentence in sentences:
        ids = tokenizer.encode(sentence)[:length]
        fill = length - len(ids)
        mask = [1] * len(ids) + [0] * fill
        rows.append({"input_ids": torch.tensor([ids + [0] * fill]), "attention_mask": torch.tensor([mask])})
    judged, kept = rows[:16], rows[16:32] or rows
    calibration = [
        {k: torch.cat([r[k] for r in kept[i : i + 4]]) for k in kept[0]} for i in range(0, len(kept), 4)
    ]

    def similar(hidden: list[torch.Tensor]) -> numpy.ndarray:
        made = torch.cat([example.pool(h, r["attention_mask"]) for h, r in zip(hidden, judged, strict=True)])
        upper = torch.triu_indices(len(made), len(made), 1)
        return (made @ made.T)[upper[0], upper[1]].numpy()

    expected = similar([program(**r)["last_hidden_state"] for r in judged])
    # eight bits lose a BERT with outliers, whatever computes them; with weights in four the check refuses it
    for form in ("", "w8a16"):
        report, outputs = on_npu(
            small(program, form, calibration), judged, {"batch": 1, "sequence": length}, target
        )
        hidden = [torch.from_numpy(o["last_hidden_state"]).float() for o in outputs]
        kept_order = spearmanr(similar(hidden), expected).statistic
        yield (
            "sentence encoder, 22.7 M",
            form,
            report,
            f"rank correlation of {len(expected)} similarities {kept_order:.4f}",
        )


def language(target: str, length: int) -> Iterator[tuple[str, str, Any, str]]:
    """Yield the language model's forms with how often the next token is the same."""
    here = EXAMPLES / "reference_models"
    program = graphopt.capture(here / "models" / "llama")
    calibration = read_data(
        program, here / "data" / "calibration.jsonl", sequences=16, length=length, batch=4
    )[0]
    judged = read_data(program, here / "data" / "validation.jsonl", sequences=8, length=length, batch=1)[0]
    for form in FORMS:
        report, outputs = on_npu(
            small(program, form, calibration), judged, {"batch": 1, "sequence": length}, target
        )
        same = [
            (torch.from_numpy(o["logits"]).argmax(-1) == program(**r)["logits"].argmax(-1)).double().mean()
            for o, r in zip(outputs, judged, strict=True)
        ]
        yield (
            "reference Llama, prefill",
            form,
            report,
            f"same next token at {float(sum(same) / len(same)):.1%} of places",
        )


def decoding(
    target: str, prompts: int = 8, prompt: int = 16, count: int = 64
) -> Iterator[tuple[str, str, Any, str]]:
    """Yield forms of the language model with caches: prompts, then tokens one by one, caches carried by the simulator.

    Each step is given the token that the program in PyTorch, in floats, wrote before it. Where every step says the float's
    next token, what the NPU generates by itself is the same text; where one does not, it says at which token they part, and
    how near the float's two best tokens were there.
    """
    here = EXAMPLES / "reference_models"
    program = graphopt.capture(here / "models" / "llama")
    calibration = read_data(program, here / "data" / "calibration.jsonl", sequences=16, length=64, batch=4)[0]
    batches = read_data(
        program, here / "data" / "validation.jsonl", sequences=prompts, length=prompt, batch=1
    )[0]
    rows, margins = [], []
    for batch in batches:
        row, near = batch["input_ids"][:, :prompt], []
        for _ in range(count):
            best = program(input_ids=row)["logits"][0, -1].topk(2)
            near.append(float(best.values[0] - best.values[1]))
            row = torch.cat([row, best.indices[None, :1]], 1)
        rows.append(row)
        margins.append(near)
    cached = graphopt.optimize(program, f"insert-cache{{max_length={prompt + count}}}")
    stages = ([(0, prompt)], [(i, i + 1) for i in range(prompt, prompt + count - 1)])
    for form in ("", "w8a16", "w4a16"):
        done = small(cached, form, calibration)
        places, report = [], None
        for steps in stages:
            places.append(Path(tempfile.mkdtemp()) / "out")
            sizes = {"batch": 1, "sequence": steps[0][1] - steps[0][0]}
            report = done.lower("onnx", places[-1], target=target, check=True, sizes=sizes)
        right, parted = 0, []
        for row, near in zip(rows, margins, strict=True):
            said = generated(done, places, stages, row, target)
            same = [a == b for a, b in zip(said, row[0, prompt:].tolist(), strict=True)]
            right += sum(same)
            if False in same:
                parted.append((same.index(False) + 1, near[same.index(False)]))
        what = f"{right} of {len(rows) * count} tokens the float's, {len(rows) - len(parted)} of {len(rows)} texts the same"
        what += "".join(f"; one parts at token {n}, logits {d:.3f} apart" for n, d in parted)
        yield "reference Llama, prompt and steps", form, report, what


def generated(done: Program, places: list[Path], stages: Any, row: torch.Tensor, target: str) -> list[int]:
    """Return the likeliest token after each step of a row, by the simulator with its own caches."""
    device = find_target(target)
    caches = [n for n in done.signature.inputs if f"next_{n}" in done.outputs]
    held = done.signature.inputs
    carried = {n: torch.zeros([1, *held[n].shape[1:]], dtype=held[n].dtype).numpy() for n in caches}
    said: list[int] = []
    for place, steps in zip(places, stages, strict=True):
        taken, types = _inputs(place / "model_host.onnx"), _inputs(place / "model.onnx")
        feeds: list[dict[str, Any]] = []
        for first, end in steps:
            given: dict[str, Any] = {
                "input_ids": row[:, first:end].numpy(),
                "position_ids": torch.arange(first, end)[None].numpy(),
            }
            given |= reference(place / "model_host.onnx", {k: v for k, v in given.items() if k in taken})
            given |= {} if feeds else carried
            feeds.append({k: v.astype(types[k]) for k, v in given.items() if k in types})
        found = simulate(
            place / "model.onnx", feeds, soc=device.soc, arch=device.arch, timeout=1800, carry=caches
        )
        if found.error:
            raise SystemExit(found.error)
        said += [int(o["logits"][0, -1].argmax()) for o in found.outputs]
        carried = {n: found.outputs[-1][f"next_{n}"] for n in caches}
    return said


def detector(target: str, count: int = 128, frames: int = 10) -> Iterator[tuple[str, str, Any, str]]:
    """Yield the keyword detector's forms, fused and streaming, its states carried by the simulator."""
    sys.path.insert(0, str(EXAMPLES / "reference_models"))
    from keyword_detector import TEST_SEED, dataset, load_detector
    from keyword_network import clip_score

    module = load_detector()
    clips, labels = dataset(2 * count, TEST_SEED)
    clips = clips[:, :, : clips.shape[-1] // frames * frames]
    others, judged, right = clips[count : 2 * count], clips[:count], labels[:count].bool()
    program = graphopt.optimize(module, "fuse-branches, stream-convolutions", inputs=judged[:4])
    name = next(n for n in program.signature.inputs if f"next_{n}" not in program.outputs)
    states = [n for n in program.signature.inputs if n != name]
    given = program.signature.inputs[name].shape
    sizes = {str(given[0]): 1, str(given[-1]): frames}  # several rows of dilated convolutions come out wrong
    calibration = [{name: part} for part in others.split(32)]
    with torch.no_grad():
        expected = torch.cat([clip_score(module(part)) for part in judged.split(64)])
    device = find_target(target)
    for form in ("", "w8a16", "w8a8"):
        done = small(program, form, calibration)
        place = Path(tempfile.mkdtemp()) / "out"
        report = done.lower("onnx", place, target=target, check=True, sizes=sizes)
        types = _inputs(place / "model.onnx")
        begun = {n: numpy.zeros([1, *done.signature.inputs[n].shape[1:]], types[n]) for n in states}
        pieces = clips.shape[-1] // frames
        feeds = [
            {name: piece.numpy().astype(types[name]), **(begun if number == 0 else {})}
            for row in judged.split(1)
            for number, piece in enumerate(row.split(frames, -1))
        ]
        found = simulate(
            place / "model.onnx", feeds, soc=device.soc, arch=device.arch, timeout=1800, carry=states
        )
        if found.error:
            raise SystemExit(found.error)
        output = next(n for n in done.outputs if not n.startswith("next_"))
        made = [torch.from_numpy(o[output]).float() for o in found.outputs]
        scores = [clip_score(torch.cat(made[i : i + pieces], -1)) for i in range(0, len(made), pieces)]
        found_scores = torch.cat(scores)
        before, after = ((s > 0) == right for s in (expected, found_scores))
        changed = int(((expected > 0) != (found_scores > 0)).sum())
        yield (
            "keyword detector, streaming",
            form,
            report,
            f"accuracy {float(before.float().mean()):.3f} in PyTorch, {float(after.float().mean()):.3f} here, "
            f"{changed} of {count} decisions changed",
        )


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="qnn-htp-v75")
    parser.add_argument("--sequence", type=int, default=32)
    parser.add_argument("--only", choices=("language", "decoding", "detector", "encoder"))
    given = parser.parse_args()
    table = Table("model", "form", "nodes", "to ONNX Runtime, dB", "to float, dB", "what it is for", box=None)
    runs = {
        "language": language(given.target, given.sequence),
        "decoding": decoding(given.target),
        "detector": detector(given.target),
        "encoder": encoder(given.target, given.sequence),
    }
    console = Console(width=140)
    for name, rows in runs.items():
        if given.only not in (None, name):
            continue
        for model, form, report, purpose in rows:
            console.print(f"{model}, {form or 'float16'}: {purpose}")
            told = report.checked
            table.add_row(
                model, form or "float16", str(told.nodes), f"{min(told.against_runtime.values()):.1f}",
                f"{min(told.against_float.values()):.1f}", purpose,
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
