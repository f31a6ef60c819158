"""Architectures of the zoo with the settings that real folders have: only width, depth, vocabulary and experts are small.

A layer is taken out, or experts; the folder is written, loaded by transformers and compared beyond its windows with the
original model whose layer passes its input on, which knows nothing of graphopt.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo

import graphopt
from graphopt.backends.huggingface.compare import reach
from graphopt.frontends.huggingface import capture_huggingface
from graphopt.ir.errors import GraphoptError
from graphopt.ir.facts import CheckpointChanges

SMALL = {
    "vocab_size", "hidden_size", "n_embd", "d_model", "dim", "embed_dim", "hidden_sizes", "hidden_dim", "head_dim",
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "d_ff", "d_kv",
    "encoder_ffn_dim", "decoder_ffn_dim", "embedding_size", "word_embed_proj_dim", "expansion_ratio", "mlp_ratio",
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depths",
    "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads",
    "decoder_attention_heads", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "rotary_dim", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_group",
    "topk_group", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
}  # fmt: skip
"""Options that make a model small; token numbers are among them, since they lie within the vocabulary."""
VARIANTS = {"multi_query", "alibi", "parallel_attn", "bias", "tie_word_embeddings", "do_layer_norm_before"}
"""Options that make another architecture of the same class."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
SHORT = 12
WINDOWS = ("sliding_window", "local_attention", "window_size")


@dataclass(frozen=True)
class Outcome:
    """What became of a folder: "right", "refused" with the reason, or "wrong" with the error."""

    verdict: str
    told: str = ""


def options(name: str, short: bool) -> dict[str, Any] | None:
    """Return the options of a case with real settings; None if it has no window that could be short."""
    import transformers

    case = zoo.CASES[name]
    found = {k: v for k, v in case.options.items() if k in SMALL | VARIANTS}
    # a whole pattern of layers, and one more
    depth = 7 if name == "gemma3" else 4
    found |= {k: depth for k in DEPTHS if k in found}
    made = getattr(transformers, case.config)(**found)
    windows = [k for k in WINDOWS if type(getattr(made, k, None)) is int and "Swin" not in case.config]
    if short:
        return found | dict.fromkeys(windows, SHORT) if windows else None
    return found


def model_of(name: str, short: bool = False) -> Any:
    """Return the model, with large weights so that windows show; None where nothing could be short."""
    import transformers

    given = options(name, short)
    if given is None:
        return None
    case = zoo.CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**given)).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.dim() == 1 or "sinks" in label:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif parameter.dim() == 2 and "embed" not in label:
                parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
    model.config.use_cache = False
    return model


def outcome(name: str, passes: str, folder: Path, *, short: bool = False) -> Outcome | None:
    """Write the folder after a pass and compare it; None where the pass or a short window does not apply."""
    model = model_of(name, short)
    if model is None:
        return None
    model.save_pretrained(folder / "in")
    try:
        program = capture_huggingface(folder / "in", compare=False)
        done = graphopt.optimize(program, passes)
        if not done.report.passes[-1].sites:
            return None
        done.save_pretrained(folder / "out")
    except GraphoptError as error:
        return Outcome("refused", error.message)
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}")
    again = type(model).from_pretrained(folder / "out").eval()
    again.config.use_cache = False
    error = difference(model, again, done)
    return Outcome("right" if error < 2e-4 else "wrong", f"{error:.1e}")


def difference(model: Any, again: Any, done: Any) -> float:
    """Return the largest relative error of the folder's model against the original one without the layer."""
    changes = done.facts.get(CheckpointChanges) or CheckpointChanges()
    for stack in changes.removed_layers:
        for number in stack.removed:
            bypass(_layer(model, f"{stack.prefix}{number}"))
    pruned = bool(changes.expert_counts)
    length = reach(done) + 5
    high = min(
        (s.high for n, s in done.signature.sizes.items() if "sequence" in n and s.high), default=length
    )
    errors = []
    for side in ("right", "left"):
        inputs = _inputs(model, max(9, min(length, high)), side)
        with torch.no_grad():
            found = again(**inputs)[0]
            expected = done(**inputs)[next(iter(done.outputs))] if pruned else model(**inputs)[0]
        mask = inputs.get("attention_mask")
        if mask is not None and found.shape[:2] == mask.shape:
            found, expected = found[mask.bool()], expected[mask.bool()]
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    return max(errors)


def _layer(model: Any, name: str) -> Any:
    # names in a file may leave out, or have, the base model's
    prefix = f"{model.base_model_prefix}."
    for spelling in (name, name.removeprefix(prefix), prefix + name):
        with contextlib.suppress(AttributeError):
            return model.get_submodule(spelling)
    # or be another's altogether, as those of vision models
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    (layers,) = [m for m in lists if len(m) == model.config.num_hidden_layers]
    return layers[int(name.rsplit(".", 1)[-1])]


def bypass(layer: Any) -> None:
    """Let a layer pass its first input on."""
    forward = layer.forward

    def passing(*args: Any, **kwargs: Any) -> Any:
        taken = args[0] if args else kwargs["hidden_states"]
        made = forward(*args, **kwargs)
        return (taken, *made[1:]) if isinstance(made, tuple) else taken

    layer.forward = passing


def _inputs(model: Any, length: int, side: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        return {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (1, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {})
