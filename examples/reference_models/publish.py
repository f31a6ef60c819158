"""What a trained language model leaves behind: a Hugging Face folder in half precision, with its card."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from corpus import SPLITS, read_split
from language import LONG, LanguageModel, encode
from picture import draw_losses
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from vocabulary import END_ID, PADDING_ID, SIZE, as_pretrained

import graphopt
from graphopt.training import Record

PROMPTS = ("Return the", "Compute the eigenvalues", "Parameters\n----------\nx : array_like\n", "Plot")
SETS = tuple(name for name in SPLITS if name != "train")


def publish(
    model: LanguageModel,
    module: PreTrainedModel,
    record: Record,
    tokenizer: Tokenizer,
    output: Path,
    data: Path,
) -> None:
    """Write weights, tokenizer, results and card to ``output``, replacing what an earlier run wrote."""
    if output.exists():
        shutil.rmtree(output)
    module.generation_config.pad_token_id = PADDING_ID
    if hasattr(module.config, "output_router_logits"):
        module.config.output_router_logits = False  # they balance experts in training, and are no output
    module.half().save_pretrained(output)
    as_pretrained(tokenizer, LONG).save_pretrained(output)
    read_split("validation", data)
    results = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "steps": record.step,
        "tokens": record.step * 4096,
        "minutes": round(record.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "sets": {name: _measure(output, data / f"{name}.jsonl") for name in SETS},
        "unigram_perplexity": _unigram(tokenizer, data),
        "corpus": json.loads((data / "manifest.json").read_text()),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = {"unigram model": math.log(results["unigram_perplexity"]["validation"])}
    draw_losses(record, output / "loss.png", model.title, lines)
    samples = _samples(output, tokenizer)
    (output / "README.md").write_text(_card(model, module, results, samples))
    print(f"{output}: {json.dumps(results['sets'])}")


def _measure(folder: Path, data: Path) -> dict[str, float]:
    metrics = ("perplexity", "accuracy", "bits_per_byte")
    return graphopt.evaluate(folder, data, metrics, length=LONG, dtype="float32").values


def _unigram(tokenizer: Tokenizer, data: Path) -> dict[str, float]:
    """Perplexity of guessing each token by how often it occurs in the training text."""
    counts = Counter(encode(tokenizer, read_split("train", data)).tolist())
    total = sum(counts.values()) + SIZE
    perplexities = {}
    for name in SETS:
        ids = encode(tokenizer, read_split(name, data)).tolist()
        perplexities[name] = math.exp(-sum(math.log((counts[i] + 1) / total) for i in ids) / len(ids))
    return perplexities


def _samples(folder: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """What the shipped weights write, read back from the folder by transformers."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        written = module.generate(
            ids, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=0, top_p=0.95, eos_token_id=END_ID
        )
        samples.append((prompt, tokenizer.decode(written[0, ids.shape[1] :].tolist())))
    return samples


def _card(
    model: LanguageModel, module: PreTrainedModel, results: dict[str, Any], samples: list[tuple[str, str]]
) -> str:
    packages = results["corpus"]["packages"]
    sources = "\n".join(f"| {n} | {p['version']} | {p['licence']} |" for n, p in packages.items())
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {v['perplexity']:.2f} | {results['unigram_perplexity'][name]:.0f} | "
        f"{v['accuracy']:.3f} | {v['bits_per_byte']:.3f} |"
        for name, v in results["sets"].items()
    )
    settings = "\n".join(f"| {k} | {v} |" for k, v in model.settings.plain().items())
    shape = "\n".join(f"| {k} | {v} |" for k, v in _shape(module).items())
    written = "\n\n".join(f"**{prompt!r}**\n\n```\n{text.strip()}\n```" for prompt, text in samples)
    return CARD.format(
        model=model, results=results, sources=sources, rows=rows, settings=settings, shape=shape,
        samples=written, millions=results["parameters"] / 1e6, context=LONG,
    )  # fmt: skip


def _shape(module: PreTrainedModel) -> dict[str, Any]:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "num_experts", "num_experts_per_tok", "vocab_size", "max_position_embeddings",
        "tie_word_embeddings",
    )  # fmt: skip
    return {n: getattr(module.config, n) for n in names if getattr(module.config, n, None) is not None}


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
---

# {model.title}: {millions:.2f} million parameters

A reference model of graphopt, small enough to ship with it and to be retrained on two processor cores. It
writes text that looks like the documentation of scientific Python packages.

**What it is good for:** regression tests of graph rewrites, trends, and tables that anyone can make again.
**What it is not:** evidence about large models. It knows one kind of text, its context is {context} tokens, and
what a rewrite costs here can differ from what it costs at scale; how much a model suffers from dropped
synchronisation points, for one, is known to depend on its size.

| set | perplexity | unigram model | next-token accuracy | bits a byte |
| --- | --- | --- | --- | --- |
{rows}

Perplexity is a token's, over rows of {context} tokens each read from its beginning, from the stored
half-precision weights computed in float32:

```
python examples/reference_models/corpus.py
graphopt evaluate examples/reference_models/models/{model.name} --dtype float32 --length {context} \\
    --data examples/reference_models/data/validation.jsonl
```

![loss over steps](loss.png)

The validation loss along the way is that of the set's first 16,384 tokens, all from one package, in rows of {context}
tokens. Training goes from rows of 256 to rows of {context} tokens after seven tenths of the steps, where it falls.

## Data

Documentation strings of the packages below, read from their source files, without doctests, tables, formulas and
reference lists, and without paragraphs that occur twice; whole files go to one split. The out-of-domain set is
the World English Bible. `corpus.py` makes all of it again; `results.json` holds sizes and hashes.

| package | version | licence |
| --- | --- | --- |
{sources}

## Shape and training

| | |
| --- | --- |
{shape}

{results[steps]} steps of 4,096 tokens ({results[tokens]:,} in all), AdamW, {results[minutes]} minutes with --threads
{results[threads]} on a machine of two processor cores, shared with other work:
`python examples/reference_models/{model.name}.py`

| | |
| --- | --- |
{settings}

## Samples

Temperature 0.7, top-p 0.95, seed 0.

{samples}
"""
