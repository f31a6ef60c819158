"""Steps of recurrent and hybrid decoders of SmolLM2's size, beside the library's own cached steps.

    python benchmarks/hybrid_decoding.py [NAMES...] [--rounds 5] [--tokens 24] [--prompt 64]

Models have random weights and about 135M parameters. Both write the same tokens from the same prompt, one row, in
float32, on one thread; rounds are interleaved, and what counts is the CPU time of the process. Memory is that of what is
kept between steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
import transformers

import graphopt
from graphopt.decoding.cached import CachedDecoder
from graphopt.decoding.generation import with_cache
from graphopt.ir.facts import KVCache

VOCABULARY = 49_152
ATTENTION = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 128, "head_dim": 64, "num_heads": 24, "n_groups": 1},
    ),
    "falcon-h1": (
        "FalconH1Config",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24, "mamba_d_ssm": 768,
            "mamba_n_heads": 12, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, **ATTENTION,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "layer_types": ["conv", "conv", "full_attention"] * 10,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 20, "linear_num_value_heads": 8,
            "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_experts": 0,
            "mlp_only_layers": list(range(20)), **ATTENTION,
        },
    ),
}  # fmt: skip


def made(name: str) -> Any:
    """Return a model with random weights."""
    torch.manual_seed(0)
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def theirs(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[float], list[int], int]:
    """Return seconds of each step, the tokens and the bytes of the cache."""
    seconds, written = [], []
    with torch.inference_mode():
        found = model(prompt, use_cache=True)
        cache = "past_key_values" if "past_key_values" in found else "cache_params"
        for _ in range(tokens):
            token = found.logits[:, -1].argmax(-1, keepdim=True)
            written.append(int(token))
            began = time.process_time()
            found = model(token, **{cache: found[cache]}, use_cache=True)
            seconds.append(time.process_time() - began)
    kept = {id(t): t for layer in found[cache].layers for t in _tensors(vars(layer))}
    return seconds, written, sum(t.numel() * t.element_size() for t in kept.values())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def ours(cached: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[float], list[int], int]:
    """Return seconds of each step, the tokens and the bytes of caches and states."""
    decoder = CachedDecoder(cached, 1, prompt.shape[1] + tokens + 1)
    logits = cached.facts[KVCache].logits
    outputs = decoder.prefill([prompt[0].tolist()])[0][logits]
    seconds, written = [], []
    for _ in range(tokens):
        token = int(outputs.argmax())
        written.append(token)
        began = time.process_time()
        outputs = decoder.extend(torch.tensor([[token]]))[logits][0, -1]
        decoder.advance([1])
        seconds.append(time.process_time() - began)
    kept = [*decoder.buffers.values(), *decoder.states.values()]
    return seconds, written, sum(t.numel() * t.element_size() for t in kept)


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("| model | parameters | transformers, ms a token | ours | ratio | MiB kept | ours | equal tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in given.names:
        model = made(name)
        prompt = torch.randint(3, VOCABULARY, (1, given.prompt), generator=torch.Generator().manual_seed(0))
        cached = with_cache(graphopt.capture(model, {"input_ids": prompt[:, :13]}, compare=False))
        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(given.rounds):
            one, expected, kept = theirs(model, prompt, given.tokens)
            two, written, own = ours(cached, prompt, given.tokens)
            # the first steps are prepared
            times["theirs"].append(statistics.median(one[4:]))
            times["ours"].append(statistics.median(two[4:]))
        ratios = [a / b for a, b in zip(times["theirs"], times["ours"], strict=True)]
        a, b = (statistics.median(times[n]) * 1e3 for n in ("theirs", "ours"))
        count = sum(p.numel() for p in model.parameters())
        equal = sum(x == y for x, y in zip(expected, written, strict=True))
        print(
            f"| {name} | {count / 1e6:.0f}M | {a:.1f} | {b:.1f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {kept / 2**20:.1f} | {own / 2**20:.1f} "
            f"| {equal} of {given.tokens} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
