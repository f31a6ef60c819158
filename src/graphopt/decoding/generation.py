"""Text generation: a KV cache is inserted if it is missing, and rows of different lengths are batched."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.reading import encoded
from ..data.reading import longest as positions
from ..data.token_ids import known_ids
from ..data.tokenizer import Tokenizer
from ..ir.errors import PassRefusedError, UsageError
from ..ir.facts import KVCache
from ..ir.program import Program
from ..ir.running.retype import retyped
from ..measure.context import Context
from ..passes.caching.insert_cache import InsertCache, takes_trees
from ..passes.framework.manager import run_pipeline
from .cached import longest
from .deciding import decoder_under
from .drafters import BY_NAME, DraftProgram
from .drafts import Drafter
from .encoders import beginnings, has_encoder, inputs_of_encoder, number_of_rows
from .kept import notice_changes, shared
from .naming import named
from .plain import continuations
from .policies import CachePolicy, as_policy
from .sampling import Sampling
from .speculating import Loop, Statistics
from .stopping import Stop

CHECKPOINT = "checkpoint"
"""Stands for the value in the checkpoint's own settings."""


def with_cache(program: Program) -> Program:
    """Return the program with a KV cache: unchanged if it has one, else with insert-cache applied, once.

    Raises:
        PassRefusedError: no cache can be inserted; the message gives the reason.
    """
    if KVCache in program.facts:
        return program

    def made() -> Program:
        return run_pipeline(program, [InsertCache(tree=takes_trees(program))], Context(), verify_with="off")

    cached: Program = program.derived("with cache", made)
    return cached


def named_strategy(text: str) -> tuple[type[Drafter], dict[str, Any]]:
    """Return the drafter class that a text names, and the options that it gives.

    Raises:
        PipelineError: the text is malformed.
        UsageError: there is no strategy of that name, or no such option.
    """
    name, options = named(text, BY_NAME, "strategy", "strategies")
    return BY_NAME[name], options


def as_strategy(text: str, program: Program) -> Drafter:
    """Return a drafter for a program, by name and options; ``texts`` names a file that the program's tokenizer encodes.

    Raises:
        PipelineError: the text is malformed.
        UsageError: there is no strategy of that name, or an option is wrong.
    """
    kind, options = named_strategy(text)
    if isinstance(options.get("texts"), str):
        options["texts"] = texts_of(program, options["texts"])
    return kind(**options)


def texts_of(program: Program, file: str) -> list[list[int]]:
    """Return the tokens of the texts and conversations of a .jsonl or .txt file.

    Raises:
        UsageError: the file is missing or of an unsupported kind.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"the data file {path} does not exist")
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UsageError(f"{path}: texts are read from .jsonl and .txt files")
    tokenizer = Tokenizer(program)
    return [row.ids for row in encoded(path, tokenizer)]


def end_tokens(program: Program) -> list[int]:
    """Return the end-of-sequence tokens in the checkpoint's settings."""
    ends = _setting(program, "eos_token_id")
    if isinstance(ends, int):
        return [ends]
    return [int(t) for t in ends] if isinstance(ends, list) else []


def _setting(program: Program, name: str) -> Any:
    config = program.origin.config
    value = config.get(
        name, config.get("text_config", {}).get(name) if isinstance(config.get("text_config"), dict) else None
    )
    generation_config = program.origin.assets.get("generation_config.json")
    if generation_config is not None:
        try:
            value = json.loads(generation_config).get(name, value)
        except ValueError:
            warnings.warn("generation_config.json is not JSON and was ignored", stacklevel=3)
    return value


class Stream:
    """Streams tokens: an iterator over (row, tokens) pairs, one pair for each row that a step extends.

    Attributes:
        statistics: steps, acceptance and seconds so far.
        rows: all tokens of each row so far.
    """

    def __init__(
        self, rows: list[list[int]], steps: Iterator[list[tuple[int, list[int]]]], statistics: Statistics
    ):
        self.rows, self.statistics, self._steps = rows, statistics, steps

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the tokens of each step."""
        for commits in self._steps:
            for row, tokens in commits:
                self.rows[row].extend(tokens)
                if tokens:
                    yield row, tokens


def stream(
    program: Program,
    input_ids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    decoder_input_ids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    eos_token_id: int | Sequence[int] | str | None = CHECKPOINT,
    stop: Sequence[Sequence[int]] = (),
    strategy: Drafter | str | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    typical_acceptance: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    dials: Mapping[str, float] | None = None,
    compiled: bool = False,
    kernels: str = "auto",
    cache: str | CachePolicy = "full",
) -> Stream:
    """Generate step by step; see :func:`generate` for the arguments.

    Raises:
        UsageError: an argument is out of its range, a row is empty, or the text would not fit.
    """
    read: dict[str, torch.Tensor] = {}
    if has_encoder(program):
        read = inputs_of_encoder(program, input_ids, attention_mask, inputs)
        rows = beginnings(program, decoder_input_ids, number_of_rows(read), partial(_setting, program))
    else:
        if inputs or decoder_input_ids is not None:
            raise UsageError("this program has no encoder", hint="give the tokens of the text alone")
        if input_ids is None:
            raise UsageError("there is no text to continue", hint="give input_ids")
        rows = _rows(input_ids, attention_mask)
    if isinstance(strategy, str):
        strategy = as_strategy(strategy, program)
    policy = as_policy(cache) if isinstance(cache, str) else cache
    sampling = Sampling(temperature, top_k, top_p, typical_acceptance)
    if isinstance(eos_token_id, str):
        if eos_token_id != CHECKPOINT:
            raise UsageError(
                f"eos_token_id is {eos_token_id!r}; it must be a token, several tokens, None or {CHECKPOINT!r}"
            )
        ends = end_tokens(program)
    else:
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    stops = Stop(max_new_tokens, frozenset(ends), tuple(tuple(s) for s in stop))
    _check_tokens(rows, program)
    _check_positions(rows, max_new_tokens, program)
    notice_changes(program)
    try:
        cached = with_cache(typed(program, dtype, device))
    except PassRefusedError as refused:
        if (
            read
            or policy is not None
            or strategy is not None
            or len(rows) > 1
            or stop
            or top_k is not None
            or top_p is not None
        ):
            raise
        warnings.warn(
            f"no cache: {refused.message.splitlines()[-1].strip()}; the whole text is recomputed for every token",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        return _without_cache(typed(program, dtype, device), rows, max_new_tokens, ends, temperature, seed)
    if isinstance(strategy, DraftProgram):
        notice_changes(strategy.program)
        strategy.program = with_cache(typed(strategy.program, dtype, device))
    size = max(len(row) for row in rows) + max_new_tokens
    capacity = _capacity(cached, size, strategy)
    options: dict[str, Any] = {"device": device, "dials": dials, "compiled": compiled, "kernels": kernels}
    options["shared"] = shared(cached, device, compiled, kernels)
    room = strategy.room if strategy is not None else 0
    decoder = decoder_under(policy, cached, len(rows), capacity, room, **options)
    if strategy is not None and not cached.facts[KVCache].tree and decoder.biased:
        raise UsageError(
            "this program adds a bias by position, so candidates need inputs of their own",
            hint="insert-cache{tree=true}",
        )
    if read:
        decoder.encode(read)
    loop = Loop(decoder, strategy, sampling, stops, seed)
    if decoder.weights.few_bits:
        loop.statistics.notes.append(
            "matrices in few bits are multiplied in bfloat16; with exact kernels, by their values in the program's type"
        )
    if typical_acceptance is not None:
        loop.statistics.notes.append("typical acceptance: the text does not have the program's distribution")
    steps = ([(c.row, c.tokens) for c in commits] for commits in loop.run(rows))
    return Stream([list(row) for row in rows], steps, loop.statistics)


def generate(
    program: Program,
    input_ids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int,
    **options: Any,
) -> torch.Tensor:
    """Return rows with their continuations.

    The output is the same token for token with any ``strategy`` or none: the program's own most likely token at each
    position, or one sampled from its distribution.

    Args:
        program: takes tokens and returns logits; insert-cache is applied if it has no cache.
        input_ids: (batch, positions), or a list of rows of different lengths. Of a program with an encoder, the text
            that the encoder reads.
        max_new_tokens: maximum number of new tokens per row.
        attention_mask: (batch, positions), 0 where ``input_ids`` is padding, on either side.
        inputs: other inputs of an encoder by name, such as ``input_features``.
        decoder_input_ids: (batch, tokens) or rows, the tokens that follow an encoder; by default the checkpoint's first
            one.
        eos_token_id: tokens that end a row, included in the output; by default those of the checkpoint, None for none.
        stop: sequences of tokens that end a row, included in the output.
        strategy: a drafter from :mod:`graphopt.decoding` that proposes candidates, or its name with options,
            ``"prompt-lookup{tokens=8}"``.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_k: sample among this many most likely tokens.
        top_p: sample among the most likely tokens whose probabilities add up to this.
        typical_acceptance: accept candidates that are not unlikely, above this probability or a lower one where many
            tokens are likely (Medusa's rule, 0.09 there), instead of by their probability: **changes the text**, in
            fewer steps.
        seed: for sampling.
        device: where it runs.
        dtype: "stored", "float32", or "auto": as stored, but float32 where a CPU would compute in 16 bits.
        dials: values of run-time settings that differ from their defaults.
        compiled: compile everything between attentions (torch.compile, once for all identical layers), and on a GPU
            replay steps as CUDA graphs. The first steps take seconds; sums may be rounded in a different order.
        kernels: how matrices that are stored in few bits are multiplied on a CPU: "auto", by kernels that round rows,
            scales and results to bfloat16; or "exact", by their values in the type of the program.
        cache: what caches keep: "full", or a policy of :mod:`graphopt.decoding.policies` with its options,
            ``"window{budget=1024}"``, which **changes the text** once it is longer than the budget.

    Returns:
        (batch, positions + new): the given rows (of a decoder that follows an encoder, those with which it begins), each
        with its continuation; rows that ended earlier are filled with
        the padding token (of the checkpoint, or 0).

    Raises:
        UsageError: an argument is out of its range, a row is empty, or the text would not fit.
    """
    tokens = stream(program, input_ids, max_new_tokens=max_new_tokens, **options)
    prompts = [list(row) for row in tokens.rows]
    prompt_lengths = [len(row) for row in prompts]
    for _ in tokens:
        pass
    new = [row[start:] for row, start in zip(tokens.rows, prompt_lengths, strict=True)]
    fill = _setting(program, "pad_token_id")
    longest_new = max(len(row) for row in new)
    filled = torch.tensor(
        [row + [fill if isinstance(fill, int) else 0] * (longest_new - len(row)) for row in new]
    )
    if not isinstance(input_ids, torch.Tensor) or has_encoder(program):
        first = max(prompt_lengths)
        pad = fill if isinstance(fill, int) else 0
        input_ids = torch.tensor([[pad] * (first - len(row)) + row for row in prompts])
    return torch.cat([input_ids, filled.to(input_ids.dtype)], 1)


def typed(program: Program, dtype: str, device: torch.device | str) -> Program:
    """Return the program in the type in which it is computed: as stored, or in float32."""
    if dtype not in ("auto", "stored", "float32"):
        raise UsageError(f"dtype is {dtype!r}; it is auto, stored or float32")
    halves = {torch.float16, torch.bfloat16} & {w.source.dtype for w in program.weights.values()}
    slow = dtype == "auto" and torch.device(device).type == "cpu"
    if not halves or not (slow or dtype == "float32"):
        return program
    converted: Program = program.derived("in float32", lambda: retyped(program, torch.float32))
    return converted


def _rows(input_ids: Any, mask: torch.Tensor | None) -> list[list[int]]:
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids has {input_ids.dim()} dimensions; it must be (batch, positions)")
        if mask is not None and mask.shape != input_ids.shape:
            raise UsageError(f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
        mask_values = torch.ones_like(input_ids) if mask is None else mask
        rows = [row[mask_row.bool()].tolist() for row, mask_row in zip(input_ids, mask_values, strict=True)]
    else:
        if mask is not None:
            raise UsageError("attention_mask goes with a tensor of input_ids; lists have no padding")
        rows = [list(row) for row in input_ids]
    if not rows or not all(rows):
        raise UsageError("every row needs at least one token")
    return rows


def _capacity(program: Program, size: int, strategy: Drafter | None) -> int:
    """Return the number of cache slots: enough for the text, and for candidates after it if the limit allows."""
    fixed = program.facts[KVCache].capacity
    limit = fixed if isinstance(fixed, int) else longest(program)
    with_candidates = size + (strategy.room if strategy is not None else 0)
    return size if limit is not None and size > limit else min(with_candidates, limit or with_candidates)


def _check_tokens(rows: list[list[int]], program: Program) -> None:
    cache = program.facts.get(KVCache)
    name = cache.tokens if cache is not None else "input_ids"
    vocabulary = known_ids(program, name) if name in program.input_nodes else None
    for number, row in enumerate(rows):
        for token in row:
            if isinstance(token, bool) or not isinstance(token, int):
                raise UsageError(
                    f"row {number} has {token!r}, which is not a token: tokens are whole numbers"
                )
            if token < 0 or (vocabulary is not None and token >= vocabulary):
                raise UsageError(
                    f"row {number} has token {token}, the program knows "
                    + ("numbers from 0 on" if vocabulary is None else f"0 to {vocabulary - 1}"),
                    hint="encode the text with the checkpoint's own tokenizer",
                )


def _check_positions(rows: list[list[int]], count: int, program: Program) -> None:
    """Refuse texts beyond the positions that the model was built for, where its output is nonsense or fails."""
    limit = positions(program)
    cache = program.facts.get(KVCache)
    # caches that are too short are reported elsewhere
    if cache is not None and isinstance(cache.capacity, int) and limit is not None:
        limit = max(limit, cache.capacity + 1)
    longest_row = max(len(row) for row in rows)
    if limit is not None and longest_row + count > limit:
        raise UsageError(
            f"the text may have {longest_row + count} tokens, the model has positions for {limit}",
            hint=f"max_new_tokens of at most {limit - longest_row}"
            if longest_row < limit
            else "a shorter text",
        )


def _without_cache(
    program: Program, rows: list[list[int]], count: int, ends: list[int], temperature: float, seed: int
) -> Stream:
    statistics = Statistics()

    def steps() -> Iterator[list[tuple[int, list[int]]]]:
        for token in continuations(
            program, torch.tensor(rows[:1]), max_new_tokens=count, eos_token_id=ends,
            temperature=temperature, seed=seed,
        ):  # fmt: skip
            statistics.steps += 1
            statistics.row_steps += 1
            statistics.tokens += 1
            yield [(0, [token])]

    return Stream([list(rows[0])], steps(), statistics)
