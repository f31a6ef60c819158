"""Facts: typed information about a program beyond its graph, such as what passes did and how it was captured.

A fact is a frozen dataclass, and a program has at most one of each type. Passes require and provide types; a type without
fields only records that something was done. Saved programs store facts under ``name``, and they are read by the fields'
types (:mod:`graphopt.ir.storage.facts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .errors import UsageError

if TYPE_CHECKING:
    from .program import Program

F = TypeVar("F", bound="Fact")

KINDS: dict[str, type[Fact]] = {}
"""Types of facts by name; a package that offers passes adds its own by defining them."""


@dataclass(frozen=True)
class Fact:
    """Base of all facts about a program."""

    name: ClassVar[str] = ""
    done: ClassVar[str] = ""
    """Description of a program with this fact, for messages: "cannot run on a program that is ..."."""
    of_every_operator: ClassVar[bool] = False
    """It holds of a program only if it holds of each of its parts."""

    def __init_subclass__(cls, name: str, done: str = "", of_every_operator: bool = False, **options: Any):
        super().__init_subclass__(**options)
        registered = KINDS.get(name)
        if registered is not None and (registered.__module__, registered.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise TypeError(
                f"two types of facts are called {name!r}: {registered.__qualname__} and {cls.__qualname__}"
            )
        cls.name, cls.done = name, done or name.replace("_", " ")
        cls.of_every_operator = of_every_operator
        KINDS[name] = cls


class Facts:
    """The facts of one program, at most one of each type."""

    def __init__(self, facts: Iterable[Fact] = ()):
        self._by_type: dict[type[Fact], Fact] = {type(fact): fact for fact in facts}

    def get(self, kind: type[F]) -> F | None:
        """Return the fact of a type, or None."""
        fact = self._by_type.get(kind)
        return fact if isinstance(fact, kind) else None

    def __getitem__(self, kind: type[F]) -> F:
        fact = self.get(kind)
        if fact is None:
            raise UsageError(f"the program is not {kind.done}")
        return fact

    def __contains__(self, kind: object) -> bool:
        return kind in self._by_type

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._by_type.values())

    def __len__(self) -> int:
        return len(self._by_type)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facts) and self._by_type == other._by_type

    __hash__ = None  # type: ignore[assignment]  # they change

    def __repr__(self) -> str:
        return f"Facts({', '.join(map(repr, self))})"

    @property
    def kinds(self) -> set[type[Fact]]:
        """The types of all facts."""
        return set(self._by_type)

    def add(self, fact: Fact) -> None:
        """Add a fact, replacing one of the same type."""
        if not is_dataclass(fact):
            raise TypeError(f"a fact is a dataclass, not {type(fact).__name__}")
        self._by_type[type(fact)] = fact

    def discard(self, *kinds: type[Fact]) -> None:
        """Remove the facts of these types, if there are any."""
        for kind in kinds:
            self._by_type.pop(kind, None)

    def provide(self, kinds: Iterable[type[Fact]]) -> None:
        """Add those of these types that need nothing to be known: all others are added by whoever knows their fields."""
        for kind in kinds:
            known = all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind))
            if kind not in self._by_type and known:
                self._by_type[kind] = kind()

    def copy(self) -> Facts:
        """Return a copy that can be changed independently."""
        return Facts(self)


# -- what was done ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canonical(Fact, name="canonical"):
    """The graph is functional and in graphopt's operators; every pass requires it."""


@dataclass(frozen=True)
class FusedProjections(Fact, name="fused_projections"):
    """Linears that read the same value are fused into one."""


@dataclass(frozen=True)
class SplitProjections(Fact, name="split_projections"):
    """No linear has a result that is only used in parts."""


@dataclass(frozen=True)
class FoldedNorms(Fact, name="norms_folded", done="without scales of norms"):
    """Scales of norms are folded into the following matrices."""


@dataclass(frozen=True)
class FusedBranches(Fact, name="branches_fused", done="fused branch by branch"):
    """Branches of convolutions are fused into one convolution."""


@dataclass(frozen=True)
class FusedKernels(Fact, name="fused_kernels"):
    """The graph calls operators that have fused kernels."""


@dataclass(frozen=True)
class AdjustableExperts(Fact, name="dialled_experts", done="limited to fewer experts"):
    """Tokens use fewer experts than the router picks."""


@dataclass(frozen=True)
class QuantizedCommunication(Fact, name="quantized_communication", done="sending few bits"):
    """Ranks exchange quantised values."""


@dataclass(frozen=True)
class Legal(Fact, name="fitted", done="legal on a target", of_every_operator=True):
    """All operators are legal on a target: see ``fit-target``."""


# -- what passes made ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class KVCache(Fact, name="kv_cache", done="cached"):
    """Keys and values of earlier tokens are inputs and outputs.

    Args:
        capacity: number of slots of a cache, or the name of that size; "" if nothing is kept token by token.
        layers: number of pairs of caches.
        tree: whether an input determines which new tokens see each other.
        tokens: the input of new tokens, (batch, new).
        positions: the input of their positions, of the same shape; "" if nothing depends on positions.
        limit: number of positions that the model supports; None if unlimited.
        logits: the output of logits; "" if there is none.
    """

    capacity: int | str
    layers: int
    tree: bool
    tokens: str
    positions: str
    limit: int | None
    logits: str


@dataclass(frozen=True)
class StateCache(Fact, name="state_cache", done="keeping states"):
    """Mixers keep states of one size beside, or in place of, the caches of attention.

    A state follows from all tokens that were fed, each of them once: it does not go back by itself when tokens turn out
    to be wrong, as caches with a slot for each token do.

    Args:
        states: the inputs that hold them, (batch, ...); outputs have the prefix ``next_``.
        taken: the input (batch, new) that says which tokens count in the new states: the first ones of each row.
    """

    states: tuple[str, ...]
    taken: str


@dataclass(frozen=True)
class CrossCache(Fact, name="cross_cache", done="reading an encoder"):
    """Attentions of a decoder read keys and values of an encoder, which are outputs to be computed once for a text.

    Args:
        inputs: of the encoder, and masks of what is read from it.
        outputs: keys and values, (batch, heads, encoder positions, size); a step may be given them.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class QuantizedCache(Fact, name="quantized_cache", done="keeping its caches in few bits"):
    """Caches hold codes, beside caches of their scales (``key_cache_0_scale``) and low values (``key_cache_0_low``).

    Args:
        bits: of a code: eight in int8, or four, two to a byte in uint8.
        caches: the inputs that hold codes.
    """

    bits: int
    caches: tuple[str, ...]


@dataclass(frozen=True)
class Quantized(Fact, name="quantized"):
    """Values and weights are rounded to integers, as a target stores them.

    Args:
        weights: bits requested for weights.
        activations: bits of values.
        kind: the resulting kind: ``w8a16``, or ``w4or8a16`` where matrices have either width.
        value: number of quantised values.
        matrix: number of quantised matrices.
        constant: number of quantised constants.
        four_bits: number of matrices with four bits.
    """

    weights: int
    activations: int
    kind: str = ""
    value: int = 0
    matrix: int = 0
    constant: int = 0
    four_bits: int = 0


@dataclass(frozen=True)
class MultiTokenHeads(Fact, name="multi_token_heads", done="with multi-token heads"):
    """Heads that predict later tokens; ``accuracy`` is the top-k accuracy of each head."""

    heads: int
    layers: int
    share: bool
    accuracy: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class MaskTokens(Fact, name="mask_tokens", done="with mask tokens"):
    """Mask tokens in addition to the text, computed by a gated LoRA of this rank."""

    masks: int
    rank: int


@dataclass(frozen=True)
class EarlyExits(Fact, name="early_exits", done="with early exits"):
    """Logits of layers before the last: the layer's index by the output's name."""

    layers: Mapping[str, int]


@dataclass(frozen=True)
class AttachedDraft(Fact, name="draft", done="with a draft"):
    """A draft layer on hidden states: the layers that it reads, and its own index."""

    taps: tuple[int, ...]
    layer: int


@dataclass(frozen=True)
class Vocabulary(Fact, name="vocabulary", done="trimmed to some tokens"):
    """Outputs with logits of a part of the vocabulary: the full size, and the remaining token ids, ascending."""

    size: int
    ids: tuple[int, ...]
    outputs: tuple[str, ...] = ("logits",)


@dataclass(frozen=True)
class Streaming(Fact, name="streaming"):
    """Convolutions read the past from states; ``time`` is the size that says how many frames are new, "" without states."""

    time: str = ""


@dataclass(frozen=True)
class TensorParallel(Fact, name="tensor_parallel", done="sharded"):
    """The graph is the common program of ``ranks`` ranks."""

    ranks: int


@dataclass(frozen=True)
class OwnRank(Fact, name="rank", done="one rank's"):
    """The graph is the program of one rank; it exists only within its process."""

    number: int


@dataclass(frozen=True)
class SkippedWhileDecoding(Fact, name="decode_layers", done="shorter while decoding"):
    """Layers or blocks, by name, that are skipped during decoding."""

    names: tuple[str, ...]


# -- what it means for the folder that a program came from ------------------------------------------------


@dataclass(frozen=True)
class RemovedLayers:
    """Removed layers: the prefix of their tensors' names, the count before, and the indices removed."""

    prefix: str
    count: int
    removed: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointChanges(Fact, name="checkpoint_changes", done="of another configuration"):
    """Changes to the configuration of a model folder.

    Args:
        removed_layers: in the order in which they were removed.
        ffn_widths: (before, after).
        expert_counts: (before, after).
        active_experts: (before, after).
    """

    removed_layers: tuple[RemovedLayers, ...] = ()
    ffn_widths: tuple[tuple[int, int], ...] = ()
    expert_counts: tuple[tuple[int, int], ...] = ()
    active_experts: tuple[int, int] | None = None


@dataclass(frozen=True)
class ExportBlockers(Fact, name="export_blockers", done="no folder's"):
    """Reasons why no model folder can hold the program, by pass; see :mod:`graphopt.ir.export_blockers`."""

    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# -- how it was captured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capture(Fact, name="capture", done="captured"):
    """Results of the capture.

    Args:
        plain_attention: attention that was not recognised, with reasons.
        plain_experts: experts that were not recognised, with reasons.
        fixed_sizes: sizes of inputs that do not vary, in words, with the line of the model that fixed each.
        packed_positions: how the model's results differ where several texts share a row; "" where they do not.
        compared: what was compared instead of the whole model; "" if all of it was compared.
        attention_implementation: of transformers, by name.
        layers: how many were exported and how many are copies, or why all were exported.
    """

    plain_attention: tuple[str, ...] = ()
    plain_experts: tuple[str, ...] = ()
    fixed_sizes: tuple[str, ...] = ()
    packed_positions: str = ""
    compared: str = ""
    attention_implementation: str = ""
    layers: str = ""


def note_capture(program: Program, **changed: Any) -> None:
    """Record results of a capture; tuples are appended to recorded ones, anything else replaces them."""
    _note(program, Capture, changed)


def note_checkpoint(program: Program, **changed: Any) -> None:
    """Record changes to a model folder's configuration; tuples of entries are appended to recorded ones."""
    active = changed.pop("active_experts", None)
    _note(program, CheckpointChanges, changed)
    if active is not None:
        program.facts.add(replace(program.facts[CheckpointChanges], active_experts=active))


def _note(program: Program, kind: type[F], changed: Mapping[str, Any]) -> None:
    fact = program.facts.get(kind) or kind()
    updated = {
        name: (*getattr(fact, name), *value) if isinstance(value, tuple) else value
        for name, value in changed.items()
    }
    program.facts.add(replace(fact, **updated))
