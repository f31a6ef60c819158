"""Text written with caches by every causal language model of transformers, beside the library's own.

    python benchmarks/cached_text.py [NAMES...] [--workers 2] [--work build/texts] [--again]

A class is made small with random weights that are spread until its text varies. Three prompts of different lengths are
continued side by side by 48 tokens, greedily and in float32, with and without candidates; the reference is the
library's ``generate`` of each prompt alone. Each prompt is continued once more with sampled tokens, where the library's
``generate`` hands its logits to the same sampler with the same seed; and, where a class can be sharded, by two ranks that
run in one process. One process a class; what is done is kept, so that a run can go on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import random
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from model_zoo import DECODERS
from small_models import fault, first_line, in_a_process, names_of_decoders, refusal, small_model

ROOT = Path(__file__).parents[1]
NEW, SECONDS = 48, 300
LENGTHS = (9, 4, 17)
WAYS = ("plain", "token-recycling", "two ranks", "sampled")
CLOSE = 1e-4
"""How far apart, of the range of logits, two tokens may be that rounding decides between."""


def try_class(name: str) -> dict[str, Any]:
    """Return what became of a class: captured, cached, and the number of tokens that are those of the library."""
    import torch
    import transformers

    import graphopt
    from graphopt.decoding.generation import with_cache
    from graphopt.ir.errors import GraphoptError
    from graphopt.ir.facts import KVCache

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"name": name}
    try:
        model = small_model(name, DECODERS.get(name))
        # a configuration may force tokens at the beginning or the end, which is no matter of caches
        model.generation_config = transformers.GenerationConfig()
        _spread(model)
    except Exception as error:
        return found | {"not made": first_line(error)}
    vocabulary = min(getattr(model.config.get_text_config(), "vocab_size", 128), 128)
    rows = [
        [random.Random(1000 * i + j).randrange(3, vocabulary) for j in range(n)]
        for i, n in enumerate(LENGTHS)
    ]
    began = time.perf_counter()
    try:
        program = graphopt.capture(model, {"input_ids": torch.tensor([rows[0]])}, compare=False)
    except GraphoptError as error:
        return found | {"capture": refusal(error)}
    except Exception as error:
        return found | {"fault": "capture: " + fault(error)}
    try:
        cached = with_cache(program)
    except GraphoptError as error:
        return found | {"refused": refusal(error)}
    except Exception as error:
        return found | {"fault": "cache: " + fault(error)}
    found["seconds"] = time.perf_counter() - began
    try:
        expected = [_reference(model, row) for row in rows]
    except Exception as error:
        return found | {"not made": "reference: " + first_line(error)}
    found["distinct"] = len({token for row in expected for token in row})
    # where tokens pick keys by what they compute for pairs, there are no trees
    trees = cached.facts[KVCache].tree
    for strategy in (None, "token-recycling") if trees else (None,):
        try:
            written = graphopt.generate(
                cached, rows, max_new_tokens=NEW, eos_token_id=None, strategy=strategy
            )[:, -NEW:].tolist()
        except Exception as error:
            return found | {"fault": f"{strategy}: {fault(error)}"}
        equal = [_equal(model, *texts) for texts in zip(rows, expected, written, strict=True)]
        found[strategy or "plain"] = sum(equal)
    try:
        sharded = graphopt.optimize(program, "shard-tensor-parallel{size=2}, insert-cache", verify="off")
    except GraphoptError as error:
        found["not sharded"] = refusal(error)
    except Exception as error:
        return found | {"fault": f"two ranks: {fault(error)}"}
    else:
        try:
            written = graphopt.generate(sharded, rows, max_new_tokens=NEW, eos_token_id=None)
        except Exception as error:
            return found | {"fault": f"two ranks: {fault(error)}"}
        texts = zip(rows, expected, written[:, -NEW:].tolist(), strict=True)
        found["two ranks"] = sum(_equal(model, *one) for one in texts)
    try:
        found["sampled"] = sum(_sampled(model, cached, row, seed) for seed, row in enumerate(rows))
    except Exception as error:
        return found | {"fault": f"sampled: {fault(error)}"}
    return found


def _sampled(model: Any, cached: Any, row: list[int], seed: int) -> int:
    """Return the number of sampled tokens that are equal until the first that differs."""
    import torch
    import transformers

    import graphopt
    from graphopt.decoding.sampling import Sampling, draw

    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    sampling, generator = Sampling(**options), torch.Generator().manual_seed(seed)

    class Sampler(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            token = draw(sampling.distribution(scores[0]), generator)
            return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([token]), 0.0)

    with torch.no_grad():
        expected = model.generate(
            torch.tensor([row]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList([Sampler()]),
        )[0, len(row) :].tolist()  # fmt: skip
    written = graphopt.generate(
        cached, [row], max_new_tokens=NEW, eos_token_id=None, seed=seed, **options
    )[0, -NEW:].tolist()  # fmt: skip
    return next((i for i, (a, b) in enumerate(zip(expected, written, strict=True)) if a != b), NEW)


def _spread(model: Any) -> None:
    """Draw matrices with a spread at which texts vary and activations stay of one size."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.is_floating_point():
                scale = 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _reference(model: Any, row: list[int]) -> list[int]:
    import torch

    with torch.no_grad():
        written = model.generate(
            torch.tensor([row]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return [int(token) for token in written[0, len(row) :]]


def _equal(model: Any, row: list[int], expected: list[int], written: list[int]) -> int:
    """Return the number of equal tokens; all of them if rounding decided the first that differs."""
    import torch

    same = next((i for i, (a, b) in enumerate(zip(expected, written, strict=True)) if a != b), NEW)
    if same < NEW:
        with torch.no_grad():
            logits = model(torch.tensor([row + expected[:same]]), use_cache=False).logits[0, -1].double()
        apart = abs(float(logits[expected[same]] - logits[written[same]]))
        if apart <= CLOSE * float(logits.max() - logits.min()):
            return NEW
    return same


def told(found: dict[str, Any]) -> str:
    """Return one line about a class."""
    for name in ("fault", "not made", "capture", "refused"):
        if name in found:
            return f"{name}: {found[name]}"
    total = NEW * len(LENGTHS)
    texts = ", ".join(f"{n} {found[n]} of {total}" for n in WAYS if n in found)
    return f"{texts}; {found['distinct']} different tokens, {found['seconds']:.0f} s"


def outcome(found: dict[str, Any]) -> str:
    """Return what a class counts as."""
    for name in ("not made", "capture", "fault", "refused"):
        if name in found:
            return name
    total = NEW * len(LENGTHS)
    return "equal" if all(found.get(way, total) == total for way in WAYS) else "different"


def main() -> None:
    """Try all classes, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="classes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "texts")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    names = given.names or names_of_decoders()
    results = []
    with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
        for found in pool.map(
            lambda n: in_a_process(try_class, n, given.work, SECONDS, again=given.again), names
        ):
            results.append(found)
            print(found["name"], told(found), flush=True)
    tally = Counter(outcome(found) for found in results)
    captured = sum(tally[n] for n in ("equal", "different", "refused", "fault"))
    print(", ".join(f"{name} {count}" for name, count in tally.most_common()))
    print(f"{tally['equal']} of {captured} classes that capture write the library's text")
    for way in WAYS[1:]:
        tried = [found for found in results if way in found]
        print(f"{way}: {sum(f[way] == NEW * len(LENGTHS) for f in tried)} of {len(tried)}")


if __name__ == "__main__":
    main()
