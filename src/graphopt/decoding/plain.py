"""Generation without a cache: the whole text is computed for each token, which works for any program with logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.running.execute import run
from ..ir.vocabulary import over_all_tokens


def continuations(
    program: Program,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield tokens that continue one row.

    Ranks of a sharded program all call this with the same arguments and yield the same tokens.

    Args:
        program: takes ``input_ids`` and returns ``logits`` (batch, positions, vocabulary).
        input_ids: (1, positions), with at least one position.
        max_new_tokens: maximum number of tokens.
        eos_token_id: tokens after which to stop; they are yielded.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        seed: for sampling.

    Raises:
        UsageError: the program does not have these inputs and outputs, or the row is empty.
    """
    if "input_ids" not in program.signature.inputs or "logits" not in program.outputs:
        raise UsageError("only a program that takes input_ids and returns logits generates text")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise UsageError(f"input_ids must be one row of at least one token, not {tuple(input_ids.shape)}")
    if max_new_tokens < 1 or temperature < 0:
        raise UsageError("max_new_tokens must be at least 1, temperature at least 0")
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    limit = _longest(program)
    generator = torch.Generator().manual_seed(seed)
    ids = input_ids
    for _ in range(max_new_tokens):
        if limit is not None and ids.shape[1] > limit:
            raise UsageError(f"the text has {ids.shape[1]} tokens, the program takes {limit}")
        logits = over_all_tokens(program, run(program, program.bind((), {"input_ids": ids})))["logits"]
        logits = logits[0, -1].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            odds = torch.softmax(logits.double() / temperature, -1)
            token = int(torch.multinomial(odds, 1, generator=generator))
        yield token
        if token in ends:
            return
        ids = torch.cat([ids, torch.tensor([[token]], dtype=ids.dtype)], 1)


def _longest(program: Program) -> int | None:
    size = program.signature.inputs["input_ids"].shape[-1]
    if isinstance(size, int):
        return size
    bounds = program.signature.sizes.get(size)
    return bounds.high if bounds is not None else None
