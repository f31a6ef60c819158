"""A conversation that goes on: what was said stays in the caches, within a fixed budget if one is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.reading import longest as positions
from ..data.tokenizer import Tokenizer
from ..ir.errors import UsageError
from ..ir.facts import KVCache
from ..ir.program import Program
from .bounded import BoundedDecoder, Snapshot
from .cached import CachedDecoder, longest
from .deciding import decoder_under
from .encoders import has_encoder
from .episodes import Embed, EpisodeOf, TokenMeans, clustered, nearest, segments_of
from .generation import end_tokens, typed, with_cache
from .kept import shared
from .policies import ByLayer, CachePolicy, Episode, Policy, as_policy
from .sampling import Sampling
from .speculating import Loop
from .stopping import Stop

LENGTH = 1 << 16
"""Number of positions where the model has no limit."""


class Conversation:
    """Talks with a program; every message is read once.

    With a policy (``cache="window{budget=1024}"``), caches hold at most ``budget + block`` tokens a layer, however long
    the conversation is; the text is that of whole caches while no more than ``budget`` tokens were said. With
    ``episodes``, one such cache is kept for each part of the conversation by what it is about, and a question is
    answered from the one that it belongs to (EpiCache, arXiv 2509.17396): every message is then read once for each
    episode, and the whole conversation again whenever it has grown by half.

    Attributes:
        messages: what was said, with ``role`` and ``content``.
        tokens: all of it as tokens.

    Args:
        program: with a tokenizer.
        cache: "full", or a policy with its options.
        system: the first message, of the role "system".
        episodes: number of episodes; 0 for one cache of everything.
        segment: number of messages that are embedded together.
        medoids: number of segments whose words stand for an episode.
        embed: turns rows of tokens into vectors (rows, size); the program's own token embeddings by default.
        seed: of clustering and sampling.
        length: number of tokens that it may have, for which whole caches have room; by default as many as the model has
            positions for.
        options: as for :func:`graphopt.generate`: ``device``, ``dials``, ``dtype``, ``kernels``, ``compiled``.

    Raises:
        UsageError: the program has no tokenizer, or an option is out of its range.
        PassRefusedError: it cannot have caches.
    """

    def __init__(
        self, program: Program, *, cache: str | CachePolicy = "full", system: str | None = None, episodes: int = 0,
        segment: int = 4, medoids: int = 4, embed: Embed | None = None, seed: int = 0,
        length: int | None = None, **options: Any,
    ):  # fmt: skip
        if has_encoder(program):
            raise UsageError(
                "a program with an encoder does not talk: each of its texts follows other inputs"
            )
        for name, value, low in (
            ("episodes", episodes, 0), ("segment", segment, 1), ("medoids", medoids, 1),
            ("length", 1 if length is None else length, 1),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UsageError(f"{name} is {value!r}; it is a whole number from {low} on")
        device = options.pop("device", "cpu")
        self.program = with_cache(typed(program, options.pop("dtype", "auto"), device))
        self.tokenizer = Tokenizer(program)
        self.policy = as_policy(cache) if isinstance(cache, str) else cache
        if episodes and not isinstance(self.policy, (Policy, ByLayer)):
            raise UsageError(
                "episodes need a budget of what is kept",
                hint="a policy that drops tokens, window{budget=1024} or another",
            )
        limit = longest(self.program) or positions(program)
        if length is not None and limit is not None and length > limit:
            raise UsageError(f"length is {length}, the model has positions for {limit}")
        self.limit = length or limit or LENGTH
        ways = (options.get("compiled", False), options.get("kernels", "auto"))
        self._options = {"device": device, "shared": shared(self.program, device, *ways), **options}
        self._episodes, self._segment, self._medoids, self.seed = episodes, segment, medoids, seed
        self._embed = embed
        if episodes and embed is None:
            self._embed = TokenMeans(self.program, self.program.facts[KVCache].tokens)
        self.messages: list[dict[str, str]] = []
        self.tokens: list[int] = []
        self._decoder = self._made(self.policy)
        self._found: list[EpisodeOf] = []
        self._snapshots: list[Snapshot | None] = []
        self._known: list[list[int]] = []
        self._clustered = 0
        self._turns = 0
        if system is not None:
            self.add("system", system)

    def _made(self, policy: CachePolicy | None) -> CachedDecoder:
        if self._episodes and isinstance(policy, (Policy, ByLayer)):
            # room for the words of any episode
            of_layers = [
                Episode(one.budget, one.block, one.sinks, (0,) * one.block)
                for one in (policy.policies if isinstance(policy, ByLayer) else (policy,))
            ]
            policy = ByLayer(of_layers) if isinstance(policy, ByLayer) else of_layers[0]
        return decoder_under(policy, self.program, 1, self.limit, **self._options)

    @property
    def slots(self) -> int:
        """Number of tokens that caches have room for."""
        return self._decoder.slots

    def add(self, role: str, content: str) -> None:
        """Add a message and read it; nobody answers.

        Raises:
            UsageError: the conversation is longer than the model has positions.
        """
        with self._said(role, content):
            written = self._written(answering=False)
            if len(written) > self.limit:
                raise self._too_long(len(written))
            # with episodes, a question says later for which one it is read
            if not self._episodes:
                self._read(written)

    def say(
        self, content: str, *, max_new_tokens: int = 256, temperature: float = 0.0, top_k: int | None = None,
        top_p: float | None = None, role: str = "user",
    ) -> str:  # fmt: skip
        """Add a message and return the answer, which is part of the conversation from then on.

        Args:
            content: what is said.
            max_new_tokens: of the answer.
            temperature: 0 takes the most likely token.
            top_k: sample among this many most likely tokens.
            top_p: sample among the most likely tokens whose probabilities add up to this.
            role: who says it.

        Raises:
            UsageError: the conversation would be longer than the model has positions.
        """
        stop = Stop(max_new_tokens, frozenset(end_tokens(self.program)))
        sampling = Sampling(temperature, top_k, top_p, None)
        with self._said(role, content):
            asked = self._written(answering=True)
            if len(asked) + max_new_tokens > self.limit:
                raise self._too_long(len(asked) + max_new_tokens)
            if self._episodes:
                self._retrieve()
            self._read(asked[:-1])
            self._turns += 1
            loop = Loop(self._decoder, None, sampling, stop, self.seed + self._turns)
            answer = [token for commits in loop.run([asked]) for commit in commits for token in commit.tokens]
            self.tokens = [*asked, *answer][: self._decoder.lengths[0]]
            text = self.tokenizer.decode([t for t in answer if t not in stop.tokens])
        self.messages.append({"role": "assistant", "content": text})
        return text

    @contextlib.contextmanager
    def _said(self, role: str, content: str) -> Iterator[None]:
        """Add a message, and take it back if something goes wrong while it is read or answered."""
        self.messages.append({"role": role, "content": content})
        try:
            yield
        except BaseException:
            self.messages.pop()
            if self._decoder.lengths[0] != len(self.tokens):
                self._forget()
            raise

    def _too_long(self, tokens: int) -> UsageError:
        return UsageError(
            f"the conversation may have {tokens} tokens, there are positions for {self.limit}",
            hint="begin another conversation, or allow fewer new tokens",
        )

    def _written(self, *, answering: bool) -> list[int]:
        text = self.tokenizer.chat(self.messages, answering=answering)
        return self.tokenizer.encode_chat(text)[0]

    def _read(self, ids: Sequence[int]) -> None:
        """Let the caches follow from these tokens: what they have of them already is not read again."""
        known = len(self.tokens)
        if self.tokens != list(ids[:known]):
            # an answer is written in another way than it was generated
            same = next(
                i for i, (a, b) in enumerate(zip([*self.tokens, -1], [*ids, -2], strict=False)) if a != b
            )
            self._go_back(same)
            known = len(self.tokens)
        if len(ids) > known:
            self._decoder.prefill([list(ids[known:])], whole=False)
        self.tokens = list(ids)

    def _go_back(self, length: int) -> None:
        if isinstance(self._decoder, BoundedDecoder) or self._decoder.states:
            # what was cut cannot come back, and states only go on
            self._forget()
        else:
            self._decoder.lengths = [length]
            self.tokens = self.tokens[:length]

    def _forget(self) -> None:
        """Let the caches be empty: everything is read again when it is needed."""
        if isinstance(self._decoder, BoundedDecoder):
            self._decoder.restore(None)
        elif self._decoder.states:
            self._decoder = self._made(None)
        else:
            self._decoder.lengths = [0]
        self.tokens = []

    # -- episodes ------------------------------------------------------------------------------------

    def _retrieve(self) -> None:
        """Let the caches be those of the episode that the last message belongs to."""
        assert isinstance(self._decoder, BoundedDecoder)
        policy, embed = self.policy, self._embed
        assert isinstance(policy, (Policy, ByLayer))
        assert embed is not None
        spoken = [self.tokenizer.encode(m["content"], special=False) or [0] for m in self.messages]
        asked = spoken.pop()
        if not spoken:
            self._decoder.look_for(asked[-policy.block :])
            return
        segments = segments_of(spoken, self._segment)
        before = self.tokenizer.encode_chat(self.tokenizer.chat(self.messages[:-1]))[0]
        if not self._found or len(segments) > 1.5 * self._clustered:
            if isinstance(embed, TokenMeans):
                embed.count(segments)
            self._found = clustered(segments, embed, self._episodes, self._medoids, self.seed)
            self._clustered = len(segments)
            self._snapshots, self._known = [None] * len(self._found), [[] for _ in self._found]
        number = nearest(self._found, embed([asked])[0])
        self._decoder.look_for(self._found[number].words[-policy.block :])
        self._decoder.restore(self._snapshots[number])
        self.tokens = list(self._known[number])
        self._read(before)
        self._snapshots[number], self._known[number] = self._decoder.snapshot(), list(self.tokens)
