"""Decoding with caches of latents, beside caches of the keys and values that they expand to, and the library's own steps.

    python benchmarks/latent_caches.py [--prompts 512 2048] [--steps 12] [--rounds 3]

A dense model of 198M parameters with the attention of DeepSeek V2 Lite (16 heads, a latent of 512 and 64 shared entries),
random weights, float32, one row on one thread. Rounds alternate; seconds are processor time. What is read is a prompt, and
single tokens after it.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

import graphopt
from graphopt.decoding.cached import CachedDecoder

VOCABULARY = 32_000


def made() -> Any:
    """Return the model."""
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, n_routed_experts=8, moe_intermediate_size=64, num_experts_per_tok=2, first_k_dense_replace=8,
        max_position_embeddings=8192,
    )  # fmt: skip
    return transformers.DeepseekV2ForCausalLM(config).eval()


def ours(program: Any, ids: list[int], steps: int) -> dict[str, float]:
    """Return seconds of the prompt and of a step, bytes kept for the prompt's tokens, and a number of the last logits."""
    decoder = CachedDecoder(program, 1, len(ids) + steps)
    began = time.process_time()
    decoder.prefill([ids])
    prompt = time.process_time() - began
    seconds, last = [], torch.zeros(1)
    for token in range(steps):
        began = time.process_time()
        last = decoder.extend(torch.tensor([[token + 5]]))["logits"][0, -1]
        decoder.advance([1])
        seconds.append(time.process_time() - began)
    kept = decoder.bytes * len(ids) / decoder.capacity
    return {"prompt": prompt, "step": statistics.median(seconds[3:]), "bytes": kept, "logit": float(last[0])}


def theirs(model: Any, ids: list[int], steps: int) -> dict[str, float]:
    """Return the same of transformers."""
    with torch.no_grad():
        began = time.process_time()
        output = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        prompt = time.process_time() - began
        cache, seconds = copy.copy(output.past_key_values), []
        kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        for token in range(steps):
            began = time.process_time()
            output = model(torch.tensor([[token + 5]]), past_key_values=cache, use_cache=True)
            seconds.append(time.process_time() - began)
    logit = float(output.logits[0, -1, 0])
    return {"prompt": prompt, "step": statistics.median(seconds[3:]), "bytes": kept, "logit": logit}


def main() -> None:
    """Print medians of rounds, and ratios to caches of latents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = made()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")
    example = {"input_ids": torch.randint(0, VOCABULARY, (1, 9))}
    program = graphopt.capture(model, example, compare=False)
    programs = {
        "latents": graphopt.optimize(program, "insert-cache"),
        "keys and values": graphopt.optimize(program, "insert-cache{latents=false}"),
    }
    for length in given.prompts:
        ids = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1)).tolist()
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(given.rounds):
            for name, one in programs.items():
                found.setdefault(name, []).append(ours(one, ids, given.steps))
            found.setdefault("transformers", []).append(theirs(model, ids, given.steps))
        medians = {
            n: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for n, rounds in found.items()
        }
        first = medians["latents"]
        for name, values in medians.items():
            ratios = ", ".join(f"{k} {values[k] / first[k]:.2f}" for k in ("prompt", "step", "bytes"))
            print(
                f"{length:,} tokens, {name}: prompt {values['prompt']:.2f} s, step {values['step'] * 1e3:.1f} ms, "
                f"{values['bytes'] / 1e6:.1f} MB, logit {values['logit']:.5f}; to latents: {ratios}",
                flush=True,
            )


if __name__ == "__main__":
    main()
