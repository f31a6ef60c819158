"""The reference sequence model: a keyword detector of causal temporal convolutions with redundant branches.

python examples/reference_models/keyword_detector.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from keyword_audio import BANDS, FRAMES, HOP, KEYWORD, RATE, clips, features
from keyword_network import KeywordDetector, clip_score
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from graphopt.training import Record, Settings, Shown, train

HERE = Path(__file__).parent
FOLDER = HERE / "models" / "keyword_detector"
SHAPE: dict[str, Any] = {
    "bands": BANDS, "channels": 48, "dilations": [1, 1, 2, 2, 4, 4], "kernels": [9, 5, 3, 1], "pointwise": 2,
    "identity": True,
}  # fmt: skip
SETTINGS = Settings(steps=3000, learning_rate=4e-3, warmup=100, weight_decay=0.01, seed=4)
TRAINED_ON, JUDGED_ON, BATCH = 8192, 4096, 64
TEST_SEED = 900_000


def dataset(count: int, seed: int, cache: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (clips, bands, frames) and labels of generated clips, kept in ``cache`` if given."""
    if cache is not None and cache.is_file():
        kept = load_file(cache)
        return kept["features"], kept["labels"]
    parts = []
    shown = Shown("generating audio")
    shown.begin(count // 64, 0)
    for index in range(count // 64):
        audio, labels = clips(64, seed + index)
        parts.append((features(audio), labels))
        shown.step(index + 1, float("nan"))
    shown.end()
    made = torch.cat([f for f, _ in parts]), torch.cat([t for _, t in parts])
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": made[0], "labels": made[1]}, cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    return made


def loss(module: nn.Module, batch: Any) -> torch.Tensor:
    """Cross entropy of each clip's highest frame."""
    return F.binary_cross_entropy_with_logits(clip_score(module(batch["features"])), batch["labels"])


def judge(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return how well clips are told apart.

    Returns:
        accuracy: share of clips on the right side of zero.
        false_rejects: share of keywords missed at a threshold that 5 % of the other clips pass.
        equal_error: where as many keywords are missed as others pass.
    """
    device = next(module.parameters()).device
    with torch.no_grad():
        scores = torch.cat([clip_score(module(part.to(device))).cpu() for part in inputs.split(256)])
    with_keyword, others = scores[labels > 0.5], scores[labels < 0.5].sort().values
    threshold = others[int(0.95 * len(others))]
    levels = scores.sort().values
    missed = torch.searchsorted(with_keyword.sort().values, levels) / len(with_keyword)
    passed = 1 - torch.searchsorted(others, levels) / len(others)
    closest = int((missed - passed).abs().argmin())
    return {
        "accuracy": float(((scores > 0) == (labels > 0.5)).float().mean()),
        "false_rejects": float((with_keyword < threshold).float().mean()),
        "equal_error": float((missed[closest] + passed[closest]) / 2),
    }


def train_detector(
    work_dir: Path, shape: dict[str, Any] = SHAPE, settings: Settings = SETTINGS, cache: Path | None = None
) -> tuple[KeywordDetector, Record, dict[str, float]]:
    """Train a detector, or go on training it; return it with what it reaches on clips of its own."""
    cache = cache or work_dir
    inputs, labels = dataset(TRAINED_ON, 0, cache / "train.safetensors")
    held_inputs, held_labels = dataset(JUDGED_ON, TEST_SEED, cache / "test.safetensors")

    def batch(number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        chosen = torch.randint(len(inputs), (BATCH,), generator=generator)
        # another loudness and another moment each time
        level = 0.3 * torch.randn(BATCH, 1, 1, generator=generator)
        shift = int(torch.randint(-6, 7, (), generator=generator))
        return {"features": inputs[chosen].roll(shift, -1) + level, "labels": labels[chosen]}

    torch.manual_seed(settings.seed)
    module = KeywordDetector(**shape)
    record = train(
        module,
        batch,
        loss,
        settings,
        work_dir=work_dir,
        measure=lambda m: judge(m, held_inputs[:1024], held_labels[:1024]),
        measure_every=250,
        progress=Shown("keyword_detector"),
    )
    module = module.cpu().eval()
    return module, record, judge(module, held_inputs, held_labels)


def load_detector(folder: Path = FOLDER) -> KeywordDetector:
    """Return the shipped detector in its training form, in evaluation mode."""
    module = KeywordDetector(**json.loads((folder / "config.json").read_text()))
    module.load_state_dict(
        {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}, strict=False
    )
    return module.eval()


def publish(module: KeywordDetector, record: Record, output: Path, results: dict[str, float]) -> None:
    """Write weights, configuration, results and card."""
    from picture import draw_losses

    output.mkdir(parents=True, exist_ok=True)
    state = {
        n: t.contiguous() for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")
    }
    save_file(state, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps(SHAPE, indent=2) + "\n")
    parameters = sum(p.numel() for p in module.parameters())
    minutes = round(record.seconds / 60, 1)
    numbers = {
        "parameters": parameters,
        "steps": record.step,
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "test": results,
    }
    (output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    draw_losses(record, output / "loss.png", "keyword detector", {})
    settings = "\n".join(f"| {k} | {v} |" for k, v in {**SHAPE, **SETTINGS.plain()}.items())
    (output / "README.md").write_text(
        CARD.format(
            **results, parameters=parameters, steps=record.step, minutes=minutes, settings=settings,
            keyword=" ".join(KEYWORD), seconds=FRAMES * HOP / RATE, trained=TRAINED_ON, judged=JUDGED_ON,
            batch=BATCH,
        )
    )  # fmt: skip


CARD = """# Keyword detector: {parameters:,} parameters in training form

A reference model of graphopt: a causal temporal network whose stages are sums of branches with a BatchNorm each,
as RepCNN trains them. It hears one made-up word, "{keyword}", in generated speech.

**What it is good for:** regression tests and trends of rewrites that fuse, expand, quantise and stream such
networks. **What it is not:** a detector of anything that people say. Its audio is synthetic: sounds from formants
and bands of noise, many voices, in coloured noise (0 to 20 decibels) and babble; a quarter of all clips hold words
that differ from the keyword by one sound or an exchange of two.

| on {judged:,} clips of {seconds} seconds that it was not trained on | |
| --- | --- |
| clips on the right side of zero | {accuracy:.4f} |
| keywords missed where 5 % of other clips pass | {false_rejects:.4f} |
| equal error rate | {equal_error:.4f} |

![loss over steps](loss.png)

{trained:,} generated clips, {steps} steps of {batch}, {minutes} minutes on a machine of two processor cores,
shared with other work: `python examples/reference_models/keyword_detector.py` makes audio and model again.

| | |
| --- | --- |
{settings}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the keyword detector; interrupted runs go on.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER)
    parser.add_argument("--work-dir", type=Path, default=HERE / "runs" / "keyword_detector")
    parser.add_argument("--threads", type=int, default=2, help="the same number gives the same weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        publish_this = train_detector(arguments.work_dir)
    except KeyboardInterrupt as stopped:
        raise SystemExit(f"{stopped}; the same command goes on from there") from None
    publish(publish_this[0], publish_this[1], arguments.output, publish_this[2])
    print(json.dumps(publish_this[2]))
