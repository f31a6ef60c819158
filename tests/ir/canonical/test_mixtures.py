"""Mixtures that transformers writes in ways of their own: one operator, a dial, fewer experts, the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.backends.onnx.lower import lower_onnx
from graphopt.ir.checking.verify import compare_programs
from graphopt.ir.facts import Capture
from graphopt.ir.operators import routed_ffn
from graphopt.ir.operators.activations import ACTIVATIONS, activate
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.schema import arguments

BASE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 24, "moe_intermediate_size": 24,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "first_k_dense_replace": 0, "n_routed_experts": 4,
}  # fmt: skip
# what is peculiar: scores on the inputs of experts; tokens sorted by expert; one group; a stream that is scaled, so
# that it is no residual stream; a router that scores shared experts as well, and a block a + f(a)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scored_inputs": ("Llama4", {
        "num_local_experts": 4, "interleave_moe_layer_step": 1, "head_dim": 8, "intermediate_size_mlp": 24,
        "tie_word_embeddings": False,
    }),
    "sorted_tokens": ("JetMoe", {"num_local_experts": 4, "kv_channels": 8}),
    "one_group": ("DeepseekV2", {**LATENT, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}),
    "scaled_stream": ("Beam", {
        "num_experts": 4, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["sparse"], "head_dim": 8,
    }),
    "shared_scores": ("Inkling", {
        "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "head_dim": 8, "swa_head_dim": 8,
        "mlp_layer_types": ["sparse"], "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    }),
}  # fmt: skip


def written(name: str, folder: Path) -> Path:
    import transformers

    kind, settings = CASES[name]
    config = getattr(transformers, f"{kind}ForCausalLM").config_class(**{**BASE, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no expert may be like another, no bias zero
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    return {name: written(name, root) for name in CASES}


@pytest.fixture(scope="module")
def programs(folders: dict[str, Path]) -> dict[str, Program]:
    return {name: graphopt.capture(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", CASES)
def test_one_operator_and_a_dial(
    name: str, programs: dict[str, Program], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Wrong if a mixture were missed, or one expert were not what a model with one computes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    program = programs[name]
    assert program.operators["graphopt.routed_ffn"] == 1, program.facts.get(Capture)
    done = graphopt.optimize(program, "dial-top-k")
    assert not done.report.passes[-1].refused
    inputs = example_inputs(program)
    dial = {n: torch.tensor(d.default, dtype=torch.float64) for n, d in done.dials.items()}
    assert max(compare_programs(program, done, {**program.bind((), inputs), **dial}).values()) < 1e-10
    config = copy.deepcopy(AutoConfig.from_pretrained(folders[name]))
    (config.get_text_config()).num_experts_per_tok = 1
    model = AutoModelForCausalLM.from_pretrained(folders[name], config=config).eval()
    if name == "sorted_tokens":
        # attention is a mixture as well there, which the dial leaves alone, as it does its setting
        for layer in model.model.layers:
            layer.self_attention.experts.top_k = layer.self_attention.top_k = 2
            layer.self_attention.experts.router.top_k = 2
    with torch.no_grad():
        expected = model(**{k: v for k, v in inputs.items() if k != "position_ids"}).logits
    seen = inputs["attention_mask"].bool()
    found = done(**inputs, active_experts=1)["logits"]
    # where a shared expert takes part in the sum that routing weights are divided by, no k is another model's
    assert torch.allclose(found[seen], expected[seen], atol=1e-4) == (name != "shared_scores")
    fixed = graphopt.optimize(program, "dial-top-k{fixed=1}")
    if name in ("sorted_tokens", "shared_scores"):
        with pytest.raises(graphopt.LoweringError):
            fixed.save_pretrained(tmp_path / name)
        assert not (tmp_path / name).exists()
    else:
        fixed.save_pretrained(tmp_path / name)
        again = graphopt.capture(tmp_path / name)
        assert torch.allclose(again(**inputs)["logits"][seen], found[seen], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_fewer_experts_and_back_to_a_folder(name: str, programs: dict[str, Program], tmp_path: Path) -> None:
    """Wrong if the router still chose an expert that went, or another expert's matrices stayed."""
    program = programs[name]
    data = [example_inputs(program, seed=s) for s in range(2)]
    done = graphopt.optimize(program, "prune-experts{keep=3}", data=data)
    (block,) = done.anatomy.experts
    assert arguments(block.parts["core"])["up"].meta["val"].shape[0] == 3
    assert max(compare_programs(done, done.copy(), done.bind((), data[0])).values()) == 0
    if name == "sorted_tokens":
        with pytest.raises(graphopt.LoweringError):
            done.save_pretrained(tmp_path / name)
        return
    done.save_pretrained(tmp_path / name)
    again = graphopt.capture(tmp_path / name)
    seen = data[0]["attention_mask"].bool()
    assert torch.allclose(again(**data[0])["logits"][seen], done(**data[0])["logits"][seen], atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weigh_inputs", [False, True])
def test_each_form_of_the_operator_is_one_function(
    activation: str, weigh_inputs: bool, tmp_path: Path
) -> None:
    """Direct, traced with gradients, and in ONNX Runtime; absent experts add nothing, although they have biases."""
    import onnxruntime

    torch.manual_seed(0)
    gated = activation.endswith(("_clamped", "_softcapped"))
    limit = 0.5 if gated else 0.0
    x, chosen = torch.randn(6, 4), torch.tensor([[0, 2], [1, 3], [2, 0], [3, 1], [0, 1], [2, 3]])
    weights = torch.rand(6, 2)
    tensors = [
        torch.randn(3, 10, 4),
        torch.randn(3, 4, 5 if gated else 10),
        torch.randn(3, 10),
        torch.randn(3, 4),
    ]
    options = {"activation": activation, "gated": gated, "limit": limit, "weigh_inputs": weigh_inputs}
    first = torch.ones(1, dtype=torch.long)  # of four experts, number 0 is elsewhere
    up, down, up_bias, down_bias = tensors
    expected = torch.zeros(6, 4)
    for token in range(6):
        for place in range(2):
            expert = int(chosen[token, place]) - 1
            if expert >= 0:
                factor = weights[token, place]
                row = x[token] * factor if weigh_inputs else x[token]
                hidden = activate(up[expert] @ row + up_bias[expert], activation, gated, False, limit, 1.0)
                result = down[expert] @ hidden + down_bias[expert]
                expected[token] += result if weigh_inputs else result * factor
    direct = routed_ffn(x, chosen, weights, *tensors, first, **options)
    assert torch.allclose(direct, expected, atol=1e-5)
    gradients = []
    for call in (routed_ffn, torch.ops.graphopt.routed_ffn):
        leaf = x.clone().requires_grad_()
        call(leaf, chosen, weights, *tensors, first, **options).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, atol=1e-4)

    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = torch.nn.ParameterList([torch.nn.Parameter(t) for t in tensors])
            self.register_buffer("first", first)
            self.register_buffer("chosen", chosen)
            self.register_buffer("weights", weights)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.graphopt.routed_ffn(
                x, self.chosen, self.weights, *self.matrices, self.first, **options
            )

    program = graphopt.capture(Mixture(), x)
    path = tmp_path / "mixture.onnx"
    lower_onnx(program, path)
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
