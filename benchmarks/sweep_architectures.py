"""Every pass on every causal language model of transformers that can be made small: taken, or refused with a reason.

    python benchmarks/sweep_architectures.py [NAMES...] [--workers 2] [--work build/sweep] [--again] [--page FILE]

Each class is made from the defaults of its own configuration, but for width, depth, vocabulary and counts of heads and
experts, with random weights. What ends in anything but an error of graphopt's own is a fault, and so is a program whose
run fails; the command's status then is 1. One process a class; what is done is kept, so that a run can go on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 900
# options at which each pass has something to do on a small decoder
PASSES = [
    "fuse-projections", "split-projections", "fold-norms", "fuse-branches", "expand-branches",
    "stream-convolutions", "fuse-kernels", "take-top-k{k=4 output=logits}", "fit-target",
    "fit-target, quantize{target=onnx}",
    "insert-kv-cache", "insert-kv-cache{max_length=16}", "attach-multi-token-heads{heads=2}", "attach-draft",
    "attach-mask-tokens", "attach-early-exit", "trim-vocabulary{keep=64}", "skip-layers{remove=1}",
    "skip-layers{remove=1 unit=attention}", "sort-ffn", "prune-ffn{fraction=0.5}", "prune-experts{fraction=0.5}",
    "split-ffn{score=peak}", "split-ffn{score=peak}, extract-width{width=3/4}", "dial-top-k",
    "dial-top-k, freeze-dial{dial=active_experts}", "shard-tensor-parallel{size=2}",
    "group-heads{size=2}, shard-tensor-parallel{size=2}", "shard-tensor-parallel{size=2}, drop-sync-points{fraction=0.5}",
    "shard-tensor-parallel{size=2}, quantize-communication",
]  # fmt: skip
WIDTHS = {
    32: "hidden_size d_model n_embd dim model_dim embed_dim word_embed_proj_dim embedding_size dim_model",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk top_k_experts",
    48: "intermediate_size ffn_dim n_inner dim_feedforward decoder_ffn_dim encoder_ffn_dim dim_ff "
    "shared_expert_intermediate_size",
    24: "moe_intermediate_size expert_ffn_size",
    8: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim mamba_d_state mamba_headdim "
    "linear_key_head_dim linear_value_head_dim mamba_d_head",
    16: "kv_lora_rank q_lora_rank",
    128: "vocab_size",
    1: "n_group num_group topk_group",
}
SIZES = {name: size for size, names in WIDTHS.items() for name in names.split()}


def names_of_classes() -> list[str]:
    """Return the causal language models that transformers has, by class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(n, str)})


def small_model(name: str) -> Any:
    """Make the class from its configuration's defaults, small.

    Raises:
        ValueError: the configuration does not become small by the sizes that are known here.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    present = config_class().to_dict()
    sizes = {
        k: v for k, v in SIZES.items() if isinstance(present.get(k), int) and not isinstance(present[k], bool)
    }
    if present.get("num_experts_per_tok", 0) is None:
        sizes["num_experts_per_tok"] = 2
    tokens = {k: min(3, present[k]) for k in ("pad_token_id", "bos_token_id", "eos_token_id")
              if isinstance(present.get(k), int)}  # fmt: skip
    # encoders that can be decoders as well
    if "kv_lora_rank" in present:  # latent attention expands to as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    kinds = {"is_decoder": True} if "is_decoder" in present and not present.get("is_encoder_decoder") else {}
    config = config_class(**sizes, **tokens, **kinds)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > 20_000_000:
        raise ValueError(f"{count} parameters are left")
    return model_class(config).eval()


def try_class(name: str) -> dict[str, Any]:
    """Save the class's folder, capture it, and run every pass."""
    try:
        model = small_model(name)
    except Exception as error:
        return {
            "name": name,
            "not made": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        }
    import torch

    import graphopt
    from graphopt.ir.facts import KVCache, TensorParallel

    found: dict[str, Any] = {"name": name, "passes": {}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            program = graphopt.capture(folder)
        except graphopt.GraphoptError as error:
            return {**found, "refused": " | ".join(line.strip() for line in str(error).splitlines()[:3])}
        except Exception as error:
            return {**found, "fault": _fault(error)}
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(4, 120, (2, 12), generator=generator) for _ in range(4)]
        for text in PASSES:
            try:
                done = graphopt.optimize(program, text, data=[{"input_ids": i} for i in ids])
                if KVCache not in done.facts and TensorParallel not in done.facts:
                    done(input_ids=ids[0])
                found["passes"][text] = {"taken": len(done.report.passes[-1].sites)}
            except graphopt.GraphoptError as error:
                told = [line.strip() for line in str(error).splitlines()]
                found["passes"][text] = {"refused": " | ".join(told[:2]), "kind": type(error).__name__}
            except Exception as error:
                found["passes"][text] = {"fault": _fault(error)}
    return found


def _fault(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = str(error).splitlines()[0][:200] if str(error) else ""
    return f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"


def in_a_process(name: str, work: Path, again: bool) -> dict[str, Any]:
    """Return a class's result, made by a process of its own where there is none yet."""
    place = work / f"{name}.json"
    if not place.is_file() or again:
        command = [sys.executable, __file__, "--one", name, "--work", str(work)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"name": name, "not made": f"took more than {SECONDS} s"}
        if not place.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"name": name, "fault": f"the process ended with status {done.returncode}: {last}"}
    found: dict[str, Any] = json.loads(place.read_text())
    return found


def summary(results: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the lines of a table, a class a line, and the faults."""
    lines = ["| class | passes taken | refused | why it was not captured |", "| --- | --- | --- | --- |"]
    faults = []
    for found in results:
        name = found["name"]
        if "fault" in found:
            faults.append(f"{name}: capture: {found['fault']}")
        if "passes" not in found or "refused" in found or "fault" in found:
            if "not made" not in found:
                lines.append(f"| {name} | | | {found.get('refused', found.get('fault', ''))[:160]} |")
            continue
        taken = sum("taken" in p for p in found["passes"].values())
        refused = sum("refused" in p for p in found["passes"].values())
        faults += [f"{name}: {text}: {p['fault']}" for text, p in found["passes"].items() if "fault" in p]
        broken = [
            f"{name}: {text}: {p['refused'][:200]}"
            for text, p in found["passes"].items()
            if p.get("kind") in ("ContractError", "VerificationError")
        ]
        faults += broken
        lines.append(f"| {name} | {taken} | {refused} | |")
    return lines, faults


def counts(found: dict[str, Any]) -> str:
    """Return how many passes were taken, refused, and ended in a fault."""
    kinds = ("taken", "refused", "fault")
    return ", ".join(f"{k} {sum(k in p for p in found['passes'].values())}" for k in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sweep")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page", type=Path, default=None, help="write the table to this file")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.one:
        found = try_class(given.one)
        (given.work / f"{given.one}.json").write_text(json.dumps(found, indent=1))
        return
    names = given.names or names_of_classes()
    results = []
    with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
        for found in pool.map(lambda n: in_a_process(n, given.work, given.again), names):
            results.append(found)
            told = found.get("not made") or found.get("refused") or found.get("fault")
            print(found["name"], told or counts(found), flush=True)
    lines, faults = summary(results)
    made = sum("not made" not in r for r in results)
    if given.page:
        given.page.write_text("\n".join(lines) + "\n")
    print("\n".join(faults))
    print(f"{made} classes of {len(results)} could be made small; {len(faults)} faults")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
