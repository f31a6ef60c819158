"""Trains mask tokens to predict the tokens after the next (arXiv 2507.11851)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...ir.errors import UsageError
from ...ir.facts import KVCache
from ...ir.facts import MaskTokens as Masked
from ...ir.needs import NONZERO
from ...ir.option import option
from ...ir.program import Program
from .base import Batch, Method, Recipe

PREFIX = "mask_tokens."


@dataclass(frozen=True, kw_only=True)
class MaskTokens(Method):
    """Cross-entropy of head and sampler predictions at mask tokens, and latent consistency; the model is frozen.

    One forward pass computes a row's text and, beside it, mask tokens after some of its tokens, which attend to the text
    up to there and to one another. Mask token j after position p predicts the token at p + j + 1; the sampler reads the
    true token before that. Latent consistency pulls its hidden state towards the model's own hidden state for the same
    token, through which no gradient flows. The paper does not give the weights of the three losses; 1 is used for each.
    """

    name = "mask-tokens"
    paper = "arXiv 2507.11851"

    anchors: int = option(48, help="number of tokens of a row that get mask tokens after them", low=1)
    head: float = option(1.0, help="weight of the head's cross-entropy", source="ours", low=0)
    sampler: float = option(1.0, help="weight of the sampler's cross-entropy", source="ours", low=0)
    consistency: float = option(1.0, help="weight of latent consistency", source="ours", low=0)
    targets: str = option(
        "text", help="what mask tokens learn to predict", choices=("text", "model"),
        needs=[{"head": NONZERO}, {"sampler": NONZERO}],
    )  # fmt: skip

    def recipe(self, program: Program) -> Recipe:
        """Return the recipe for a program that went through attach-mask-tokens, then insert-cache{tree=true}."""
        masked = program.facts.get(Masked)
        if masked is None or "mask_logits" not in program.outputs:
            raise UsageError("this program has no mask tokens", hint="run the pass attach-mask-tokens first")
        cache = program.facts.get(KVCache)
        if cache is None or not cache.tree:
            raise UsageError(
                "training mask tokens needs a program whose attention mask is an input",
                hint="run insert-cache{tree=true} after attach-mask-tokens, and train the result",
            )
        count, fixed = masked.masks, cache.capacity

        def transform(batch: Batch, done: float = 0.0) -> Batch:
            return {**batch, **_with_mask_tokens(batch["input_ids"], count, self.anchors)}

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            columns = batch["positions"].shape[1]
            if isinstance(fixed, int) and columns > fixed:
                raise UsageError(
                    f"rows with their mask tokens need {columns} slots, the program's caches have {fixed}",
                    hint="use shorter rows, fewer anchors, or insert-cache without max_length",
                )
            inputs = {
                cache.tokens: batch["packed"], cache.positions: batch["positions"], "cache_slots": batch["slots"],
                "step_mask": batch["seen"], "mask_index": batch["marks"], "sampler_ids": batch["before"],
                **_caches(program, batch["packed"], columns if fixed == "capacity" else int(fixed)),
            }  # fmt: skip
            return self._loss(module(**inputs), batch, count, cache.logits)

        names = {w.name for w in program.weights.values() if w.name.startswith(PREFIX)}
        return Recipe(self.name, loss, transform, trainable=lambda name: name in names, form=program)

    def _loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, count: int, logits: str
    ) -> torch.Tensor:
        ids, anchors = batch["input_ids"], batch["anchors"]
        length = ids.shape[1]
        rows, anchor_count = anchors.shape
        predecessors = anchors[:, :, None] + torch.arange(
            1, count + 1, device=ids.device
        )  # the position before the target
        inside = predecessors + 1 < length
        gathered_at = predecessors.clamp(max=length - 2).flatten(1)
        counted = inside.flatten(1).to(torch.float32)
        for name in ("attention_mask", "loss_mask"):
            if name in batch:
                counted = counted * batch[name].gather(1, gathered_at + 1)
        target = ids.gather(1, gathered_at + 1)
        vocabulary = outputs[logits].shape[-1]
        vocabulary_index = gathered_at[:, :, None].expand(-1, -1, vocabulary)
        model_odds = (
            outputs[logits].gather(1, vocabulary_index).detach().float().softmax(-1)
            if self.targets == "model"
            else None
        )

        def cross_entropy(values: torch.Tensor) -> torch.Tensor:
            predicted = values[:, length:].float().transpose(1, 2)
            return F.cross_entropy(
                predicted, target if model_odds is None else model_odds.transpose(1, 2), reduction="none"
            )

        hidden = outputs["mask_hidden"]
        model_hidden = hidden.gather(1, gathered_at[:, :, None].expand(-1, -1, hidden.shape[-1])).detach()
        latent_distance = (hidden[:, length:].float() - model_hidden.float()).square().mean(-1)
        losses = self.head * cross_entropy(outputs[logits]) + self.sampler * cross_entropy(
            outputs["mask_logits"]
        )
        losses = losses + self.consistency * latent_distance
        assert losses.shape == (rows, anchor_count * count)
        return (losses * counted).sum() / counted.sum().clamp(min=1)


def _with_mask_tokens(ids: torch.Tensor, count: int, anchors: int) -> dict[str, torch.Tensor]:
    """Return rows with mask tokens beside them, after randomly drawn positions.

    Args:
        ids: (batch, sequence).
        count: number of mask tokens after each of these positions.
        anchors: number of these positions.

    Returns:
        ``packed``, ``positions``, ``slots``, ``marks``, ``before`` (batch, columns), ``seen`` (batch, columns, columns),
        ``anchors`` (batch, anchors), where columns are those of the text and of the mask tokens.
    """
    rows, length = ids.shape
    device = ids.device
    anchor_count = max(1, min(anchors, length - 2))
    drawn = torch.rand(rows, max(length - 2, 1)).argsort(1)[:, :anchor_count].sort(1).values.to(device)
    mark = torch.arange(1, count + 1, device=device)
    position = drawn[:, :, None] + mark
    text = torch.arange(length, device=device)
    extra = anchor_count * count
    anchor = drawn[:, :, None].expand(-1, -1, count).reshape(rows, extra)
    block = torch.arange(anchor_count, device=device).repeat_interleave(count)
    marks = mark.repeat(anchor_count)
    seen = torch.zeros(rows, length + extra, length + extra, dtype=torch.bool, device=device)
    seen[:, :length, :length] = text[:, None] >= text[None]
    seen[:, length:, :length] = text[None, None] <= anchor[:, :, None]
    seen[:, length:, length:] = (block[:, None] == block[None]) & (marks[:, None] >= marks[None])
    gathered_at = position.flatten(1).clamp(max=length - 1)
    following = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
    slots = torch.arange(length + extra, device=device)
    return {
        "packed": torch.cat([ids, torch.zeros(rows, extra, dtype=ids.dtype, device=device)], 1),
        "positions": torch.cat([text.expand(rows, -1), position.flatten(1)], 1),
        "slots": slots.expand(rows, -1).contiguous(),
        "marks": torch.cat([torch.zeros(length, dtype=torch.int64, device=device), marks]).expand(rows, -1).contiguous(),
        "before": torch.cat([following, ids.gather(1, gathered_at)], 1),
        "seen": seen,
        "anchors": drawn,
    }  # fmt: skip


def _caches(program: Program, ids: torch.Tensor, capacity: int) -> dict[str, torch.Tensor]:
    """Return empty caches, by input name."""
    caches = {}
    for name, spec in program.signature.inputs.items():
        if f"next_{name}" in program.outputs:
            heads, size = int(spec.shape[1]), int(spec.shape[3])
            caches[name] = torch.zeros(
                ids.shape[0], heads, capacity, size, dtype=spec.dtype, device=ids.device
            )
    return caches
