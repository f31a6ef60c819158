"""Split the small Llama's feed-forwards and teach its routers: by a plain PyTorch loop, and by transformers' Trainer.

    python examples/train_experts.py [--steps 20]

A recipe is a loss, what is trained and what a batch becomes; the module is an ordinary ``nn.Module``. Whatever loop trained
it, what it learned goes back into the program by name.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from study import CALIBRATION, JUDGED, calibration, reference_model
from torch import nn

import graphopt
from graphopt.data.reading import read_data
from graphopt.training.recipes import DynaMoE, Recipe


def plain_loop(recipe: Recipe, batches: list[dict[str, torch.Tensor]], steps: int) -> nn.Module:
    """Train as anyone would."""
    module = recipe.module()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        loss = recipe.loss(module, recipe.transform(batches[step % len(batches)], step / steps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"plain loop, step {step}: loss {loss.item():.4f}")
    return module


def trainer(recipe: Recipe, batches: list[dict[str, torch.Tensor]], steps: int) -> nn.Module:
    """Train by transformers' Trainer, which asks for a loss and nothing else."""
    from transformers import Trainer, TrainingArguments

    class RecipeTrainer(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, torch.Tensor], *rest: Any, **options: Any
        ) -> Any:
            done = self.state.global_step / self.state.max_steps
            return recipe.loss(model, recipe.transform(inputs, done))

    rows = [
        {name: tensor[i] for name, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=4, logging_steps=5, report_to="none",
            save_strategy="no", remove_unused_columns=False, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        made = RecipeTrainer(model=recipe.module(), args=arguments, train_dataset=rows)
        made.train()
        return made.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    llama = reference_model("llama")
    split = graphopt.optimize(llama, "split-ffn", data=calibration(llama, 8))
    batches = read_data(split, CALIBRATION, sequences=32, length=128, batch=4)[0]
    recipe = DynaMoE(theta=0.8, train="routers").recipe(split)
    for name, train in (("plain loop", plain_loop), ("Trainer", trainer)):
        done = recipe.finish(split, train(recipe, batches, arguments.steps))
        points = graphopt.sweep(done, JUDGED, settings=[0.25, 0.5, 0.75, 1.0], sequences=8, length=256)
        for p in points:
            print(
                f"{name}: delta {p.setting:g}: mean width {p.share:.1%}, perplexity {p.values['perplexity']:.2f}"
            )


if __name__ == "__main__":
    main()
