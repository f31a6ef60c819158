"""What the reference language models share: batches of tokens, training, and what is written at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import FOLDER, read_split
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from vocabulary import vocabulary

from graphopt.training import Record, Settings, Shown, train

HERE = Path(__file__).parent
TOKENS_A_STEP = 4096
SHORT, LONG = 256, 512  # the last part of training is on rows of the full context length
_LONG_FROM = 0.7
_MEASURED_ROWS = 32


@dataclass(frozen=True)
class LanguageModel:
    """One of the reference models.

    Args:
        name: of its folder under ``models/``.
        title: for its card.
        build: returns the untrained module.
        settings: of its training.
    """

    name: str
    title: str
    build: Callable[[], PreTrainedModel]
    settings: Settings


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Return texts as one row of tokens; each begins with the token that ends a text."""
    return torch.tensor([i for e in tokenizer.encode_batch(texts) for i in e.ids], dtype=torch.long)


def batches(tokens: torch.Tensor, settings: Settings) -> Callable[[int], dict[str, torch.Tensor]]:
    """Return batch n of a run: rows from random places, drawn by the seed and n alone."""

    def batch(number: int) -> dict[str, torch.Tensor]:
        length = LONG if number >= _LONG_FROM * settings.steps else SHORT
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        starts = torch.randint(len(tokens) - length, (TOKENS_A_STEP // length,), generator=generator)
        return {"input_ids": torch.stack([tokens[s : s + length] for s in starts.tolist()])}

    return batch


def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean negative log likelihood of each next token, and what balances a mixture's experts."""
    value: torch.Tensor = module(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    return value


def measuring(tokens: torch.Tensor) -> Callable[[nn.Module], dict[str, float]]:
    """Return what measures the loss on some held-out rows while training goes on."""
    rows = tokens[: _MEASURED_ROWS * LONG].reshape(-1, LONG)

    def measure(module: nn.Module) -> dict[str, float]:
        device = next(module.parameters()).device
        total = 0.0
        for row in rows.split(8):
            logits = module(input_ids=row.to(device)).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].to(device).flatten())) * len(row)
        return {"validation loss": total / len(rows)}

    return measure


def train_language_model(
    model: LanguageModel, work_dir: Path, data: Path, tokenizer: Tokenizer
) -> tuple[PreTrainedModel, Record]:
    """Train, or go on training, with progress; the state is in ``work_dir``."""
    torch.manual_seed(model.settings.seed)
    module = model.build()
    record = train(
        module,
        batches(encode(tokenizer, read_split("train", data)), model.settings),
        loss,  # type: ignore[arg-type]
        model.settings,
        work_dir=work_dir,
        measure=measuring(encode(tokenizer, read_split("validation", data))),
        measure_every=100,
        progress=Shown(model.name),
    )
    return module.cpu().eval(), record


def main(model: LanguageModel) -> None:
    """Run the command line of a model's script."""
    parser = argparse.ArgumentParser(description=f"Train {model.title}; interrupted runs go on.")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "models" / model.name)
    parser.add_argument("--work-dir", type=Path, default=HERE / "runs" / model.name)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=2, help="the same number gives the same weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = vocabulary()
    try:
        module, record = train_language_model(model, arguments.work_dir, arguments.data, tokenizer)
    except KeyboardInterrupt as stopped:
        raise SystemExit(f"{stopped}; the same command goes on from there") from None
    from publish import publish

    publish(model, module, record, tokenizer, arguments.output, arguments.data)
