"""Small models of transformers' classes with random weights, and results made one process a class, kept between runs."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARAMETERS = 20_000_000
WIDTHS = {
    32: "hidden_size d_model n_embd dim model_dim embed_dim word_embed_proj_dim embedding_size dim_model "
    "encoder_hidden_dim decoder_hidden_dim out_hidden_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers depth "
    "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads "
    "encoder_num_hidden_layers decoder_num_hidden_layers encoder_num_attention_heads decoder_num_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads linear_num_key_heads "
    "linear_num_value_heads swa_num_attention_heads index_n_heads",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk top_k_experts "
    "encoder_num_key_value_heads decoder_num_key_value_heads swa_num_key_value_heads zero_expert_num",
    48: "intermediate_size ffn_dim n_inner dim_feedforward decoder_ffn_dim encoder_ffn_dim dim_ff "
    "shared_expert_intermediate_size d_ff hidden_dim ffn_hidden_size d_inner dff "
    "dense_intermediate_size shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size",
    24: "moe_intermediate_size expert_ffn_size",
    8: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim mamba_d_state mamba_headdim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head d_kv rotary_dim "
    "swa_head_dim",
    16: "kv_lora_rank q_lora_rank",
    128: "vocab_size",
    1: "n_group num_group topk_group",
    100: "encoder_hash_byte_group_vocab",
}
SIZES = {name: size for size, names in WIDTHS.items() for name in names.split()}
# settings without a default, which the layers need
_UNSET = {
    "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 8, "vocab_size": 128,
    "prediction_length": 8, "num_key_value_heads": 4,
}  # fmt: skip


def names_of_decoders() -> list[str]:
    """Return the causal language models that transformers has, by class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(n, str)})


def small_config(config_class: Any, overrides: dict[str, Any] | None = None, *, decoder: bool = True) -> Any:
    """Return the defaults of a configuration class but for known names of sizes, nested configurations included.

    Args:
        config_class: of transformers.
        overrides: further values by name; those of a nested configuration in a dictionary.
        decoder: classes that can be encoders or decoders become decoders.
    """
    given = dict(overrides or {})
    default = config_class()
    present = default.to_dict()
    # a setting may be written under another name than it is read by
    read = present | {
        k: getattr(default, k, None) for k in getattr(config_class, "attribute_map", None) or {}
    }
    sizes: dict[str, Any] = {
        k: v for k, v in SIZES.items() if isinstance(read.get(k), int) and not isinstance(read[k], bool)
    }
    sizes |= {name: size for name, size in _UNSET.items() if read.get(name, 0) is None}
    tokens = {k: min(3, present[k]) for k in ("pad_token_id", "bos_token_id", "eos_token_id")
              if isinstance(present.get(k), int)}  # fmt: skip
    # tokens of a meaning are within the small vocabulary, each another one
    placed = [k for k, v in present.items() if k.endswith(("_token_id", "_token_index")) and k not in tokens
              and isinstance(v, int) and v >= SIZES["vocab_size"]]  # fmt: skip
    tokens |= {name: SIZES["vocab_size"] - 1 - i for i, name in enumerate(placed)}
    if "kv_lora_rank" in present:  # latent attention expands to as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    nested = {}
    for name, nested_class in (getattr(config_class, "sub_configs", None) or {}).items():
        shape = present.get(name)
        if isinstance(shape, dict) and hasattr(nested_class, "from_pretrained"):
            made, settings = nested_class, dict(given.pop(name, None) or {})
            chosen = settings.pop("model_type", "")
            if chosen or (not getattr(made, "model_type", "") and shape.get("model_type")):
                from transformers import CONFIG_MAPPING

                made = CONFIG_MAPPING[chosen or shape["model_type"]]
            nested[name] = small_config(made, settings, decoder=False).to_dict()
    if decoder and "is_decoder" in present and not present.get("is_encoder_decoder"):
        sizes["is_decoder"] = True
    small = config_class(**{**sizes, **tokens, **nested, **given})
    kinds = {
        name: [every[i % len(every)] for i in range(len(getattr(small, name)))]
        for name in ("layer_types", "mlp_layer_types")
        if name not in given
        and isinstance(present.get(name), list)
        and isinstance(getattr(small, name, None), list)
        if len(every := list(dict.fromkeys(present[name]))) > len(set(getattr(small, name)))
    }
    # a few layers may be of fewer kinds than many are
    return config_class(**{**sizes, **tokens, **nested, **kinds, **given}) if kinds else small


def small_model(name: str, overrides: dict[str, Any] | None = None, *, decoder: bool = True) -> Any:
    """Make a class from its configuration's defaults, small.

    Raises:
        ValueError: the configuration does not become small by the sizes that are known here.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = small_config(model_class.config_class, overrides, decoder=decoder)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count} parameters are left")
    return model_class(config).eval()


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def fault(error: Exception) -> str:
    """Return an error's type, first line and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} ({Path(where.filename).name}:{where.lineno})"


def refusal(error: Exception, lines: int = 3) -> str:
    """Return the first lines of a refusal in one."""
    return " | ".join(line.strip() for line in str(error).splitlines()[:lines])


def in_a_process(
    make: Callable[..., dict[str, Any]],
    name: str,
    work: Path,
    seconds: float,
    *options: Any,
    again: bool = False,
) -> dict[str, Any]:
    """Return a class's result, made by a process of its own where there is none yet.

    Args:
        make: a function of a module, called with the name and the options.
        name: of the class.
        work: the folder of results.
        seconds: after which the process is stopped.
        options: further arguments of the function.
        again: make the result anew although there is one.
    """
    place = work / f"{name}.json"
    if not place.is_file() or again:
        place.unlink(missing_ok=True)
        # processes begin as copies of one that has imported what all of them need
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "graphopt.api"])
        process = context.Process(target=_write, args=(make, name, place, options))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            place.write_text(json.dumps({"name": name, "not made": f"took more than {seconds:g} s"}))
        elif not place.is_file():
            told = f"the process ended with status {process.exitcode}"
            place.write_text(json.dumps({"name": name, "fault": told}))
    found: dict[str, Any] = json.loads(place.read_text())
    return found


def _write(make: Callable[..., dict[str, Any]], name: str, place: Path, options: tuple[Any, ...]) -> None:
    found = make(name, *options)
    partial = place.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(place)


# options at which each pass has something to do on a small decoder
PASSES = [
    "fuse-projections", "split-projections", "fold-norms", "fuse-branches", "expand-branches",
    "stream-convolutions", "fuse-kernels", "take-top-k{k=4 output=logits}", "fit-target",
    "fit-target, quantize{target=onnx}",
    "share-caches", "share-caches, insert-cache", "window-attention{past=3}",
    "insert-cache", "insert-cache{max_length=16}", "insert-cache, quantize-cache",
    "attach-multi-token-heads{heads=2}", "attach-draft",
    "attach-mask-tokens", "attach-early-exit", "trim-vocabulary{keep=64}", "skip-layers{remove=1}",
    "skip-layers{remove=1 unit=attention}", "sort-ffn", "prune-ffn{fraction=0.5}", "prune-experts{fraction=0.5}",
    "split-ffn{score=peak}", "split-ffn{score=peak}, extract-width{width=3/4}", "dial-top-k",
    "dial-top-k, freeze-dial{dial=active_experts}", "shard-tensor-parallel{size=2}",
    "group-heads{size=2}, shard-tensor-parallel{size=2}", "shard-tensor-parallel{size=2}, drop-sync-points{fraction=0.5}",
    "shard-tensor-parallel{size=2}, quantize-communication",
]  # fmt: skip


def try_passes(program: Any, data: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run every pass on a program, and what comes of it on the first row of the data.

    Returns:
        By pipeline: ``taken`` with the number of sites, ``refused`` with the reason, or ``fault``.
    """
    import graphopt
    from graphopt.ir.facts import KVCache, TensorParallel

    results: dict[str, dict[str, Any]] = {}
    for text in PASSES:
        try:
            done = graphopt.optimize(program, text, data=data)
            if KVCache not in done.facts and TensorParallel not in done.facts:
                done(**data[0])
            results[text] = {"taken": len(done.report.passes[-1].sites)}
        except graphopt.GraphoptError as error:
            results[text] = {"refused": refusal(error, 2), "kind": type(error).__name__}
        except Exception as error:
            results[text] = {"fault": fault(error)}
    return results


def broken(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is a fault among results of passes: other errors than refusals, and broken contracts."""
    return [f"{text}: {p['fault']}" for text, p in results.items() if "fault" in p] + [
        f"{text}: {p['refused'][:200]}" for text, p in results.items()
        if p.get("kind") in ("ContractError", "VerificationError")
    ]  # fmt: skip


def counts(results: dict[str, dict[str, Any]]) -> str:
    """Return how many passes were taken, refused, and ended in a fault."""
    return ", ".join(f"{k} {sum(k in p for p in results.values())}" for k in ("taken", "refused", "fault"))
