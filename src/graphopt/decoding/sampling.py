"""From logits to tokens: the most likely token, or a sampled one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it and a token is sampled.
        top_k: sample only among this many most likely tokens.
        top_p: sample only among the most likely tokens whose probabilities add up to this.
        typical: accept a candidate that is not unlikely, instead of by its probability; this changes the text.

    Raises:
        UsageError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    typical: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature is {self.temperature}; it is 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}; it is 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it lies above 0, up to 1")

        if self.typical is not None and not (0 < self.typical <= 1 and self.temperature > 0):
            raise UsageError("typical acceptance takes a number above 0, up to 1, and a temperature above 0")

    def acceptable(self, odds: torch.Tensor) -> torch.Tensor:
        """Return which tokens typical acceptance accepts: ``p > min(e, sqrt(e) * exp(-entropy))`` (arXiv 2401.10774).

        Args:
            odds: (vocabulary,), float64.
        """
        assert self.typical is not None
        entropy = -(odds * odds.clamp(min=1e-300).log()).sum()
        return odds > torch.minimum(torch.tensor(self.typical), self.typical**0.5 * torch.exp(-entropy))

    @property
    def greedy(self) -> bool:
        """Tell whether the most likely token is always taken."""
        return self.temperature == 0

    def distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """Return probabilities (..., vocabulary) in float64, after temperature, top-k and top-p, in this order."""
        wide = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < wide.shape[-1]:
            least = wide.topk(self.top_k, dim=-1).values[..., -1:]
            wide = wide.masked_fill(wide < least, float("-inf"))
        odds = torch.softmax(wide, -1)
        if self.top_p is not None:
            ordered, order = odds.sort(dim=-1, descending=True, stable=True)
            # a token is kept if those before it do not add up to top_p yet
            excluded = ordered.cumsum(-1) - ordered >= self.top_p
            odds = odds.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), 0.0)
            odds = odds / odds.sum(-1, keepdim=True)
        return odds


def draw(odds: torch.Tensor, generator: torch.Generator) -> int:
    """Return one token sampled from its distribution (vocabulary,)."""
    return int(torch.multinomial(odds, 1, generator=generator))
