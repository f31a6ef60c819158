"""What a cache of bounded size keeps: policies that choose, layer by layer and head by head, which tokens stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..ir.errors import UsageError
from ..ir.operators import causal_conv1d_state
from .naming import named

SINKS = 4
"""First tokens of a text that are always kept: attention rests on them (arXiv 2309.17453)."""


@dataclass
class Held:
    """What one layer holds of some rows, the slots in use only.

    Attributes:
        positions: (rows, heads, slots), the position of the token in each slot, ascending; -1 in empty slots at the end.
        keys: (rows, heads, slots, size).
        scores: (rows, heads, planes, slots), what the policy has counted so far.
        window: how many tokens the layer sees; None if it sees everything.
    """

    positions: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor
    window: int | None = None


class Policy(ABC):
    """Chooses which tokens a layer keeps.

    Texts are read in pieces of ``block`` tokens; after each of them, and whenever as many new tokens were written, a
    layer is cut to ``budget`` tokens. So no layer ever holds more than ``budget + block``, whatever the text's length,
    and nothing is lost while a text has at most ``budget`` tokens.

    Args:
        budget: number of tokens that a layer keeps for each head.
        block: number of tokens after which it is cut.
        sinks: number of first tokens that are always kept.

    Raises:
        UsageError: the budget leaves no room beside the sinks.
    """

    name: ClassVar[str] = ""
    counts: ClassVar[bool] = False
    """Whether attention's scores are needed."""
    planes: int = 1
    """How many numbers are counted for each token."""

    def __init__(self, budget: int, block: int = 256, sinks: int = SINKS):
        for option, value, low in (("budget", budget, 1), ("block", block, 1), ("sinks", sinks, 0)):
            _whole(self, option, value, low)
        if budget <= sinks:
            raise UsageError(
                f"{self.name}: a budget of {budget} tokens leaves nothing beside {sinks} sinks",
                hint="a larger budget, or fewer sinks",
            )
        self.budget, self.block, self.sinks = budget, block, sinks

    def observe(self, scores: torch.Tensor, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Return the scores of a layer's tokens after more attention was seen.

        Args:
            scores: (rows, heads, planes, slots), so far.
            weights: (rows, heads, queries, slots), what new tokens attended to, summed over the heads of a group.
            queries: (rows, queries), which of the new tokens count.
        """
        return scores

    @abstractmethod
    def value(self, held: Held) -> torch.Tensor:
        """Return how much each token is worth: (rows, heads, slots), infinite for tokens that must stay."""

    def kept(self, held: Held) -> torch.Tensor:
        """Return the slots that are kept, in order: (rows, heads, budget); those of empty slots come last."""
        value = self.value(held)
        if held.window is not None:
            # what the layer never sees again goes first
            unseen = held.positions <= held.positions.amax(-1, keepdim=True) + 1 - held.window
            value = value.masked_fill(unseen, torch.finfo(value.dtype).min)
        value = value.masked_fill(held.positions < self.sinks, torch.inf)
        value = value.masked_fill(held.positions < 0, -torch.inf)
        slots = value.shape[-1]
        # of equal tokens the newer one stays
        order = torch.argsort(value.flip(-1), dim=-1, descending=True, stable=True)
        chosen = slots - 1 - order[..., : self.budget]
        return chosen.sort(-1).values


class Window(Policy):
    """Keeps the newest tokens, and the sinks (StreamingLLM, arXiv 2309.17453)."""

    name = "window"

    def value(self, held: Held) -> torch.Tensor:
        """Return the position."""
        return held.positions.to(torch.float32)


class Random(Policy):
    """Keeps random tokens, the sinks and the newest ones: what a policy has to beat.

    Args:
        recent: number of newest tokens that are always kept; a quarter of the budget by default.
        seed: of the choice.
    """

    name = "random"

    def __init__(
        self, budget: int, block: int = 256, sinks: int = SINKS, recent: int | None = None, seed: int = 0
    ):
        super().__init__(budget, block, sinks)
        self.recent, self.seed = _recent(self, recent), _whole(self, "seed", seed, 0)

    def value(self, held: Held) -> torch.Tensor:
        """Return numbers that follow from head and position, so that the order of steps changes nothing."""
        heads = torch.arange(held.positions.shape[1], device=held.positions.device)[:, None]
        mixed = (held.positions + 1) * 2654435761 + heads * 40503 + self.seed * 97
        mixed = (mixed ^ (mixed >> 15)) * 2246822519 % (1 << 31)
        return _with_newest((mixed ^ (mixed >> 13)).to(torch.float64), held.positions, self.recent)


class HeavyHitters(Policy):
    """Keeps the tokens that were attended to most since they were written, and the newest ones (H2O, arXiv 2306.14048).

    Args:
        recent: number of newest tokens that are always kept; half of the budget by default.
    """

    name = "heavy-hitters"
    counts = True

    def __init__(self, budget: int, block: int = 256, sinks: int = SINKS, recent: int | None = None):
        super().__init__(budget, block, sinks)
        self.recent = _recent(self, recent, 2)

    def observe(self, scores: torch.Tensor, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Add what the new tokens attended to."""
        return scores + (weights * queries[:, None, :, None]).sum(2, keepdim=True)

    def value(self, held: Held) -> torch.Tensor:
        """Return the sums."""
        return _with_newest(held.scores[:, :, 0], held.positions, self.recent)


class Observed(Policy):
    """Keeps what the last tokens attended to, with its neighbours (SnapKV, arXiv 2404.14469), and these tokens.

    Args:
        window: number of last tokens.
        pool: number of neighbours over which scores are averaged; odd.
    """

    name = "observed"
    counts = True

    def __init__(self, budget: int, block: int = 256, sinks: int = SINKS, window: int = 32, pool: int = 5):
        super().__init__(budget, block, sinks)
        if _whole(self, "window", window, 1) + sinks > budget:
            raise UsageError(
                f"{self.name}: a window of {window} tokens and {sinks} sinks do not fit into the budget of {budget}",
                hint=f"{self.name}{{budget={budget} window={max(1, (budget - sinks) // 2)}}}, or a larger budget",
            )
        if _whole(self, "pool", pool, 1) % 2 == 0:
            raise UsageError(f"{self.name}: pool is {pool}; it is an odd number")
        self.window, self.pool, self.planes = window, pool, window

    def observe(self, scores: torch.Tensor, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Remember what the last tokens attended to, each of them apart."""
        rows, heads, _, slots = scores.shape
        state, new = (t.permute(0, 1, 3, 2).reshape(rows, heads * slots, -1) for t in (scores, weights))
        last = causal_conv1d_state(new, state, queries)
        return last.reshape(rows, heads, slots, self.window).permute(0, 1, 3, 2)

    def value(self, held: Held) -> torch.Tensor:
        """Return the scores, averaged over neighbours, of which the last tokens themselves are none."""
        scores = held.scores.mean(2).masked_fill(_newest(held.positions, self.window), 0.0)
        pooled = F.avg_pool1d(scores, self.pool, stride=1, padding=self.pool // 2)
        return _with_newest(pooled, held.positions, self.window)


class KeyNorm(Policy):
    """Keeps tokens with small keys, which attract more attention (arXiv 2406.11430), and the newest ones.

    Args:
        recent: number of newest tokens that are always kept; a quarter of the budget by default.
    """

    name = "key-norm"

    def __init__(self, budget: int, block: int = 256, sinks: int = SINKS, recent: int | None = None):
        super().__init__(budget, block, sinks)
        self.recent = _recent(self, recent)

    def value(self, held: Held) -> torch.Tensor:
        """Return the negative norm of the keys."""
        return _with_newest(-held.keys.float().norm(dim=-1), held.positions, self.recent)


class Merge(Policy):
    """Merges tokens with similar keys instead of dropping any (Chelsea, arXiv 2506.11418).

    Between the sinks and the newest tokens, every other token of a chunk may join the token of the chunk whose key is most
    like its own; the pairs most alike are merged, until the budget holds. A merged entry has the mean of its keys and
    values, weighted by how many tokens they stand for, and its score grows by the logarithm of that number: equal tokens
    are merged without any loss. It stands where the last of its tokens stood.

    Args:
        recent: number of newest tokens that stay as they are; a quarter of the budget by default.
        chunk: number of neighbours among which pairs are looked for.
    """

    name = "merge"

    def __init__(
        self, budget: int, block: int = 256, sinks: int = SINKS, recent: int | None = None, chunk: int = 32
    ):
        super().__init__(budget, block, sinks)
        self.recent, self.chunk = _recent(self, recent), _whole(self, "chunk", chunk, 2)
        if self.recent + sinks >= budget:
            raise UsageError(
                f"{self.name}: {self.recent} newest tokens and {sinks} sinks leave no entry of the budget of {budget} "
                "to merge into",
                hint="a larger budget, or fewer newest tokens",
            )

    def value(self, held: Held) -> torch.Tensor:
        """Return the position: what is merged is chosen by keys, not by worth."""
        return held.positions.to(torch.float32)

    def merged(
        self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the entries of one row after merging: as many as the budget.

        Args:
            positions: (heads, slots), ascending, without empty slots.
            keys: (heads, slots, size).
            values: (heads, slots, size).
            counts: (heads, slots), how many tokens each entry stands for.
        """
        while positions.shape[1] > self.budget:
            positions, keys, values, counts = self._round(positions, keys, values, counts)
        return positions, keys, values, counts

    def _round(
        self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Merge once, at most half of the entries between sinks and newest tokens."""
        heads, slots = positions.shape
        low, high = min(self.sinks, slots), slots - self.recent
        size = min(self.chunk, high - low)
        chunks = -(-(high - low) // size)
        pad = chunks * size - (high - low)
        inner = F.pad(F.normalize(keys[:, low:high].float(), dim=-1), (0, 0, 0, pad))
        inner = inner.view(heads, chunks, size, -1)
        joining, staying = inner[:, :, 0::2], inner[:, :, 1::2]
        place = torch.arange(low, low + chunks * size, device=keys.device).view(chunks, size)
        alike = joining @ staying.transpose(-1, -2)
        alike = alike.masked_fill((place[:, 0::2] >= high)[:, :, None], -torch.inf)
        alike = alike.masked_fill((place[:, 1::2] >= high)[:, None, :], -torch.inf)
        best, partner = alike.max(-1)
        best, partner = best.flatten(1), place[:, 1::2].expand(heads, -1, -1).gather(2, partner).flatten(1)
        possible = int((best[0] > -torch.inf).sum())
        chosen = best.topk(min(slots - self.budget, possible), dim=1).indices
        source = place[:, 0::2].reshape(1, -1).expand(heads, -1).gather(1, chosen)
        target = partner.gather(1, chosen)
        weights = counts.gather(1, source)
        total = counts.scatter_add(1, target, weights)

        def mean(entries: torch.Tensor) -> torch.Tensor:
            wide = entries * counts[..., None].to(entries.dtype)
            index = source[..., None].expand(-1, -1, entries.shape[-1])
            moved = wide.gather(1, index)
            wide = wide.scatter_add(1, target[..., None].expand_as(index), moved)
            return wide / total[..., None].to(entries.dtype)

        # of entries that are merged, the last position counts
        last = positions.scatter_reduce(1, target, positions.gather(1, source), "amax")
        last = last.scatter(1, source, torch.iinfo(last.dtype).max)
        order = last.argsort(1)[:, : slots - chosen.shape[1]]
        wide = order[..., None].expand(-1, -1, keys.shape[-1])
        wide_values = order[..., None].expand(-1, -1, values.shape[-1])
        return (
            last.gather(1, order), mean(keys).gather(1, wide), mean(values).gather(1, wide_values), total.gather(1, order)
        )  # fmt: skip


class Episode(Policy):
    """Keeps what the words of an episode attend to (EpiCache, arXiv 2509.17396).

    After each piece of the text, the episode's words are computed behind it without being kept; a token is worth the
    largest share of attention that one of them pays to it, among the tokens held.

    Args:
        probe: the episode's words, as tokens.
        recent: number of newest tokens that are always kept; none by default, as published.
    """

    name = "episode"
    counts = True

    def __init__(
        self, budget: int, block: int = 256, sinks: int = SINKS, probe: tuple[int, ...] = (), recent: int = 0
    ):
        super().__init__(budget, block, sinks)
        if not isinstance(probe, Sequence) or isinstance(probe, str) or not probe:
            raise UsageError(
                f"{self.name}: the episode has no words",
                hint="give its tokens as probe; a conversation with episodes finds them by itself",
            )
        for token in probe:
            _whole(self, "a token of probe", token, 0)
        self.probe, self.recent = tuple(probe), _recent(self, recent)

    def value(self, held: Held) -> torch.Tensor:
        """Return the largest shares of attention."""
        return _with_newest(held.scores[:, :, 0], held.positions, self.recent)


class ByLayer:
    """Policies of single layers, of one kind: budgets differ, and options that follow from them.

    Args:
        policies: one for each layer with caches, from the first on.

    Raises:
        UsageError: there is none, or they differ in what layers have in common: kind, block, sinks, what is counted.
    """

    def __init__(self, policies: Sequence[Policy]):
        self.policies = tuple(policies)
        if not self.policies:
            raise UsageError("budgets by layer need a policy for each layer")
        first = self.policies[0]
        for number, policy in enumerate(self.policies):
            if not isinstance(policy, Policy):
                raise UsageError(
                    f"layer {number} has {policy!r}: budgets by layer are of policies that drop tokens"
                )
        for number, policy in enumerate(self.policies):
            for what in ("name", "block", "sinks", "planes", "probe"):
                if getattr(policy, what, None) != getattr(first, what, None):
                    raise UsageError(
                        f"layer {number} has another {what} than layer 0: they differ in budgets alone"
                    )
        self.name, self.block, self.sinks = first.name, first.block, first.sinks

    @property
    def budget(self) -> int:
        """The mean of the budgets, rounded up."""
        return -(-sum(policy.budget for policy in self.policies) // len(self.policies))


class Reading:
    """Keeps everything and lets new tokens read ``budget`` of the tokens before them; prompts read everything.

    Args:
        budget: number of tokens that a new token reads in each layer and head of keys.
        recent: number of newest tokens, itself included, that are always among them.
        dense: number of first layers that read everything.

    Raises:
        UsageError: an option is out of its range.
    """

    name: ClassVar[str] = ""

    def __init__(self, budget: int, recent: int = 16, dense: int = 2):
        for option, value, low in (("budget", budget, 1), ("recent", recent, 1), ("dense", dense, 0)):
            _whole(self, option, value, low)
        if recent > budget:
            raise UsageError(
                f"{self.name}: {recent} newest tokens do not fit into the budget of {budget}",
                hint="a larger budget, or a smaller recent",
            )
        self.budget, self.recent, self.dense = budget, recent, dense


class Select(Reading):
    """Reads the tokens with the largest scores by a few channels of their keys (Double Sparsity, arXiv 2408.07092).

    The channels are those in which the first ``budget`` keys of a row are largest, so no data are needed. They are kept a
    second time, side by side.

    Args:
        budget: number of tokens that a new token reads in each layer and head of keys.
        channels: number of channels of a key that choose them; even, since rotated channels go by pairs.
        recent: number of newest tokens, itself included, that are always among them.
        dense: number of first layers that read everything.
    """

    name = "select"

    def __init__(self, budget: int, channels: int = 16, recent: int = 16, dense: int = 2):
        super().__init__(budget, recent, dense)
        if _whole(self, "channels", channels, 2) % 2:
            raise UsageError(f"{self.name}: channels is {channels}; it is an even number")
        self.channels = channels


class Reuse(Reading):
    """Reads in most layers what scored highest in a layer before that reads everything (TidalDecode, arXiv 2410.05076).

    Layers with a window read all of it.

    Args:
        budget: number of tokens that a new token reads in each layer and head of keys.
        select: the layers that read everything and choose for those after them. Layers before the first of them read
            everything. By default the third layer, and one at 13 of 32 that corrects, as in the paper, or the next layers
            that see everything.
        recent: number of newest tokens, itself included, that are always among them.
    """

    name = "reuse"

    def __init__(self, budget: int, select: Sequence[int] | None = None, recent: int = 16):
        if select is None:
            super().__init__(budget, recent, 0)
            self.select: tuple[int, ...] = ()
            return
        if isinstance(select, (str, int)) or not select:
            raise UsageError(f"{self.name}: select is {select!r}; it is a list of layers, [2 13]")
        for layer in select:
            _whole(self, "each of select", layer, 0)
        super().__init__(budget, recent, min(select))
        self.select = tuple(sorted(set(select)))

    def among(self, free: Sequence[int], layers: int) -> Reuse:
        """Return the policy with the layers that choose, if none were named.

        Args:
            free: numbers of the layers that see everything, in order.
            layers: number of layers with caches.
        """
        if self.select or len(free) < 2:
            return self
        # the last one has nothing after it to choose for
        *able, _ = free
        first = next((n for n in able if n >= 2), able[0])
        second = [n for n in able if n > first and n >= round(layers * 13 / 32)][:1]
        return Reuse(self.budget, [first, *second], self.recent)


def _whole(policy: Policy | Reading, option: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{policy.name}: {option} is {value!r}; it is a whole number from {low} on")
    return value


def _recent(policy: Policy, recent: int | None, part: int = 4) -> int:
    """Return how many newest tokens stay: what was asked for, or a part of the budget as far as sinks leave room."""
    if recent is None:
        return min(policy.budget // part, policy.budget - policy.sinks)
    if _whole(policy, "recent", recent, 0) + policy.sinks > policy.budget:
        raise UsageError(
            f"{policy.name}: {recent} newest tokens and {policy.sinks} sinks do not fit into the budget of "
            f"{policy.budget}"
        )
    return recent


def _newest(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Return which slots hold the newest tokens of each head."""
    held = (positions >= 0).sum(-1, keepdim=True)
    order = torch.arange(positions.shape[-1], device=positions.device)
    return (order >= held - count) & (order < held)


def _with_newest(value: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Return values that are infinite for the newest tokens of each head."""
    return value.masked_fill(_newest(positions, count), torch.inf)


CachePolicy = Policy | ByLayer | Reading

POLICIES: dict[str, type[Policy] | type[Reading]] = {
    policy.name: policy
    for policy in (Window, HeavyHitters, Observed, KeyNorm, Merge, Select, Reuse, Random, Episode)
}


def as_policy(text: str) -> CachePolicy | None:
    """Return the policy that a text names, ``"window{budget=1024}"``; None for ``"full"``.

    A list of budgets is one for each layer with caches, ``"window{budget=[512 1024]}"``.

    Raises:
        PipelineError: the text is malformed.
        UsageError: there is no such policy, or an option is missing, unknown or out of its range.
    """
    name, given = named(text, POLICIES, "cache policy", "policies", also=("full",))
    if name == "full":
        return None
    if "budget" not in given:
        raise UsageError(f"{name} needs a budget", hint=f"{name}{{budget=1024}}")
    kind, budget = POLICIES[name], given["budget"]
    if not isinstance(budget, (list, tuple)) or not issubclass(kind, Policy):
        return kind(**given)
    return ByLayer([kind(**{**given, "budget": one}) for one in budget])
