"""Files that onnxruntime-genai needs beside the ONNX files of a decoder: its settings and the tokenizer, and a test run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import LoweringError
from ...ir.facts import KVCache, QuantizedCache, StateCache
from ...ir.program import Program
from ...ir.running.execute import run
from ...ir.schema import argument, is_operator
from ...targets import Target
from .context import configuration, context_length
from .model import OnnxReport

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
"""Tokenizer files of a checkpoint."""
TOKENS = 16
"""How many tokens are generated for the comparison."""
LONGEST = 2048
"""Largest default length of a text: genai allocates the slots of a cache of variable capacity all at once."""


def installed() -> bool:
    """Return whether onnxruntime-genai is installed."""
    return find_spec("onnxruntime_genai") is not None


def write_beside(program: Program, folder: Path, config: dict[str, Any]) -> None:
    """Write genai_config.json and the files of the checkpoint's tokenizer."""
    (folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in TOKENIZER:
        if file in program.origin.assets:
            (folder / file).write_bytes(program.origin.assets[file])


def prompt_and_step(program: Program, reports: Sequence[OnnxReport]) -> tuple[int, list[OnnxReport]] | None:
    """Return the prompt graph's number of tokens and the graphs, if they are a prompt graph and a step graph of batch 1.

    Args:
        program: that they were written from.
        reports: of all graphs, parts in their order.
    """
    cache = program.facts.get(KVCache)
    if cache is None or cache.tree or not cache.logits or program.dials or StateCache in program.facts:
        return None
    if not _values_apart(program):
        return None
    if not _end_tokens(configuration(program), program):
        return None
    counts = {s[1] for r in reports for n, s in r.inputs.items() if n == cache.tokens and s[0] == 1}
    chunk = max((int(c) for c in counts), default=0)
    firsts = sum(cache.tokens in r.inputs for r in reports)
    return (chunk, list(reports)) if counts == {chunk, 1} and chunk > 1 and firsts == 2 else None


def pipeline_config(
    program: Program, chunk: int, reports: Sequence[OnnxReport], folder: Path, target: Target | None
) -> dict[str, Any]:
    """Return the settings with the prompt and step graphs as stages, each after its host graph.

    Prompts are processed in chunks of ``chunk`` tokens, the remaining tokens one by one. genai updates caches in
    place.

    Args:
        program: that they were written from.
        chunk: how many tokens a prompt's graph takes.
        reports: of the graphs of the prompt and of the step.
        folder: where the files are.
        target: the device of all graphs except the host graphs; None for the CPU.
    """
    config = genai_config(program)
    tokens = program.facts[KVCache].tokens
    stages: list[dict[str, Any]] = []
    prompt = False
    for report in reports:
        host = report.path.with_name(f"{report.path.stem.split('_part')[0]}_host.onnx").name
        if tokens in report.inputs:
            prompt = report.inputs[tokens][1] == chunk
            if (folder / host).is_file():
                stages.append(_stage(folder / host, prompt, None))
        stages.append(_stage(folder / report.path.name, prompt, target))
    decoder = config["model"]["decoder"]
    del decoder["filename"]
    decoder["pipeline"] = stages
    config["model"]["type"] = "decoder-pipeline"
    return config


def _stage(path: Path, prompt: bool, target: Target | None) -> dict[str, Any]:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    stage: dict[str, Any] = {
        "filename": path.name, "inputs": [v.name for v in graph.input], "outputs": [v.name for v in graph.output],
        "run_on_prompt": prompt, "run_on_token_gen": not prompt,
    }  # fmt: skip
    if target is not None:
        device = {"backend_type": "htp", "soc_model": str(target.soc), "htp_arch": str(target.arch)}
        stage["session_options"] = {"log_id": "onnxruntime-genai", "provider_options": [{"qnn": device}]}
    return {path.stem: stage}


def beside_buckets(
    program: Program, reports: Sequence[OnnxReport], folder: Path, target: Target | None, try_it: bool
) -> bool:
    """Write the files that genai needs beside prompt and step graphs, and test them on the CPU if genai is installed.

    Returns:
        Whether the graphs are a prompt graph and a step graph.

    Raises:
        LoweringError: genai generates other tokens.
    """
    pair = prompt_and_step(program, reports)
    if pair is None:
        return False
    chunk, graphs = pair
    if try_it and installed():
        write_beside(program, folder, pipeline_config(program, chunk, graphs, folder, None))
        compare(program, folder, chunk)
    write_beside(program, folder, pipeline_config(program, chunk, graphs, folder, target))
    return True


def _values_apart(program: Program) -> bool:
    """Return whether every layer has a cache of values beside that of its keys."""
    layers = program.facts[KVCache].layers
    return all(f"value_cache_{n}" in program.signature.inputs for n in range(layers))


def genai_config(program: Program) -> dict[str, Any]:
    """Return the genai_config.json of a program: sizes from its graph, special tokens from its checkpoint.

    Raises:
        LoweringError: it has no caches, or caches that genai cannot allocate.
    """
    cache = program.facts.get(KVCache)
    if cache is None or cache.tree or not cache.logits:
        raise LoweringError(
            "onnxruntime-genai generates with caches, and this program has none of the plain kind",
            hint="run insert-cache{} last, without tree",
        )
    states = program.facts.get(StateCache)
    if states is not None:
        raise LoweringError(
            f"onnxruntime-genai hands on keys and values, and this program has {len(states.states)} states of "
            "convolutions and linear attention beside them, for which its settings have no names",
            hint="write plain ONNX files and hand the states from step to step",
        )
    if not _values_apart(program):
        raise LoweringError(
            "onnxruntime-genai hands on keys and values apart, and this program stores latents that are both",
            hint="insert-cache{latents=false}, or write plain ONNX files and hand the caches from step to step",
        )
    if QuantizedCache in program.facts:
        raise LoweringError(
            "onnxruntime-genai reads caches of few bits with scales that are constants of the file, and these have scales "
            "for each token, in caches that it does not know",
            hint="leave out quantize-cache, or write plain ONNX files and hand the caches from step to step",
        )
    inputs = program.signature.inputs
    shapes = {tuple(inputs[n].shape[1:2]) + tuple(inputs[n].shape[3:]) for n in inputs if "_cache_" in n}
    if len(shapes) != 1:
        raise LoweringError(
            f"onnxruntime-genai makes all caches alike, and these differ: {sorted(map(str, shapes))}"
        )
    handled = {cache.tokens, cache.positions, *(n for n in inputs if "_cache_" in n)}
    if set(inputs) - handled or program.dials:
        more = ", ".join(sorted({*inputs, *program.dials} - handled))
        raise LoweringError(
            f"onnxruntime-genai has no value for {more}",
            hint="freeze-dial makes a run-time setting a constant",
        )
    heads, size = next(iter(shapes))
    vocabulary = int(program.outputs[cache.logits].meta["val"].shape[-1])
    config = configuration(program)
    ends = _end_tokens(config, program)
    if not ends:
        raise LoweringError(
            "the checkpoint does not say with which token a text ends, and onnxruntime-genai would take token 0 for it",
            hint="set eos_token_id in the checkpoint's generation_config.json and capture it again",
        )
    queries = next(n for n in program.nodes if is_operator(n, "graphopt.attention"))
    query_heads = int(argument(queries, "q").meta["val"].shape[1])
    positions = context_length(program)
    longest = positions if isinstance(cache.capacity, int) else min(positions, LONGEST)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": int(size),
        "hidden_size": int(config.get("hidden_size") or query_heads * int(size)),
        "num_attention_heads": query_heads,
        "num_hidden_layers": int(cache.layers),
        "num_key_value_heads": int(heads),
        "inputs": {
            "input_ids": cache.tokens, "position_ids": cache.positions,
            "past_key_names": "key_cache_%d", "past_value_names": "value_cache_%d",
        },
        "outputs": {
            "logits": cache.logits, "present_key_names": "next_key_cache_%d",
            "present_value_names": "next_value_cache_%d",
        },
    }  # fmt: skip
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": _within(config.get("bos_token_id"), vocabulary),
            "eos_token_id": ends,
            "pad_token_id": _within(config.get("pad_token_id"), vocabulary, ends[0] if ends else 0),
            "context_length": positions,
            "vocab_size": vocabulary,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False, "max_length": longest, "min_length": 0, "num_beams": 1, "num_return_sequences": 1,
            "past_present_share_buffer": True, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        },
    }  # fmt: skip


def _end_tokens(config: dict[str, Any], program: Program) -> list[int]:
    """Return the tokens that end a text and that a trimmed vocabulary still has."""
    vocabulary = int(program.outputs[program.facts[KVCache].logits].meta["val"].shape[-1])
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return [int(e) for e in ends if e is not None and 0 <= e < vocabulary]


def _within(token: Any, vocabulary: int, otherwise: int = 0) -> int:
    return int(token) if isinstance(token, int) and 0 <= token < vocabulary else otherwise


def compare(program: Program, folder: Path, chunk: int = 6, behind: float = 2e-2) -> int:
    """Generate with genai and check that each of its tokens is the program's most likely one, up to rounding.

    Args:
        program: that the folder was written from.
        folder: with genai_config.json, whose stages all run on this machine.
        chunk: how many tokens a prompt's graph takes.
        behind: how much less likely a token may be than the program's, of the largest logit.

    Raises:
        LoweringError: genai does not load the folder, or generates other tokens.
    """
    import onnxruntime_genai

    cache = program.facts[KVCache]
    config = json.loads((folder / "genai_config.json").read_text())
    vocabulary = config["model"]["vocab_size"]
    longest, fixed = int(config["search"]["max_length"]), isinstance(cache.capacity, int)
    # one chunk of the prompt graph, two single tokens, and room for generated ones
    prompt_length = min(chunk + 2, longest - 1)
    if prompt_length < 1:
        raise LoweringError("a cache of one slot has no room for a token after a prompt's")
    prompt = torch.randint(vocabulary, (prompt_length,), generator=torch.Generator().manual_seed(0)).tolist()
    length = min(len(prompt) + TOKENS, longest)
    try:
        # the test must not end at once
        settings = onnxruntime_genai.Config(str(folder))
        order = _logits(program, prompt)[-1].argsort()
        unlikely = int(order[len(order) // 2])
        settings.overlay(json.dumps({"model": {"eos_token_id": [unlikely]}}))
        model = onnxruntime_genai.Model(settings)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=cache.capacity if fixed else length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        first = chunk if len(prompt) >= chunk else 0
        for piece in ([prompt[:first]] if first else []) + [[token] for token in prompt[first:]]:
            generator.append_tokens(piece)
        while not generator.is_done() and len(generator.get_sequence(0)) < length:
            generator.generate_next_token()
        generated = [int(token) for token in generator.get_sequence(0)]
    except Exception as error:
        raise LoweringError(
            f"onnxruntime-genai does not take the folder: {str(error).strip().splitlines()[0]}"
        ) from error
    logits = _logits(program, generated)
    for position in range(len(prompt), len(generated)):
        before = logits[position - 1]
        less = float(before.max() - before[generated[position]]) / float(before.abs().max().clamp(min=1e-30))
        if not less <= behind:
            raise LoweringError(
                f"onnxruntime-genai generates token {generated[position]} at place {position}, and the program "
                f"{int(before.argmax())}, which is likelier by {less:.2g} of the largest logit"
            )
    if len(generated) == len(prompt):
        raise LoweringError("onnxruntime-genai generates nothing")
    return len(generated) - len(prompt)


def _logits(program: Program, tokens: list[int]) -> torch.Tensor:
    """Return the logits of a program with empty caches after each token, (tokens, vocabulary)."""
    cache = program.facts[KVCache]
    slots = cache.capacity if isinstance(cache.capacity, int) else len(tokens)
    inputs = {
        cache.tokens: torch.tensor([tokens]),
        cache.positions: torch.arange(len(tokens))[None],
    }
    for name, spec in program.signature.inputs.items():
        if "_cache_" in name:
            inputs[name] = torch.zeros(1, int(spec.shape[1]), slots, int(spec.shape[3]), dtype=spec.dtype)
    logits: torch.Tensor = run(program, inputs)[cache.logits][0].double()
    return logits
