"""Experts taken out of mixtures: the same as a router that never chooses them, and back to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file

import graphopt
from graphopt.frontends.huggingface import capture_huggingface
from graphopt.ir.errors import PassRefusedError, PipelineError
from graphopt.ir.program import Program
from graphopt.ir.running.examples import example_inputs
from graphopt.ir.running.execute import interpret
from graphopt.ir.schema import arguments

MIXTURES = [name for name, case in zoo.CASES.items() if case.blocks.get("experts")]


def data(program: Program, count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [example_inputs(program, seed=s) for s in range(count)]


@pytest.mark.parametrize("name", MIXTURES)
def test_gone_is_never_chosen(name: str, captured: Callable[[str], Program], tmp_path: Path) -> None:
    """A router whose scores of the pruned experts are minus infinity chooses as the pruned one does."""
    program = captured(name)
    done = graphopt.optimize(program, "prune-experts{keep=3 allow_no_match=true}", data=data(program))
    entry = done.report.passes[-1]
    if not entry.sites:  # DeepSeek's: two groups of two
        assert all("2 groups, which 3 do not fill" in r.reason for r in entry.refused)
        return
    left = {s["block"]: s["left"] for s in done.history[-1]["plan"]["sites"]}
    routers = {b.parts["router"].name: left[b.name] for b in program.anatomy.experts if b.name in left}

    def forbid(node, value):
        if node.name in routers:
            gone = [e for e in range(value.shape[-1]) if e not in routers[node.name]]
            value = value.clone()
            value[..., gone] = float("-inf")
        return value

    inputs = program.bind((), example_inputs(program, seed=9))
    expected = interpret(program, inputs, hook=forbid)
    found = done(**example_inputs(program, seed=9))
    key = next(k for k, v in found.items() if isinstance(v, torch.Tensor))
    assert torch.allclose(found[key], expected[key], atol=1e-5)
    core = done.anatomy.experts[0].parts["core"]
    assert arguments(core)["up"].meta["val"].shape[0] == 3
    done.save_pretrained(tmp_path / "hf")
    again = graphopt.capture(tmp_path / "hf")
    assert {b.sizes["experts"] for b in again.anatomy.experts} == {3}
    second = again(**example_inputs(program, seed=9))
    assert torch.allclose(second[key], found[key], atol=1e-5), "the folder computes something else"


def test_groups_stay_groups(tmp_path: Path) -> None:
    """DeepSeek's router first chooses among groups of experts: as many must go of each."""
    import transformers

    case = zoo.CASES["deepseek_v3"]
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **{**case.options, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_()
    model.save_pretrained(tmp_path / "whole")
    program = graphopt.capture(tmp_path / "whole")
    done = graphopt.optimize(program, "prune-experts{keep=4}", data=data(program))
    left = done.history[-1]["plan"]["sites"][0]["left"]
    assert [sum(e < 4 for e in left), sum(e >= 4 for e in left)] == [2, 2]
    done.save_pretrained(tmp_path / "pruned")
    pruned = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert pruned.config.n_routed_experts == 4
    whole = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "whole").eval()
    gate = next(m for n, m in whole.named_modules() if n.endswith("mlp.gate"))
    expected = next(m for n, m in pruned.named_modules() if n.endswith("mlp.gate"))
    assert torch.equal(gate.weight[left], expected.weight)
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        assert torch.allclose(done(input_ids=ids)["logits"], pruned(input_ids=ids).logits, atol=2e-5)
    with pytest.raises(PassRefusedError, match="2 groups, which 5 do not fill"):
        graphopt.optimize(program, "prune-experts{keep=5}", data=data(program))


_SMALL = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
BELOW: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3", {**zoo.CASES["deepseek_v3"].options, "n_routed_experts": 8}),
    "glm4_moe": (
        "Glm4Moe",
        {**zoo.CASES["qwen3"].options, **_SMALL, "n_routed_experts": 8, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {**zoo.CASES["llama"].options, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BELOW)
def test_the_way_back_goes_on_below_casts_and_views_of_a_router(name: str, tmp_path: Path) -> None:
    """Routers compute in float32 whatever is stored, and some biases are stored with a dimension of one before them."""
    import transformers

    family, options = BELOW[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options))
    model.to(torch.bfloat16).eval().save_pretrained(tmp_path / "in")
    program = capture_huggingface(tmp_path / "in", compare=False)
    done = graphopt.optimize(program, "prune-experts{keep=4 score=random}")
    left = done.history[-1]["plan"]["sites"][0]["left"]
    report = done.save_pretrained(tmp_path / "out")
    assert max(report.errors.values()) < 1e-5
    whole, pruned = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    gate = next(k for k in whole if k.endswith("gate.weight"))
    assert torch.equal(pruned[gate], whole[gate][left])


def test_scores_follow_the_router(captured: Callable[[str], Program]) -> None:
    from graphopt.measure.context import Context
    from graphopt.passes.experts.selecting import expert_scores

    program = captured("mixtral")
    blocks = program.anatomy.experts
    context = Context(data(program))
    counts = expert_scores(program, context, blocks, "count")
    weights = expert_scores(program, context, blocks, "weight")
    tokens = sum(
        int(b.get("attention_mask", torch.ones_like(b["input_ids"])).sum()) for b in context.batches()
    )
    for block in blocks:
        assert float(counts[block.name].sum()) == 2 * tokens, "padding was counted, or tokens were missed"
        assert float(weights[block.name].sum()) == pytest.approx(tokens, rel=1e-5)


def test_impossible_numbers(captured: Callable[[str], Program]) -> None:
    program = captured("mixtral")
    for keep in (1, 9):
        with pytest.raises(PassRefusedError, match="cannot be kept"):
            graphopt.optimize(program, f"prune-experts{{keep={keep} score=random}}")
    with pytest.raises(PipelineError, match="say how many"):
        graphopt.optimize(program, "prune-experts")
    with pytest.raises(PipelineError, match="needs data"):
        graphopt.optimize(program, "prune-experts{keep=3}")


def test_a_mixture_whose_dial_was_fixed_is_pruned_by_what_is_left(captured: Callable[[str], Program]) -> None:
    """Experts left out carry a number that no expert has; a score must not count them."""
    program = captured("mixtral")
    for first in ("dial-top-k{fixed=1}", "dial-top-k, freeze-dial{value=1}"):
        done = graphopt.optimize(program, f"{first}, prune-experts{{keep=3}}", data=data(program))
        assert done.anatomy.experts[0].sizes["experts"] == 3
